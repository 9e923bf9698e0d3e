"""Servers: the pure diff, and the loop that runs it against a HAProxy that fails in every way."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.messages import EndpointRule, GatewaySpec
from headrace.gateway.haproxy_runtime import (
    HaproxyGone,
    HaproxyRefused,
    HaproxyRuntime,
    HaproxyUnavailable,
    ServerState,
    parse_servers_state,
)
from headrace.gateway.names import backend_name, decode_name, encode_name, endpoint_of_backend
from headrace.gateway.server import Server
from headrace.gateway.servers import ServerKeeper, plan_changes, server_of_state

STATE = """1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_port srv_fqdn
4 ep-chat 1 chat-1 127.0.0.1 2 0 1 9001 -
4 ep-chat 2 chat-2 ::1 0 1 1 9002 -
6 headrace-router 1 router - 2 0 1 0 -

garbage
"""


class FakeHaproxy(HaproxyRuntime):
    """HAProxy's servers in memory. `failures` of the next commands come first."""

    def __init__(self) -> None:
        self.servers: dict[str, ServerState] = {}
        self.busy: set[str] = set()
        self.failures: list[Exception] = []
        self.num_reloads = 0

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    async def show_servers(self) -> dict[str, ServerState]:
        self._fail()
        return dict(self.servers)

    async def add_server(self, server: Server) -> None:
        self._fail()
        self.servers[server.path] = ServerState(server.path, server.address, True, False)

    async def enable_server(self, path: str) -> None:
        self._fail()
        if path not in self.servers:
            raise HaproxyRefused("No such server.")
        self.servers[path] = self.servers[path]._replace(is_in_maintenance=False, is_up=True)

    async def disable_server(self, path: str) -> None:
        self._fail()
        self.servers[path] = self.servers[path]._replace(is_in_maintenance=True)

    async def delete_server(self, path: str) -> bool:
        self._fail()
        if path in self.busy:
            return False
        del self.servers[path]
        return True

    async def reload(self) -> None:
        self._fail()
        self.num_reloads += 1


def server(number: int, port: int = 0) -> Server:
    return Server("chat", f"chat-{number}", "127.0.0.1", port or 9000 + number, 8)


def state(path: str, address: str = "127.0.0.1:9001", *, is_in_maintenance: bool = False) -> ServerState:
    return ServerState(path, address, is_in_maintenance, not is_in_maintenance)


@given(st.text(alphabet="ab_/s.u:-", max_size=12))
def test_names_come_back_and_hold_nothing_that_haproxy_refuses(name: str) -> None:
    assert decode_name(encode_name(name)) == name
    assert endpoint_of_backend(backend_name(name)) == name
    assert "/" not in encode_name(name)


def test_haproxys_state_is_read_and_garbage_is_left_out() -> None:
    servers = parse_servers_state(STATE)
    assert servers["ep-chat/chat-1"] == ("ep-chat/chat-1", "127.0.0.1:9001", False, True)
    assert servers["ep-chat/chat-2"] == ("ep-chat/chat-2", "[::1]:9002", True, False)
    assert set(servers) == {"ep-chat/chat-1", "ep-chat/chat-2", "headrace-router/router"}
    assert parse_servers_state("nonsense") == {}
    assert server_of_state(servers["ep-chat/chat-2"], "/run/x") == Server("chat", "chat-2", "::1", 9002)
    assert server_of_state(servers["headrace-router/router"], "/run/x") is None


def test_the_plan_adds_revives_replaces_and_removes() -> None:
    actual = {
        item.path: item
        for item in (
            state("ep-chat/chat-1", is_in_maintenance=True),
            state("ep-chat/chat-2", "127.0.0.1:1"),
            state("ep-chat/old"),
            state("ep-chat/older", is_in_maintenance=True),
            state("headrace-router/router"),
        )
    }
    plan = [(change.kind, change.path) for change in plan_changes([server(1), server(2), server(3)], actual)]
    assert plan == [
        ("enable", "ep-chat/chat-1"),
        ("disable", "ep-chat/chat-2"),
        ("delete", "ep-chat/chat-2"),
        ("add", "ep-chat/chat-3"),
        ("enable", "ep-chat/chat-3"),
        ("disable", "ep-chat/old"),
        ("delete", "ep-chat/old"),
        ("delete", "ep-chat/older"),
    ]


