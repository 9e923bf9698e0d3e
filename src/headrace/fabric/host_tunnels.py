"""The tunnels of one machine, held by one of its keepers: the first that gets the lock, and when it ends the
next one.

Owns the lock, the TunnelHost, and what of the launcher's wishes is carried out. Must not know how wishes come
about (`host_routes`), or what the sockets are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path

from headrace.api.run_paths import IDENTITY_FILE
from headrace.errors import HeadraceError
from headrace.fabric.host_messages import SetTunnels, TunnelsOpened
from headrace.fabric.host_routes import socket_path_of
from headrace.fabric.tunnel import TunnelHost

LOCK_FILE = "tunnels.lock"
LOCK_POLL_S = 0.2
"""How long a machine is without tunnels after the keeper that held them ended."""
RETRY_S = 1.0
_log = logging.getLogger(__name__)


class HostTunnels:
    """One keeper's part in its machine's tunnels. `run` lasts as long as the keeper."""

    def __init__(self, run_directory: Path, on_opened: Callable[[TunnelsOpened], None]) -> None:
        self._run_directory = run_directory
        self._on_opened = on_opened
        self._wished: SetTunnels | None = None
        self._changed = asyncio.Event()
        self._told_error = ""
        self._address = ""
        """Where they are open: one that cannot be reached does not close the others."""

    def __repr__(self) -> str:
        return f"HostTunnels({self._run_directory}, {self._wished})"

    def set(self, wished: SetTunnels) -> None:
        """Have this offered and reached from now on, and nothing else. Before it nobody listens."""
        self._wished = wished
        self._changed.set()

    async def run(self, bind_host: str) -> None:
        """Hold the tunnels whenever no other keeper does. bind_host: address of this machine, a number."""
        await self._changed.wait()
        lock_fd = os.open(self._run_directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not _try_lock(lock_fd):  # noqa: ASYNC110, another process has it
                await asyncio.sleep(LOCK_POLL_S)
            while True:
                try:
                    await self._hold(bind_host)
                except (OSError, HeadraceError) as error:
                    self._tell_error(f"tunnels at {bind_host}: {error}")
                    await asyncio.sleep(RETRY_S)
        finally:
            os.close(lock_fd)

    async def _hold(self, bind_host: str) -> None:
        tunnels = TunnelHost(self._run_directory / IDENTITY_FILE)
        try:
            self._address = await tunnels.start(bind_host)
            self._on_opened(TunnelsOpened(self._address))
            self._told_error = ""
            kept: dict[str, str] = {}
            while True:
                self._changed.clear()
                assert self._wished is not None
                is_whole = await self._carry_out(tunnels, kept, self._wished)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if is_whole else RETRY_S):
                        await self._changed.wait()
        finally:
            self._address = ""
            await tunnels.close()

    async def _carry_out(self, tunnels: TunnelHost, kept: dict[str, str], wished: SetTunnels) -> bool:
        """Change what is offered and reached to what is wished. `kept`: what is, by name: the address that it
        is reached at, or nothing if it is offered; changed here. False: something could not be done now."""
        is_whole = True
        run_dir = str(self._run_directory)
        wanted = {**dict.fromkeys(wished.offered, ""), **wished.reached}
        for name in list(kept):
            if bool(kept[name]) != bool(wanted.get(name)) or name not in wanted:  # a replica may move here
                tunnels.forget(name)
                del kept[name]
        for name, address in wanted.items():
            path = socket_path_of(name, run_dir)
            if path and not address:
                tunnels.offer(name, path)
                kept[name] = ""
            elif path:
                try:
                    Path(path).parent.mkdir(mode=0o700, exist_ok=True)
                    await tunnels.reach(name, path, address)
                    kept[name] = address
                except (OSError, ValueError) as error:
                    is_whole = False
                    self._tell_error(f"tunnel to {name} at {address}: {error}")
        return is_whole

    def _tell_error(self, error: str) -> None:
        if error != self._told_error:
            self._told_error = error
            self._on_opened(TunnelsOpened(self._address, error))


def _try_lock(lock_fd: int) -> bool:
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
