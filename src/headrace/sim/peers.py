"""Engines lent between fronts: guests in ours, and our streams in a sibling's.

Owns the connections between fronts. Commands go one way and outputs the other, as between a front and its
own engine. Must not know why a stream moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from headrace.api.messages import (
    Abort,
    EngineCommand,
    EngineLoad,
    GenerationRequest,
    Sibling,
    StepBatch,
    StepOutput,
    Submit,
)
from headrace.sim.network import End, connect
from headrace.sim.streams import FrontStream

if TYPE_CHECKING:
    from headrace.sim.front import FrontProcess


class _Guest:
    """A sibling's stream in our engine."""

    def __init__(self, room: GuestRoom, end: End, request_id: str) -> None:
        self._room = room
        self._end = end
        self.request_id = request_id

    def on_output(self, output: StepOutput) -> None:
        if output.finish_reason is not None:
            self._room.forget(self._end, self.request_id)
        self._end.send(StepBatch([msgspec.structs.replace(output, request_id=self.request_id)], EngineLoad()))

    def on_engine_lost(self, reason: str) -> None:
        """Its front hears that this engine is gone."""
        self._room.forget(self._end, self.request_id)
        lost = StepOutput(self.request_id, finish_reason="error", error=f"the engine is draining: {reason}")
        self._end.send(StepBatch([lost], EngineLoad()))


class GuestRoom:
    """Our engine, offered to siblings."""

    def __init__(self, front: FrontProcess) -> None:
        self._front = front
        self.address = f"{front.spec.run_dir}/peer-{front.name}.sock"
        self._guests: dict[tuple[End, str], _Guest] = {}

    @property
    def num_guests(self) -> int:
        return len(self._guests)

    def accept(self, end: End) -> None:
        end.on_message = lambda command: self._on_command(end, command)
        end.on_close = lambda: self._on_close(end)

    def forget(self, end: End, request_id: str) -> None:
        self._guests.pop((end, request_id), None)

    def _on_command(self, end: End, command: EngineCommand) -> None:
        front = self._front
        match command:
            case Submit(request):
                key = self._key(end, request.request_id)
                if front.is_draining or front.engine.state != "ready" or front.engine.has_request(key):
                    error = "the engine is draining: it takes no guests"
                    refusal = StepOutput(request.request_id, finish_reason="error", error=error)
                    end.send(StepBatch([refusal], EngineLoad()))
                    return
                guest = self._guests[end, request.request_id] = _Guest(self, end, request.request_id)
                front.engine.submit(msgspec.structs.replace(request, request_id=key), guest)
            case Abort(request_id):
                if self._guests.pop((end, request_id), None) is not None:
                    front.engine.abort(self._key(end, request_id))
            case _:
                pass

    def turn_out(self) -> None:
        """This engine goes away: every guest must go on elsewhere."""
        for (end, request_id), guest in list(self._guests.items()):
            self._front.engine.abort(self._key(end, request_id))
            guest.on_engine_lost("this replica leaves")

    def _on_close(self, end: End) -> None:
        for key in [key for key in self._guests if key[0] is end]:
            del self._guests[key]
            self._front.engine.abort(self._key(end, key[1]))

    def _key(self, end: End, request_id: str) -> str:
        return f"{request_id}@{end.peer.process.name}:{end.peer.process.pid}"


class PeerSeat:
    """A sibling's engine, over one connection; connected when first needed."""

    def __init__(self, front: FrontProcess, sibling: Sibling, on_gone: Callable[[PeerSeat], None]) -> None:
        self.name = sibling.replica_id
        self._front = front
        self._address = sibling.peer_socket
        self._on_gone = on_gone
        self._end: End | None = None
        self._waiting: list[EngineCommand] = []
        self._streams: dict[str, FrontStream] = {}
        self.is_gone = False
        connect(front, front.weather, self._address, self._on_connected, self._on_closed)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def submit(self, request: GenerationRequest, stream: FrontStream) -> None:
        self._streams[request.request_id] = stream
        self._send(Submit(request))

    def abort(self, stream: FrontStream) -> None:
        if self._streams.pop(stream.seat_id, None) is not None:
            self._send(Abort(stream.seat_id))

    def _send(self, command: EngineCommand) -> None:
        if self._end is not None:
            self._end.send(command)
        else:
            self._waiting.append(command)

    def _on_connected(self, end: End) -> None:
        self._end = end
        end.on_message = self._on_batch
        end.on_close = self._on_closed
        waiting, self._waiting = self._waiting, []
        for command in waiting:
            end.send(command)

    def _on_batch(self, batch: StepBatch) -> None:
        for output in batch.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                del self._streams[output.request_id]
            stream.on_output(output)

    def _on_closed(self) -> None:
        self.is_gone = True
        self._on_gone(self)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.on_engine_lost("the connection to the sibling closed")
