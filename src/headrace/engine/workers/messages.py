"""What an engine, its other ranks and their holders say to each other besides steps, and the socket for it.

Frames of `api.framing` on a stream socket, UNIX or TCP; steps go another way (`mailbox`). Must not know what
the messages bring about.
"""

from __future__ import annotations

import math
import select
import socket

import msgspec

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import EngineSpec
from headrace.errors import EngineDead, ProtocolError

SEND_LIMIT_S = 10.0
_CHUNK_BYTES = 64 * 1024
_CLOSED = select.POLLHUP | select.POLLRDHUP | select.POLLERR


class RankListens(msgspec.Struct, frozen=True, tag=True):
    """From a rank that shares no memory, first: where the ranks above it find it."""

    host: str
    port: int


class Join(msgspec.Struct, frozen=True, tag=True):
    """To a rank: what to load. The shared memory's descriptor comes along, if there is any."""

    spec: EngineSpec
    rank: int
    sizes: dict[str, int]
    """Regions of the shared memory."""
    meeting_limit_s: float
    addresses: dict[int, tuple[str, int]] = {}
    """Where each rank listens, if they share no memory."""


class KvBlocks(msgspec.Struct, frozen=True, tag=True):
    """To a rank: how many KV blocks every rank has."""

    num_blocks: int


class RankReady(msgspec.Struct, frozen=True, tag=True):
    """From a rank: it waits for steps."""

    path: str
    """Its arithmetic; ranks of one engine must agree."""


class RankChanged(msgspec.Struct, frozen=True, tag=True):
    """From a rank: it sleeps, or is awake; or it tried, and is as it was."""

    error: str = ""


class RankFailed(msgspec.Struct, frozen=True, tag=True):
    """From a rank, last: why it ends."""

    error: str
    is_retryable: bool


class HolderHere(msgspec.Struct, frozen=True, tag=True):
    """From a rank's holder to the engine, first: it can start this rank here."""

    rank: int
    version: str
    """Of headrace."""
    address: str = ""
    """Of its node; empty: the engine's machine."""


class Call(msgspec.Struct, frozen=True):
    """Where an engine waits for the connection of a rank that is elsewhere."""

    host: str
    port: int
    key: bytes
    """Of this start, for this rank and all others."""

    def __repr__(self) -> str:
        return f"Call({self.host!r}, {self.port})"  # the key is for nobody's log


class StartRank(msgspec.Struct, frozen=True, tag=True):
    """To a holder: start the rank's process. Its socket's descriptor comes along, or what it is to call."""

    title: str
    call: Call | None = None


class EndRank(msgspec.Struct, frozen=True, tag=True):
    """To a holder: end the rank's process, whatever it does."""


class RankStarted(msgspec.Struct, frozen=True, tag=True):
    """From a holder: the process is there."""

    pid: int


class RankEnded(msgspec.Struct, frozen=True, tag=True):
    """From a holder: it is gone, or could not be started."""

    description: str


Message = (
    RankListens
    | Join
    | KvBlocks
    | RankReady
    | RankChanged
    | RankFailed
    | HolderHere
    | StartRank
    | EndRank
    | RankStarted
    | RankEnded
)


class RankChannel:
    """One end of the socket between an engine and a rank, or a rank's holder."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SEND_LIMIT_S)
        self._connection = connection
        self._decoder: FrameDecoder[Message] = FrameDecoder(Message)
        self._received: list[Message] = []
        self._descriptors: list[int] = []
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN | select.POLLRDHUP)

    def __repr__(self) -> str:
        return f"<RankChannel {self._connection}>"

    @property
    def own_host(self) -> str:
        """The address of this end, where it is a TCP connection."""
        return str(self._connection.getsockname()[0])

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send one message, and open files with it. Raises EngineDead where the other end is gone."""
        frame = encode_frame(message)
        try:
            sent = socket.send_fds(self._connection, [frame], descriptors) if descriptors else 0
            if sent < len(frame):
                self._connection.sendall(frame[sent:])
        except OSError as error:
            raise EngineDead(f"the other end of a rank's socket is gone: {error}") from error

    def receive(self, limit_s: float) -> Message | None:
        """Return the next message, or None where none comes within `limit_s`. Raises EngineDead at the end
        of the stream and on bytes that are no message."""
        while not self._received:
            if not self._readable.poll(math.ceil(limit_s * 1000)):
                return None
            try:
                data, descriptors, _, _ = socket.recv_fds(self._connection, _CHUNK_BYTES, 1)
                self._descriptors += descriptors
                self._received += self._decoder.feed(data)
            except (OSError, ProtocolError) as error:
                raise EngineDead(f"a rank's socket: {error}") from error
            if not data:
                raise EngineDead("the other end of a rank's socket is closed")
        return self._received.pop(0)

    def take_descriptor(self) -> int:
        """Return the open file that came with a message. Raises EngineDead where none came."""
        if not self._descriptors:
            raise EngineDead("a message came without the open file that belongs to it")
        return self._descriptors.pop(0)

    def is_closed(self) -> bool:
        """Whether the other end is gone, without reading."""
        return any(events & _CLOSED for _, events in self._readable.poll(0))

    def close(self) -> None:
        self._connection.close()
