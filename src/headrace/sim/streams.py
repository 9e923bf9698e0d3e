"""One request in a front, from its arrival to its one end: what was emitted, and which engine goes on.

Owns the stream's tokens, its client's connection and its place. Where to continue is decided elsewhere
(`Resumption`). Must not know reports, drains or other requests.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from headrace.api.messages import GenerationRequest, StepOutput, TerminalState
from headrace.replica.ledger import RequestRecord
from headrace.sim.http import HttpError, HttpPiece, HttpRequest
from headrace.sim.network import End


class StreamOwner(Protocol):
    """The front, as its streams see it."""

    def close_stream(self, stream: FrontStream, state: TerminalState) -> None: ...

    def stream_lost_engine(self, stream: FrontStream, reason: str) -> None:
        """Continue it elsewhere, now or later, or fail it."""
        ...


class Seat(Protocol):
    """An engine that a stream is in: the front's own, or a sibling's."""

    name: str

    def submit(self, request: GenerationRequest, stream: FrontStream) -> None: ...

    def abort(self, stream: FrontStream) -> None: ...


class FrontStream:
    """One request. `record` is in the front's ledger from its birth to `close_stream`."""

    def __init__(
        self,
        owner: StreamOwner,
        record: RequestRecord,
        request: HttpRequest,
        end: End,
        generation: GenerationRequest,
    ) -> None:
        self._owner = owner
        self._end = end
        self.record = record
        self.request = request
        self.generation = generation
        """As it was first submitted; continued with what was emitted."""
        self.emitted: list[int] = []
        self.seat: Seat | None = None
        self.seat_id = ""
        """Its request id in the engine where it is."""
        self.num_attempts = 0
        """Engines after the first."""
        self.lost_s: float | None = None
        """On the front's clock: since when it has had no engine."""
        self.seats_tried: list[str] = []
        self.has_ended = False
        end.on_close = self._on_client_gone

    def __repr__(self) -> str:
        return f"<FrontStream {self.record.request_id}, {len(self.emitted)} tokens>"

    def take_seat(self, seat: Seat, seat_id: str) -> None:
        """Go to this engine; it computes what follows the tokens that were emitted."""
        self.seat, self.seat_id, self.lost_s = seat, seat_id, None
        self.seats_tried.append(seat.name)
        request = msgspec.structs.replace(
            self.generation, request_id=seat_id, resume_from=list(self.emitted)
        )
        seat.submit(request, self)

    def leave_seat(self) -> None:
        """Be in no engine any more."""
        if self.seat is not None:
            self.seat.abort(self)
            self.seat = None

    # ---- what the engine gives

    def on_output(self, output: StepOutput) -> None:
        if self.has_ended:
            return
        if output.finish_reason in ("error", "aborted"):
            self.seat = None
            if output.error.startswith(("the engine is draining", "the engine is asleep")):
                self._owner.stream_lost_engine(self, output.error)
            else:
                self.fail(output.error)
            return
        record = self.record
        if output.token_ids and not record.first_token_s:
            record.first_token_s = self._end.process.host.now_s()
            record.num_cached_tokens = output.num_cached_tokens
        self.emitted += output.token_ids
        record.num_output_tokens = len(self.emitted)
        record.engine_s = max(record.engine_s, output.engine_ns * 1e-9)
        if output.finish_reason is None:
            if output.token_ids:
                self._end.send(HttpPiece(output.token_ids))
            return
        self.seat = None
        self._finish(TerminalState.FINISHED, output.finish_reason, HttpPiece(output.token_ids, "done"))

    def on_engine_lost(self, reason: str) -> None:
        if not self.has_ended:
            self.seat = None
            self._owner.stream_lost_engine(self, reason)

    # ---- ends

    def fail(self, reason: str, status: int = 500) -> None:
        """End it with an error: as a status if nothing was sent yet, else as an event."""
        if self.has_ended:
            return
        self.leave_seat()
        answer = HttpPiece([], "error", reason) if self.emitted else HttpError(status, reason)
        self._finish(TerminalState.FAILED, "error", answer)

    def _on_client_gone(self) -> None:
        if not self.has_ended:
            self.leave_seat()
            self._finish(TerminalState.ABORTED, "aborted", None)

    def _finish(self, state: TerminalState, reason: str, answer: HttpError | HttpPiece | None) -> None:
        assert not self.has_ended, f"{self!r} ends twice"
        self.has_ended = True
        self.record.finish_reason = reason
        self._owner.close_stream(self, state)
        if answer is not None:
            self._end.send(answer)
            self._end.close()
