"""One engine process: started over a socket pair, read, written, killed, reaped.

Owns the child and its socket from start to exit. Must not know requests, nor whether to start another.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from typing import Protocol, cast

import msgspec

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import EngineCommand, EngineEvent, EngineSpec
from headrace.errors import ProtocolError

_SOCKET_BUFFER_BYTES = 1 << 20
_MODULES = {"vllm": "headrace.engine.adapted"}
"""What is run for engines that are not headrace's own."""


class EngineProcessOwner(Protocol):
    """Who is told what happens to the process. `on_lost` comes once, then `on_exit` once."""

    def on_event(self, event: EngineEvent) -> None: ...

    def on_lost(self, reason: str) -> None:
        """It can no longer be talked to; it is being killed."""
        ...

    def on_exit(self, description: str) -> None:
        """It is gone and reaped."""
        ...


class EngineProcess(asyncio.Protocol):
    """A child in its own process group (Ctrl-C reaches the front alone, which drains first)."""

    def __init__(self, owner: EngineProcessOwner) -> None:
        self._owner = owner
        self._decoder: FrameDecoder[EngineEvent] = FrameDecoder(EngineEvent)
        self._transport: asyncio.Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._is_lost = False

    def __repr__(self) -> str:
        return f"EngineProcess(pid {self.pid}, {'lost' if self._is_lost else 'connected'})"

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    async def start(self, spec: EngineSpec, title: str) -> None:
        """Start the child. Raises OSError if the system has no room for it."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
            ours.setblocking(False)
            # Takes a millisecond (vfork), and asyncio's own subprocesses cannot be given a process group.
            self._process = subprocess.Popen(  # noqa: ASYNC220
                [
                    *(sys.executable, "-m", _MODULES.get(spec.kind, "headrace.engine")),
                    *("--fd", str(theirs.fileno())),
                    *("--spec", msgspec.json.encode(spec).decode(), "--title", title),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *([spec.kv_descriptor] if spec.kv_descriptor >= 0 else [])),
                process_group=0,
            )
        except OSError:
            ours.close()
            raise
        finally:
            # Were this end left open here, the engine's death would not close the connection.
            theirs.close()
        self._pidfd = os.pidfd_open(self._process.pid)
        loop.add_reader(self._pidfd, self._on_exit)
        await loop.create_unix_connection(lambda: self, sock=ours)

    def send(self, command: EngineCommand) -> None:
        """Send `command`; nothing happens if the process is lost."""
        if self._transport is not None and not self._is_lost:
            self._transport.write(encode_frame(command))

    def terminate(self) -> None:
        """Ask it to finish what runs and exit. Alone: what it started, it ends when nothing runs there."""
        process = self._process
        if process is not None and process.returncode is None:
            os.kill(process.pid, signal.SIGTERM)

    def kill(self, reason: str) -> None:
        """Kill it and all of its process group."""
        self._lose(reason)

    # ---- what happens to it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._is_lost:
            transport.close()

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._decoder.feed(data):
                self._owner.on_event(event)
        except ProtocolError as error:
            self._lose(f"the engine sent what is not of the contract: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._lose("the engine process ended")

    def _on_exit(self) -> None:
        assert self._process is not None
        # Not reaped yet: whatever it started and left behind goes with it.
        self._kill_group()
        status = self._process.poll()
        if status is None:
            return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        if not self._is_lost:
            # What it said last, perhaps why it ends, is still in the socket; its end of file follows.
            asyncio.get_running_loop().call_later(0.05, self._lose, "the engine process ended")
        asyncio.get_running_loop().call_later(0.06, self._owner.on_exit, _describe_exit(status))

    def _lose(self, reason: str) -> None:
        if self._is_lost:
            return
        self._is_lost = True
        self._kill_group()
        if self._transport is not None:
            self._transport.abort()
        self._owner.on_lost(reason)

    def _kill_group(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        # Not reaped yet, so the id still belongs to it; the group may have more members.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"the engine process exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"the engine process was ended by {name}"
