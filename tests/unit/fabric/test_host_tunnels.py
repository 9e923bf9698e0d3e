"""The tunnels of one machine: who holds them, and what becomes of a wish."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from headrace.api.run_paths import IDENTITY_FILE
from headrace.fabric.cluster_identity import write_identity
from headrace.fabric.host_messages import SetTunnels, TunnelsOpened
from headrace.fabric.host_tunnels import HostTunnels

SECRET = bytes(range(32))
LIMIT_S = 10.0


@contextlib.asynccontextmanager
async def keeping(
    directory: Path, said: list[TunnelsOpened], host: str = "127.0.0.1"
) -> AsyncIterator[HostTunnels]:
    write_identity(SECRET, directory / IDENTITY_FILE)
    tunnels = HostTunnels(directory, said.append)
    task = asyncio.create_task(tunnels.run(host))
    try:
        yield tunnels
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110, files raise no events here
            await asyncio.sleep(0.01)


async def test_one_keeper_of_a_machine_holds_its_tunnels_and_the_next_one_follows(tmp_path: Path) -> None:
    first_said: list[TunnelsOpened] = []
    second_said: list[TunnelsOpened] = []
    wish = SetTunnels(["controller"], {})
    async with keeping(tmp_path, second_said) as second:
        async with keeping(tmp_path, first_said) as first:
            await asyncio.sleep(0)
            assert not first_said  # nobody listens before there is a wish
            first.set(wish)
            await until(lambda: first_said)
            second.set(wish)
            await asyncio.sleep(0.3)  # longer than it waits between two tries
            assert not second_said
        await until(lambda: second_said)
        assert second_said[0].address != first_said[0].address


async def test_a_socket_that_a_process_put_in_a_tunnels_place_stays(tmp_path: Path) -> None:
    said: list[TunnelsOpened] = []
    path = tmp_path / "peer-chat-1.sock"
    async with keeping(tmp_path, said) as tunnels:
        tunnels.set(SetTunnels(["controller"], {"peer:chat-1": "127.0.0.1:1"}))
        await until(path.exists)
        path.unlink()
        server = await asyncio.start_unix_server(lambda reader, writer: None, str(path))
        tunnels.set(SetTunnels(["controller", "peer:chat-1"], {"router:g1": "127.0.0.1:1"}))
        await until((tmp_path / "g1" / "router.sock").exists)
        assert path.exists()
        server.close()


async def test_an_address_that_is_not_this_machines_is_told_once(tmp_path: Path) -> None:
    said: list[TunnelsOpened] = []
    async with keeping(tmp_path, said, "192.0.2.1") as tunnels:
        tunnels.set(SetTunnels([], {}))
        await until(lambda: said)
        assert said[0].address == ""
        assert "tunnels at 192.0.2.1" in said[0].error


async def test_one_socket_that_cannot_be_made_takes_the_tunnels_from_nobody(tmp_path: Path) -> None:
    said: list[TunnelsOpened] = []
    (tmp_path / "g1").write_text("where a directory must be")
    async with keeping(tmp_path, said) as tunnels:
        tunnels.set(SetTunnels(["controller"], {"router:g1": "127.0.0.1:1", "router:g2": "127.0.0.1:1"}))
        await until(lambda: len(said) == 2)
        assert (said[0].error, "router:g1" in said[1].error) == ("", True)
        assert said[1].address == said[0].address
        await until((tmp_path / "g2" / "router.sock").exists)
        (tmp_path / "g1").unlink()
        await until((tmp_path / "g1" / "router.sock").exists)