class Rig:
    def __init__(self, directory: Path) -> None:
        rules = [EndpointRule("chat", "m", 8, 5.0)]
        self.spec = GatewaySpec(run_dir=str(directory), bind="127.0.0.1:8000", endpoints=rules)
        self.haproxy = FakeHaproxy()
        self.num_changes = 0
        self.keeper = ServerKeeper(self.spec, 20_000, self.haproxy, self._on_change)
        self.config = directory / "g1" / "haproxy.cfg"

    def _on_change(self) -> None:
        self.num_changes += 1

    def want(self, *numbers: int, known: tuple[int, ...] = ()) -> None:
        servers = [server(number) for number in numbers]
        self.keeper.want(servers, [server(number).path for number in (*numbers, *known)])

    async def settle(self) -> int:
        for number in range(1, 30):
            if await self.keeper.run_round():
                return number
        raise AssertionError(f"not settled: {self.keeper!r}")


@pytest.fixture
def short_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


async def test_servers_come_and_go_and_the_file_follows(short_dir: Path) -> None:
    rig = Rig(short_dir)
    rig.want(1, 2)
    await rig.settle()
    assert rig.keeper.serving == {"ep-chat/chat-1", "ep-chat/chat-2"}
    rig.haproxy.busy = {"ep-chat/chat-1"}
    rig.want(2, known=(1,))
    assert not rig.keeper.is_released("ep-chat/chat-1")
    assert not await rig.keeper.run_round()
    assert rig.keeper.is_released("ep-chat/chat-1"), "in maintenance, though still busy"
    assert rig.keeper.serving == {"ep-chat/chat-2"}
    assert "chat-1" not in rig.config.read_text()
    rig.haproxy.busy.clear()
    await rig.settle()
    assert set(rig.haproxy.servers) == {"ep-chat/chat-2"}


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("error", [HaproxyUnavailable("gone"), HaproxyRefused("no"), OSError("disk")])
async def test_a_command_that_fails_is_done_later(short_dir: Path, at: int, error: Exception) -> None:
    rig = Rig(short_dir)
    rig.haproxy.servers = {"ep-chat/chat-9": state("ep-chat/chat-9")}
    rig.want(1, 2, known=(9,))
    rig.haproxy.failures = []
    commands = 0
    original = rig.haproxy._fail

    def fail_at() -> None:
        nonlocal commands
        commands += 1
        if commands == at + 1:
            raise error
        original()

    rig.haproxy._fail = fail_at  # type: ignore[method-assign]
    await rig.settle()
    assert set(rig.haproxy.servers) == {"ep-chat/chat-1", "ep-chat/chat-2"}
    assert rig.keeper.num_failures >= 1
    assert rig.keeper.last_error == ""


async def test_a_new_router_adopts_servers_whose_replicas_have_not_reported_yet(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(short_dir)
    rig.haproxy.servers = {item.path: item for item in (state("ep-chat/chat-5"), state("ep-chat/chat-6"))}
    rig.want(1, known=(6,))
    await rig.settle()
    assert set(rig.haproxy.servers) == {"ep-chat/chat-1", "ep-chat/chat-5"}
    assert "chat-5" in rig.config.read_text()
    now_s = asyncio.get_running_loop().time()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now_s + 6)
    await rig.settle()
    assert set(rig.haproxy.servers) == {"ep-chat/chat-1"}


async def test_with_haproxy_gone_the_file_is_ready_and_servers_count_as_absent_after_a_while(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(short_dir)
    rig.want(1)
    await rig.settle()
    rig.want(2, known=(1,))
    rig.haproxy.failures = [HaproxyUnavailable("gone")] * 2
    assert not await rig.keeper.run_round()
    assert rig.keeper.serving == {"ep-chat/chat-1"}, "one missed answer changes nothing"
    now_s = asyncio.get_running_loop().time()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now_s + 6)
    assert not await rig.keeper.run_round()
    assert rig.keeper.serving == frozenset()
    assert "chat-2" in rig.config.read_text()
    assert rig.keeper.is_released("ep-chat/chat-1")


