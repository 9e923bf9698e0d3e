"""What a front says of its prefix cache, and that tenants share nothing of it but what is declared public."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest
from tests.integration.front_process import SIMULATED, RunningFront, running_front

from headrace.policy.prompt import read_prompt

pytestmark = pytest.mark.slow
COSTLY = msgspec.structs.replace(SIMULATED, simulated_prefill_token_s=1e-6)
TEXT = "the channel that brings water to the turbines is full of clear and cold water " * 20
PUBLIC = "You are the assistant of a waterworks. " * 12


def ask(front: RunningFront, tenant: str, *messages: dict[str, str]) -> tuple[bytes, int]:
    """Send one chat as a gateway would; return its body and its cached tokens."""
    body = json.dumps({"model": "chat", "messages": messages, "max_tokens": 2}).encode()
    transport = httpx.HTTPTransport(uds=front.router.latest.socket_path)
    with httpx.Client(transport=transport, base_url="http://front") as client:
        headers = {"x-headrace-tenant": tenant, "content-type": "application/json"}
        answer = client.post("/v1/chat/completions", content=body, headers=headers)
    usage: dict[str, Any] = answer.json()["usage"]
    return body, usage["prompt_tokens_details"]["cached_tokens"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_tenants_share_no_block_and_each_shares_its_own() -> None:
    with running_front(engine=COSTLY) as front:
        front.wait_ready()
        cached = [ask(front, tenant, user(TEXT))[1] for tenant in ("acme", "other", "acme", "", "")]
        assert cached[0] == cached[1] == cached[3] == 0, "nobody sees that another sent the same prompt"
        assert cached[2] > 1500
        assert cached[4] > 1500


def test_a_declared_prefix_is_shared_by_all_tenants_and_what_follows_is_not() -> None:
    with running_front(engine=COSTLY, shared_prefix=PUBLIC) as front:
        front.wait_ready()
        system = {"role": "system", "content": PUBLIC}
        num_public = len(f"system: {PUBLIC}\n") // 16 * 16
        assert ask(front, "acme", system, user(TEXT))[1] == 0
        assert ask(front, "other", system, user(TEXT))[1] == num_public
        assert ask(front, "other", user(TEXT))[1] == 0
        assert ask(front, "acme", system, user(TEXT))[1] > 1500


def test_reports_name_the_prefixes_that_the_router_asks_for() -> None:
    with running_front(engine=COSTLY) as front:
        front.wait_ready()
        body, _ = ask(front, "acme", user(TEXT))
        hashes = read_prompt(body, len(body), "acme").hashes
        front.router.wait_for(
            lambda _: set(hashes) <= {h for report in front.router.reports for h in report.prefixes_added}
        )
        assert front.router.latest.prefix_epoch > 0
