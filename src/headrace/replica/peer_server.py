"""The replica's engine, offered to its siblings' fronts: their streams are guests in it.

Owns the peer socket, who is connected, and which guest is whose. A guest counts as load, and is never a
request of this front. Whatever a peer does wrong ends its own connection and guests, nobody else's.
Must not know text, HTTP, or why a stream was sent here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import msgspec

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import (
    EngineFailed,
    EngineLoad,
    GenerationRequest,
    PeerCommand,
    PeerEvent,
    StepBatch,
    StepOutput,
    Submit,
)
from headrace.errors import Overloaded, ProtocolError
from headrace.private_socket import bind_private_socket
from headrace.replica.carried_stream import num_on_trial
from headrace.replica.engine_users import EngineStream
from headrace.replica.placed_guests import PlacedGuests

HEARTBEAT_S = 1.0
"""A host that has nothing to tell its guests' fronts says so as often."""
MAX_PEERS = 256
MAX_FRAME_BYTES = 8 * 1024 * 1024
"""A prompt of a million tokens, and its grammar."""
MAX_UNSENT_BYTES = 4 * 1024 * 1024
"""A front that reads so much too little is hung: its guests would only cost others time."""
_log = logging.getLogger(__name__)


class HostEngine(Protocol):
    """The engine, as seen from here."""

    load: EngineLoad | None

    @property
    def streams(self) -> Mapping[str, EngineStream]: ...

    def submit(self, request: GenerationRequest, stream: EngineStream) -> None:
        """Raises Overloaded."""
        ...

    def abort(self, request_id: str) -> None: ...


class PromptDigest(Protocol):
    """Who follows what the engine's prefix cache holds."""

    def expect(self, request: GenerationRequest, hashes: Sequence[int], num_bytes: int) -> None:
        """A request went to the engine whose prompt's head has these hashes, and so many bytes."""
        ...


class PeerServer:
    """All guests of one replica."""

    def __init__(
        self,
        engine: HostEngine,
        why_refused: Callable[[GenerationRequest], str],
        on_change: Callable[[], None],
        digest: PromptDigest | None = None,
    ) -> None:
        """`why_refused`: why a guest cannot be taken now; empty: it can. `on_change`: the first guest came,
        or the last one left. `digest`: hears of placed guests' prompts."""
        self._engine = engine
        self._digest = digest
        self._why_refused = why_refused
        self._on_change = on_change
        self._connections: set[PeerConnection] = set()
        self._num_connected = 0
        self._server: asyncio.Server | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self._path = ""
        self.num_guests = 0
        """Streams, those of placed requests among them."""
        self.placed = PlacedGuests()

    def __repr__(self) -> str:
        return f"PeerServer({self.num_guests} guests of {len(self._connections)} peers)"

    async def listen(self, path: str) -> None:
        """Serve on a UNIX socket, for its owner only. Raises OSError."""
        listener = bind_private_socket(path)
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_unix_server(
                self.make_connection, sock=listener, backlog=MAX_PEERS
            )
        except OSError:
            listener.close()
            raise
        self._path = path
        self.beat()

    def close(self) -> None:
        """Give all guests back, and listen no more."""
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        for connection in list(self._connections):
            connection.give_back("this replica is leaving")

    def make_connection(self) -> PeerConnection:
        """Return the protocol of a sibling that connects."""
        self._num_connected += 1
        return PeerConnection(self, self._num_connected)

    def beat(self) -> None:
        """Tell all peers that this host is there, now and from now on."""
        self._heartbeat = asyncio.get_running_loop().call_later(HEARTBEAT_S, self.beat)
        for connection in list(self._connections):
            connection.flush()

    # ---- what connections ask

    def joined(self, connection: PeerConnection) -> bool:
        """Take a connection, if there is room for it."""
        self._connections.add(connection)
        return len(self._connections) <= MAX_PEERS

    def left(self, connection: PeerConnection) -> None:
        self._connections.discard(connection)

    def take(self, request: GenerationRequest, guest: Guest) -> str:
        """Hand a guest to the engine; return why not, or nothing."""
        if reason := self._why_refused(request):
            return reason
        if request.is_suspect and num_on_trial(self._engine.streams.values()):
            return "another stream that may break engines is tried here"
        try:
            self._engine.submit(msgspec.structs.replace(request, placed=None), guest)
        except Overloaded as error:
            return error.message
        placed = request.placed
        self.placed.add(placed, request.tenant)
        if placed is not None and self._digest is not None and not request.resume_from:
            self._digest.expect(request, placed.prefix_hashes, placed.num_prompt_bytes)
        self.num_guests += 1
        if self.num_guests == 1:
            self._on_change()
        return ""

    def abort(self, guest: Guest) -> None:
        self._engine.abort(guest.engine_id)
        self.went(guest)

    def went(self, guest: Guest) -> None:
        """A guest is in the engine no more."""
        self.placed.remove(guest.placed)
        self.num_guests -= 1
        if not self.num_guests:
            self._on_change()

    def load(self) -> EngineLoad:
        return self._engine.load or EngineLoad()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every guest is someone's."""
        by_peer = [connection.num_guests for connection in self._connections]
        assert self.num_guests == sum(by_peer), f"{self.num_guests} guests != {by_peer}"
        self.placed.check_integrity()


