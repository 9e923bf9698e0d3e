"""Keys and tenants of a real system with simulated engines: made, used, revoked, kept over restarts."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import headrace
from headrace.api.messages import RevokeKey
from headrace.control.admin import CommandRefused, ask
from headrace.control.serve import System
from headrace.errors import ConfigError

pytestmark = pytest.mark.slow
LIMIT_S = 30.0
EFFECTIVE_S = 1.0
"""Longest time until a change of keys counts. The controller and the router are told, not polled."""


def tree(**tenants: Any) -> dict[str, Any]:
    engine = {"model": "simulated", "engine": "simulated", "simulated": {"step_ms": 5}}
    return {
        "endpoints": {"chat": engine, "big": {**engine, "replicas": 0}},
        "gateway": {"bind": "127.0.0.1:0"},
        "tenants": tenants,
    }


def until(condition: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"the condition did not come true in {limit_s} s"
        time.sleep(0.02)


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The state directory, and a runtime directory with a short path."""
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        yield tmp_path / "headrace"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


def models(system: System, key: str) -> httpx.Response:
    return httpx.get(f"{system.url}/models", headers={"authorization": f"Bearer {key}"}, timeout=5)


def chat(system: System, key: str, **fields: Any) -> httpx.Response:
    body = {"model": "chat", "max_tokens": 4, "messages": [{"role": "user", "content": "Go"}], **fields}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{system.url}/chat/completions", json=body, headers=headers, timeout=20)


def pids(system: System) -> set[int]:
    return {replica.pid for replica in system.status().replicas}


def test_a_key_works_within_a_second_of_being_made_and_stops_within_a_second_of_being_revoked(
    state: Path,
) -> None:
    with headrace.serve(tree(acme={}, small={"endpoints": ["chat"]})) as system:
        assert not state.exists(), "no key, no file"
        assert chat(system, "none").status_code == 401
        key = system.create_key("small", "laptop")
        until(lambda: models(system, key).status_code == 200, EFFECTIVE_S)
        assert [card["id"] for card in models(system, key).json()["data"]] == ["chat"]
        assert chat(system, key).status_code == 200
        assert chat(system, key, model="big").json()["error"]["code"] == "model_not_found"
        with system.client("chat", key) as client:
            assert client.models.retrieve("chat").id == "chat"

        address = system.status().replicas[0].address
        direct = httpx.post(f"http://{address}/v1/completions", json={"model": "chat", "prompt": "a"})
        assert direct.status_code == 401, "a front's own address does no work"
        assert "gateway" in direct.json()["error"]["message"]

        with pytest.raises(CommandRefused, match="'nobody' does not exist; there are: acme, small"):
            system.create_key("nobody")
        system_name = system.run_directory.name
        (listed,) = json.loads(run("keys", "list", "--json", "--system", system_name).stdout)
        assert (listed["tenant"], listed["name"], listed["source"]) == ("small", "laptop", "created")

        body = {"model": "chat", "stream": True, "max_tokens": 200, "prompt": "Go", "ignore_eos": True}
        headers = {"authorization": f"Bearer {key}"}
        with httpx.stream(
            "POST", f"{system.url}/completions", json=body, headers=headers, timeout=20
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            revoked = run("keys", "revoke", listed["key_id"], "--system", system_name)
            assert revoked.returncode == 0, revoked.stderr
            until(lambda: models(system, key).status_code == 401, EFFECTIVE_S)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        with pytest.raises(CommandRefused, match="no key with the id"):
            ask(system.run_directory, RevokeKey(listed["key_id"]))
        for path in state.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_made_before_the_first_start_works_and_outlives_system_and_controller(
    state: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tree(acme={})))
    made = run("keys", "create", "acme", "--name", "first", "--config", str(config))
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert key.startswith("hr-")
    assert key not in made.stderr
    wrong = run("keys", "create", "nobody", "--config", str(config))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "there are: acme" in wrong.stderr

    with headrace.serve(tree(acme={})) as system:
        assert chat(system, key).status_code == 200
    with headrace.serve(tree(acme={})) as system:
        assert chat(system, key).status_code == 200, "after a restart of everything"
        (controller,) = [p for p in system.status().processes if p.name == "controller"]
        (state / "keys.json").rename(state / "keys.copy")
        (state / "keys.json").write_text("damaged")
        (state / "keys.json").chmod(0o600)
        os.kill(controller.pid, signal.SIGKILL)
        system.wait_until_ready(LIMIT_S)
        for name in ("router-g1", "haproxy-g1"):
            (process,) = [p for p in system.status().processes if p.name == name]
            psutil.Process(process.pid).kill()
            until(lambda: _is_answering(system))
            assert models(system, key).status_code == 200, f"{name} was restarted while the file is damaged"
        with pytest.raises(CommandRefused, match="is damaged"):
            system.create_key("acme")
        assert (state / "keys.json").read_text() == "damaged"
        (state / "keys.copy").replace(state / "keys.json")
        until(lambda: _can_create(system), 3.0)
        assert models(system, key).status_code == 200


