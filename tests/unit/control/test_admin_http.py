"""The admin API: commands as JSON, refusals in OpenAI's shape, a socket for its owner alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace.api.messages import (
    AdminCommand,
    AdminReply,
    ApplyConfig,
    CreateKey,
    GetStatus,
    KeyInfo,
    ListKeys,
    RevokeKey,
    ScaleEndpoint,
    SystemStatus,
)
from headrace.control.admin_http import MAX_BODY_BYTES, AdminApi, serve_admin
from headrace.control.key_store import UnknownKey
from headrace.errors import ConfigError

KEY = KeyInfo("key-00000000", "acme", "laptop", "0" * 12, 5.0, "created")


class Controller:
    """Carries commands out in memory, and remembers them."""

    def __init__(self) -> None:
        self.commands: list[AdminCommand] = []

    def obey(self, command: AdminCommand) -> AdminReply:
        self.commands.append(command)
        match command:
            case GetStatus():
                return AdminReply(status=SystemStatus("1", "http://x/v1", 1.0, True, [], [], []))
            case CreateKey(tenant):
                if tenant != "acme":
                    raise ConfigError(f"tenant {tenant!r} does not exist; there are: acme")
                return AdminReply(key="hr-new", keys=[KEY])
            case RevokeKey(key_id) if key_id != KEY.key_id:
                raise UnknownKey("there is no such key")
            case ListKeys() | RevokeKey():
                return AdminReply(keys=[KEY], notes=["a note"])
            case _:
                return AdminReply(notes=["done"])


@pytest.fixture
def controller() -> Controller:
    return Controller()


@pytest.fixture
async def http(controller: Controller) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(AdminApi(controller.obey).app())
    async with httpx.AsyncClient(transport=transport, base_url="http://admin/admin/v1/") as client:
        yield client


async def test_every_command_has_its_path(http: httpx.AsyncClient, controller: Controller) -> None:
    assert (await http.get("status")).json()["is_ready"] is True
    listed = (await http.get("keys", params={"tenant": "acme"})).json()
    assert (listed["data"][0]["key_id"], listed["notes"]) == (KEY.key_id, ["a note"])
    made = await http.post("keys", json={"tenant": "acme", "name": "laptop"})
    assert (made.status_code, made.json()["key"], made.json()["key_id"]) == (201, "hr-new", KEY.key_id)
    assert (await http.delete(f"keys/{KEY.key_id}")).json()["revoked"] is True
    assert (await http.post("scale", json={"endpoint": "chat", "replicas": 2})).json() == {"notes": ["done"]}
    tree = {"endpoints": {"chat": {"model": "simulated", "engine": "simulated"}}}
    assert (await http.post("apply", json=tree)).json() == {"notes": ["done"]}
    *others, applied = controller.commands
    assert others == [
        GetStatus(),
        ListKeys("acme"),
        CreateKey("acme", "laptop"),
        RevokeKey(KEY.key_id),
        ScaleEndpoint("chat", 2),
    ]
    assert isinstance(applied, ApplyConfig)
    assert json.loads(applied.config_json)["endpoints"]["chat"]["engine"] == "simulated"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "keys", {"tenant": "nobody"}, 400, "invalid_config"),
        ("POST", "keys", {}, 400, "invalid_body"),
        ("POST", "keys", {"tenant": "acme", "surprise": 1}, 400, "invalid_body"),
        ("POST", "keys", [], 400, "invalid_body"),
        ("POST", "scale", {"endpoint": "chat", "replicas": "two"}, 400, "invalid_body"),
        ("POST", "apply", {"endpoints": {}}, 400, "invalid_config"),
        ("POST", "apply", {"endpoints": {"a": {"model": "/no/such.gguf"}}}, 400, "invalid_config"),
        ("DELETE", "keys/key-11111111", None, 404, "key_not_found"),
        ("GET", "nope", None, 404, "not_found"),
        ("DELETE", "status", None, 405, "method_not_allowed"),
    ],
)
async def test_mistakes_are_told_in_openais_shape(
    http: httpx.AsyncClient, method: str, path: str, body: Any, status: int, code: str
) -> None:
    answer = await http.request(method, path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert error["message"]
    assert error["type"] == "invalid_request_error"


async def test_a_body_that_is_no_json_or_too_long_is_refused(
    http: httpx.AsyncClient, controller: Controller
) -> None:
    assert (await http.post("keys", content=b"\xff{")).status_code == 400
    assert (await http.post("keys", content=b"[" * 100_000)).status_code == 400
    assert (await http.post("apply", content=b" " * (MAX_BODY_BYTES + 1))).status_code == 413
    assert controller.commands == []


async def test_it_is_served_on_a_socket_for_its_owner_and_leaves_signals_and_files_alone(
    controller: Controller,
) -> None:
    with tempfile.TemporaryDirectory(prefix="hr-") as directory:
        path = Path(directory) / "admin-http.sock"
        before = signal.getsignal(signal.SIGINT)
        serving = asyncio.create_task(serve_admin(str(path), controller.obey))
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            async with asyncio.timeout(10):
                while not path.exists():  # noqa: ASYNC110, a file has no event
                    await asyncio.sleep(0.01)
            assert _mode(path) == 0o600
            assert (await client.get("/admin/v1/status")).status_code == 200
            assert signal.getsignal(signal.SIGINT) is before
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(serving, 10)
        assert list(_entries(directory)) == []


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _entries(directory: str) -> list[Path]:
    return list(Path(directory).iterdir())
