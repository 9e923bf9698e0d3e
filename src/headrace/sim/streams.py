"""One request in a simulated front: what a client was sent of it, and its one end.

Stands for `replica.answer` behind the real keeper of streams, which decides where it goes on. Must not know
engines, reports or drains.
"""

from __future__ import annotations

from typing import Literal, Protocol

from headrace.api.messages import GenerationRequest, StepOutput, TerminalState
from headrace.errors import RequestError
from headrace.replica.ledger import RequestRecord
from headrace.sim.http import HttpError, HttpPiece
from headrace.sim.network import End


class StreamOwner(Protocol):
    """The front, as its streams see it."""

    name: str

    def close_stream(self, stream: FrontStream, state: TerminalState) -> None: ...

    def abort_stream(self, stream: FrontStream) -> None:
        """Take it from whatever engine has it."""
        ...

    def stream_lost_engine(self, stream: FrontStream, reason: str) -> None: ...


class FrontStream:
    """One request. Its record is in the ledger from its birth to its end."""

    def __init__(
        self, owner: StreamOwner, record: RequestRecord, end: End, generation: GenerationRequest
    ) -> None:
        self._owner = owner
        self._end = end
        self.record = record
        self.request = generation
        self.token_ids: list[int] = []
        self.engine_ns = 0
        self.has_ended = False
        end.on_close = self._on_client_gone

    def __repr__(self) -> str:
        return f"<FrontStream {self.record.request_id}, {len(self.token_ids)} tokens>"

    # ---- what engines and their keeper tell

    def on_output(self, output: StepOutput, now_s: float) -> bool:
        if self.has_ended:
            return False
        self.engine_ns = max(self.engine_ns, output.engine_ns)
        if output.finish_reason in ("error", "aborted"):
            self._end_with_error(output.error or output.finish_reason, 500)
            return False
        record = self.record
        if output.token_ids and not record.first_token_s:
            record.first_token_s = now_s
            record.num_cached_tokens = output.num_cached_tokens
        self.token_ids += output.token_ids
        if output.finish_reason is not None:
            self._finish(TerminalState.FINISHED, output.finish_reason, self._piece(output.token_ids, "done"))
        elif output.token_ids:
            self._end.send(self._piece(output.token_ids))
        return False

    def _piece(
        self, token_ids: list[int], end: Literal["", "done", "error"] = "", reason: str = ""
    ) -> HttpPiece:
        return HttpPiece(token_ids, end, reason, self._owner.name, self.record.request_id)

    def flush(self) -> None:
        """Each output is sent as it comes."""

    def on_engine_lost(self, reason: str) -> None:
        if not self.has_ended:
            self._owner.stream_lost_engine(self, reason)

    def on_resumed(self, host: str) -> None:
        self.record.num_resumptions += 1
        if host:
            self.record.hosts.append(host)

    def on_broken(self) -> None:
        raise AssertionError(f"{self!r} is broken")

    # ---- ends

    def fail(self, error: RequestError) -> None:
        """It cannot go on: tell its client, as a status if nothing was sent yet, else as an event."""
        if not self.has_ended:
            self._owner.abort_stream(self)
            self._end_with_error(error.message, error.status)

    def _end_with_error(self, reason: str, status: int) -> None:
        answer = self._piece([], "error", reason) if self.token_ids else HttpError(status, reason)
        self._finish(TerminalState.FAILED, "error", answer)

    def _on_client_gone(self) -> None:
        if not self.has_ended:
            self._owner.abort_stream(self)
            self._finish(TerminalState.ABORTED, "aborted", None)

    def _finish(self, state: TerminalState, reason: str, answer: HttpError | HttpPiece | None) -> None:
        assert not self.has_ended, f"{self!r} ends twice"
        self.has_ended = True
        record = self.record
        record.finish_reason = reason
        record.num_output_tokens, record.engine_s = len(self.token_ids), self.engine_ns * 1e-9
        self._owner.close_stream(self, state)
        if answer is not None:
            self._end.send(answer)
            self._end.close()
