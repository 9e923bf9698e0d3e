"""With tenants, a front works for gateways only, and believes only them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from typing import Any

import httpx
import msgspec
import pytest
from tests.integration.front_process import SIMULATED, SOURCE, RunningFront, running_front

from headrace.api.messages import ReplicaSpec

pytestmark = pytest.mark.slow
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
CLAIMS = {"x-headrace-tenant": "acme", "x-headrace-request-id": "hr-g1-1", "x-request-id": "mine"}


def over_tcp(front: RunningFront, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(f"{front.url}{path}", json=body, headers=headers, verify=False)


def over_socket(front: RunningFront, path: str, body: Any, **headers: str) -> httpx.Response:
    transport = httpx.HTTPTransport(uds=front.router.latest.socket_path)
    with httpx.Client(transport=transport, base_url="http://front") as client:
        return client.post(path, json=body, headers=headers)


def test_with_tenants_the_tcp_address_does_no_work_and_the_socket_is_believed() -> None:
    with running_front(needs_gateway=True) as front:
        report = front.wait_ready()
        assert stat.S_IMODE(os.stat(report.socket_path).st_mode) == 0o600
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/v1/completions", {"model": "chat", "prompt": "a"}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            answer = over_tcp(front, path, body, **CLAIMS)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (401, "invalid_api_key")
            assert "gateway" in error["message"]
        assert httpx.get(f"{front.url}/health", verify=False).status_code == 200
        assert front.router.num_finished == 0, "nothing was accepted"

        assert over_socket(front, "/v1/chat/completions", CHAT, **CLAIMS).status_code == 200
        assert front.router.wait_finished("hr-g1-1").tenant == "acme"
        odd = {**CLAIMS, "x-headrace-request-id": "hr-g1-2", "x-headrace-tenant": "a b"}
        assert over_socket(front, "/v1/chat/completions", CHAT, **odd).status_code == 200
        assert front.router.wait_finished("hr-g1-2").tenant == ""
        front.stop()
        assert [line["tenant"] for line in front.access_log()] == ["acme", ""]


def test_without_tenants_the_tcp_address_works_but_names_no_tenant() -> None:
    with running_front() as front:
        front.wait_ready()
        assert over_tcp(front, "/v1/chat/completions", CHAT, **CLAIMS).status_code == 200
        assert front.router.wait_finished("hr-g1-1").tenant == ""


def test_a_front_that_no_gateway_could_reach_does_not_start() -> None:
    spec = ReplicaSpec("chat-1", "chat", SIMULATED, "/nonexistent-directory", [], needs_gateway=True)
    command = [sys.executable, "-m", "headrace.replica", msgspec.json.encode(spec).decode()]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 2
    assert "cannot listen on a UNIX socket in /nonexistent-directory" in result.stderr