async def test_where_nobody_listens_who_leaves_need_not_wait_and_others_serve_on(
    short_dir: Path,
) -> None:
    rig = Rig(short_dir)
    rig.want(1, 2)
    await rig.settle()
    rig.want(2, known=(1,))
    rig.haproxy.failures = [HaproxyGone("gone"), HaproxyUnavailable("late"), *[HaproxyGone("gone")] * 2]
    for _ in range(3):
        assert not await rig.keeper.run_round()
        assert not rig.keeper.is_released("ep-chat/chat-1"), "it may be a moment's"
    assert not await rig.keeper.run_round()
    assert rig.keeper.is_released("ep-chat/chat-1")
    assert rig.keeper.serving == {"ep-chat/chat-2"}
    await rig.settle()
    assert rig.keeper.is_released("ep-chat/chat-1")


async def test_a_full_disk_keeps_no_replica_from_haproxy_and_the_file_follows_when_there_is_room(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(short_dir)
    await rig.settle()

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("headrace.gateway.servers.write_files", no_room)
        rig.want(1)
        for _ in range(3):
            assert not await rig.keeper.run_round(), "the file is still to be written"
        assert rig.keeper.serving == {"ep-chat/chat-1"}
        assert "No space left" in rig.keeper.last_error
    assert "chat-1" not in rig.config.read_text()
    await rig.settle()
    assert "chat-1" in rig.config.read_text()


async def test_new_endpoints_mean_one_reload_that_is_tried_until_it_works(short_dir: Path) -> None:
    rig = Rig(short_dir)
    await rig.settle()
    rules = [*rig.spec.endpoints, EndpointRule("more", "m", 8, 5.0)]
    rig.keeper.set_spec(GatewaySpec(run_dir=rig.spec.run_dir, bind=rig.spec.bind, endpoints=rules))
    rig.haproxy.failures = [HaproxyUnavailable("gone")]
    await rig.settle()
    assert rig.haproxy.num_reloads == 1
    assert rig.keeper.num_reloads == 1
    assert "backend ep-more" in rig.config.read_text()


async def test_a_refused_reload_does_not_stop_replicas_from_coming(short_dir: Path) -> None:
    rig = Rig(short_dir)
    await rig.settle()
    rig.keeper.set_spec(
        GatewaySpec(run_dir=rig.spec.run_dir, bind="127.0.0.1:81", endpoints=rig.spec.endpoints)
    )

    async def refuse() -> None:
        rig.haproxy.num_reloads += 1
        raise HaproxyRefused("cannot bind")

    rig.haproxy.reload = refuse  # type: ignore[method-assign]
    rig.want(1)
    for _ in range(5):
        assert not await rig.keeper.run_round()
    assert rig.keeper.serving == {"ep-chat/chat-1"}
    assert rig.haproxy.num_reloads == 1, "it is not tried again at once"
    assert rig.keeper.last_error == "cannot bind"


def test_a_server_on_a_unix_socket_is_known_again_by_its_replicas_id() -> None:
    wanted = Server("chat", "chat-1", "127.0.0.1", 9001, 8, "/run/x/front-chat-1.sock")
    assert wanted.address == "unix@/run/x/front-chat-1.sock"
    shown = ServerState(wanted.path, "-:0", False, True)
    assert plan_changes([wanted], {wanted.path: shown}) == []
    adopted = server_of_state(shown, "/run/x")
    assert adopted is not None
    assert adopted.address == wanted.address


def test_a_server_that_moved_to_a_unix_socket_is_replaced() -> None:
    wanted = Server("chat", "chat-1", "127.0.0.1", 9001, 8, "/run/x/front-chat-1.sock")
    shown = ServerState(wanted.path, "127.0.0.1:9001", False, True)
    assert [change.kind for change in plan_changes([wanted], {wanted.path: shown})] == ["disable", "delete"]