class Guest:
    """One stream of a sibling in this engine."""

    __slots__ = ("_connection", "_is_on_trial", "engine_id", "peer_id", "placed")

    def __init__(self, connection: PeerConnection, request: GenerationRequest, engine_id: str) -> None:
        self._connection = connection
        self._is_on_trial = request.is_suspect
        self.peer_id = request.request_id
        """Its id, as its front calls it."""
        self.engine_id = engine_id
        self.placed = request.placed

    def is_on_trial(self) -> bool:
        """It may be what broke engines before, and has given no token here."""
        return self._is_on_trial

    def on_output(self, output: StepOutput, now_s: float) -> bool:
        self._is_on_trial = self._is_on_trial and not output.token_ids
        return self._connection.add(self, output)

    def flush(self) -> None:
        self._connection.flush()

    def on_engine_lost(self, reason: str) -> None:
        self._connection.on_engine_lost(reason)

    def on_broken(self) -> None:
        self._connection.close("handling a step's output failed")


class PeerConnection(asyncio.Protocol):
    """One sibling's front and its guests."""

    def __init__(self, server: PeerServer, number: int) -> None:
        self._server = server
        self._number = number
        self._decoder: FrameDecoder[PeerCommand] = FrameDecoder(PeerCommand, MAX_FRAME_BYTES)
        self._transport: asyncio.Transport | None = None
        self._guests: dict[str, Guest] = {}
        self._outputs: list[StepOutput] = []
        """Of the running step."""

    def __repr__(self) -> str:
        return f"PeerConnection({self._number}, {len(self._guests)} guests)"

    @property
    def num_guests(self) -> int:
        return len(self._guests)

    # ---- what the peer does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._server.joined(self):
            self.close(f"{MAX_PEERS} peers are connected")

    def data_received(self, data: bytes) -> None:
        try:
            for command in self._decoder.feed(data):
                if isinstance(command, Submit):
                    self._take(command.request)
                else:
                    self._abort(command.request_id)
        except ProtocolError as error:
            self.close(f"it sent what is not of the contract: {error}")
        if self._outputs:
            self.flush()  # refusals

    def connection_lost(self, error: Exception | None) -> None:
        self._end()

    def _take(self, request: GenerationRequest) -> None:
        if self._transport is None:
            return  # closed by an earlier command of the same read
        peer_id = request.request_id
        if peer_id in self._guests:
            raise ProtocolError(f"guest {peer_id!r} is here already; ids must be unique")
        # Other peers, and this front's own clients, may use the same ids.
        guest = Guest(self, request, f"guest{self._number}:{peer_id}")
        self._guests[peer_id] = guest
        renamed = msgspec.structs.replace(request, request_id=guest.engine_id)
        if reason := self._server.take(renamed, guest):
            del self._guests[peer_id]
            self._outputs.append(StepOutput(peer_id, finish_reason="aborted", error=reason))

    def _abort(self, peer_id: str) -> None:
        # Unknown: it ended while the command was on its way.
        if (guest := self._guests.pop(peer_id, None)) is not None:
            self._server.abort(guest)

    # ---- what the engine gives

    def add(self, guest: Guest, output: StepOutput) -> bool:
        """Take a guest's output of this step; say whether it is the first one."""
        if output.finish_reason is not None:
            del self._guests[guest.peer_id]
            self._server.went(guest)
        self._outputs.append(msgspec.structs.replace(output, request_id=guest.peer_id))
        return len(self._outputs) == 1

    def flush(self) -> None:
        """Send what the step gave; without anything, that this host is there."""
        outputs, self._outputs = self._outputs, []
        self._send(StepBatch(outputs, self._server.load()))

    def on_engine_lost(self, reason: str) -> None:
        """The engine is gone, and all guests with it. Called for each of them."""
        if self._transport is None:
            return
        guests, self._guests = self._guests, {}
        for guest in guests.values():
            self._server.went(guest)
        self._send(EngineFailed(reason))
        self.close("")

    def give_back(self, reason: str) -> None:
        """Let the peer continue its streams elsewhere; then it hears no more."""
        for peer_id in list(self._guests):
            self._abort(peer_id)
            self._outputs.append(StepOutput(peer_id, finish_reason="aborted", error=reason))
        if self._outputs:
            self.flush()
        self.close("")

    # ---- the end

    def _send(self, event: PeerEvent) -> None:
        transport = self._transport
        if transport is None:
            return
        transport.write(encode_frame(event))
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.close(f"it left {transport.get_write_buffer_size()} bytes unread")
            transport.abort()

    def close(self, reason: str) -> None:
        """End the connection, after what was written; guests that are left are aborted."""
        if reason:
            _log.warning("%r is closed: %s", self, reason)
        if self._transport is not None:
            self._transport.close()
        self._end()

    def _end(self) -> None:
        self._transport = None
        for peer_id in list(self._guests):
            self._abort(peer_id)
        self._outputs.clear()
        self._server.left(self)