def _is_answering(system: System) -> bool:
    try:
        return httpx.get(f"{system.url.removesuffix('/v1')}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def _can_create(system: System) -> bool:
    try:
        return bool(system.create_key("acme"))
    except CommandRefused:
        return False


def test_tenants_and_limits_are_applied_without_a_restart_of_any_replica(state: Path) -> None:
    def config(**tenants: Any) -> dict[str, Any]:
        two = tree(**tenants)
        two["gateway"]["count"] = 2
        return two

    def statuses(key: str) -> set[int]:
        """What both gateways say: the kernel spreads new connections over them."""
        return {models(system, key).status_code for _ in range(12)}

    with headrace.serve(config(acme={})) as system:
        key = system.create_key("acme")
        until(lambda: statuses(key) == {200}, EFFECTIVE_S + 1)
        before = pids(system)
        reply = system.apply(config(acme={"weight": 3, "limits": {"max_concurrent": 9}}, late={}))
        assert reply.notes == [
            "tenant late: added",
            "tenant acme: changed",
            "tenant late has no key yet; make one with: headrace keys create late",
        ]
        late = system.create_key("late")
        until(lambda: chat(system, late).status_code == 200, 5.0)
        system.apply(config(late={}))
        until(lambda: statuses(key) == {401}, 5.0)
        assert pids(system) == before
        with pytest.raises(ConfigError, match=r"gateway\.bind: 0\.0\.0\.0:80 .* without tenants"):
            system.apply({**tree(), "gateway": {"bind": "0.0.0.0:80"}})
        assert chat(system, late).status_code == 200


def test_up_refuses_keys_that_others_could_have_written(state: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tree(acme={})))
    assert run("keys", "create", "acme", "--config", str(config)).returncode == 0
    (state / "keys.json").chmod(0o666)
    result = run("up", str(config))
    assert result.returncode == 2
    assert "mode 0666" in result.stderr
    assert "chmod 600" in result.stderr


def test_the_admin_api_takes_its_own_key_only_and_does_what_the_command_line_does(state: Path) -> None:
    config = tree(acme={})
    config["gateway"]["admin_bind"] = "127.0.0.1:0"
    with headrace.serve(config) as system:
        bind = system.config.gateway.admin_bind
        path = Path(run("keys", "admin", "--system", system.run_directory.name).stdout.strip())
        assert path == state / "admin.key"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

        def admin(method: str, what: str, key: str, body: Any = None) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            return httpx.request(
                method, f"http://{bind}/admin/v1/{what}", headers=headers, json=body, timeout=10
            )

        key = path.read_text().strip()
        made = admin("POST", "keys", key, {"tenant": "acme", "name": "by http"})
        assert made.status_code == 201
        tenant_key = made.json()["key"]
        until(lambda: chat(system, tenant_key).status_code == 200, EFFECTIVE_S + 1)
        for wrong in ("", tenant_key, "hr-wrong"):
            answer = admin("GET", "status", wrong)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert models(system, key).status_code == 401, "the admin key is not a tenant's"
        assert admin("GET", "status", key).json()["endpoints"][0]["name"] == "chat"
        assert [entry["name"] for entry in admin("GET", "keys", key).json()["data"]] == ["by http"]
        assert admin("GET", "../../v1/models", key).status_code == 404

        before = pids(system)
        assert admin("POST", "apply", key, {**config, "tenants": {"acme": {"weight": 2}}}).json()[
            "notes"
        ] == ["tenant acme: changed"]
        assert admin("POST", "scale", key, {"endpoint": "chat", "replicas": 9}).status_code == 400
        assert pids(system) == before
        assert admin("DELETE", f"keys/{made.json()['key_id']}", key).status_code == 200
        until(lambda: models(system, tenant_key).status_code == 401, EFFECTIVE_S)

        assert run("keys", "admin", "--rotate", "--system", system.run_directory.name).returncode == 0
        until(lambda: admin("GET", "status", key).status_code == 401, 3.0)
        assert admin("GET", "status", path.read_text().strip()).status_code == 200
        (controller,) = [p for p in system.status().processes if p.name == "controller"]
        os.kill(controller.pid, signal.SIGKILL)
        until(lambda: admin("GET", "status", path.read_text().strip()).status_code == 200)
