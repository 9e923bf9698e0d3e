"""The engine's end of the socket pair to its front: whole messages in and out, every wait bounded.

Owns framing, back-pressure and the notice that the front is gone. Must not know what the messages do.
"""

from __future__ import annotations

import math
import select
import socket

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import EngineCommand, EngineEvent
from headrace.errors import HeadraceError

SEND_TIMEOUT_S = 30.0
_CHUNK_BYTES = 256 * 1024
_MAX_CHUNKS_PER_READ = 64
"""A flood of commands (16 MiB) cannot keep the engine from its next step."""


class FrontGone(HeadraceError):
    """The front closed its end, or stopped reading for too long: nobody is left to compute for."""


class FrontChannel:
    """Receives EngineCommands and sends EngineEvents over one connected UNIX stream socket."""

    def __init__(
        self, connection: socket.socket, wakeup_fd: int = -1, send_timeout_s: float = SEND_TIMEOUT_S
    ) -> None:
        """`wakeup_fd`: becomes readable when a wait must end early (a signal came); -1: none."""
        connection.setblocking(False)
        self._connection = connection
        self._send_timeout_s = send_timeout_s
        self._decoder: FrameDecoder[EngineCommand] = FrameDecoder(EngineCommand)
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        if wakeup_fd >= 0:
            self._readable.register(wakeup_fd, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(connection, select.POLLOUT)

    def send(self, event: EngineEvent) -> None:
        """Send one event, waiting while the front is slow.

        Raises FrontGone if it left or read nothing for `send_timeout_s`.
        """
        unsent = memoryview(encode_frame(event))
        while unsent:
            try:
                num_sent = self._connection.send(unsent)
            except BlockingIOError:
                if not self._writable.poll(math.ceil(self._send_timeout_s * 1000)):
                    raise FrontGone(
                        f"the front has not read for {self._send_timeout_s:g} s; the engine ends"
                    ) from None
            except OSError as error:
                raise FrontGone(f"the front left: {error}") from error
            else:
                unsent = unsent[num_sent:]

    def receive(self, timeout_s: float) -> list[EngineCommand]:
        """Return all commands that are here, waiting at most `timeout_s` for the first bytes.

        Raises FrontGone at the end of the stream, ProtocolError on bytes that are no command.
        """
        if not self._readable.poll(math.ceil(timeout_s * 1000)):
            return []
        commands: list[EngineCommand] = []
        for _ in range(_MAX_CHUNKS_PER_READ):
            try:
                data = self._connection.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                raise FrontGone(f"the front left: {error}") from error
            if not data:
                raise FrontGone("the front closed its end")
            commands.extend(self._decoder.feed(data))
            if len(data) < _CHUNK_BYTES:
                break
        return commands

    def fileno(self) -> int:
        """The socket, for an event loop: readable when `receive(0)` gives something."""
        return self._connection.fileno()

    def is_front_gone(self) -> bool:
        """Whether the other end is closed already, without reading anything."""
        return any(
            events & (select.POLLHUP | select.POLLERR)
            for fd, events in self._readable.poll(0)
            if fd == self._connection.fileno()
        )
