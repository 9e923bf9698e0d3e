"""Every request's line: what router, HAProxy and front each know of it, joined, whoever speaks last.

Owns what is known of requests that have not been written yet, bounded in number and in how long it waits.
Records are joined in batches (`hand_out`): not while a request waits for its decision. No I/O: `now_s` comes
in, records go out through a callback. Must not decide, and must not know SPOE or sockets.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable

import msgspec

from headrace.api.messages import FinishedRequest, TerminalState, gateway_of
from headrace.clock import Clock
from headrace.gateway.completions import Completion, classify
from headrace.gateway.dispatcher import Bound, Refused
from headrace.gateway.names import decode_name
from headrace.observability.request_record import RequestRecord

PARTS_LIMIT_S = 2.0
"""After a request's end, the others' words on it are expected for so long; then it is written without."""
MAX_EARLY = 1024
"""Ends told by fronts of requests that the router does not know: it was away then."""
_GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions")


class _Parts(msgspec.Struct, gc=False):
    """What is known of one request."""

    endpoint: str = ""
    model: str = ""
    """Of the names under which the endpoint is served, the one that was asked for."""
    tenant: str = ""
    path: str = ""
    arrived_s: float | None = None
    arrived_wall_s: float = 0.0
    answered_s: float | None = None
    parked_ms: int = 0
    """From its arrival to the pass that HAProxy's line is of."""
    bound: Bound | None = None
    code: str = ""
    state: TerminalState | None = None
    completion: Completion | None = None
    finished: FinishedRequest | None = None
    due_s: float = math.inf
    """When it is written, whatever is missing."""


class RequestRecorder:
    """Joins and hands out; the dispatcher's RequestListener."""

    def __init__(self, gateway_id: str, clock: Clock, on_record: Callable[[RequestRecord], None]) -> None:
        self._gateway_id = gateway_id
        self._clock = clock
        self._on_record = on_record
        self._open: dict[str, _Parts] = {}
        self._whole: deque[tuple[str, _Parts, float]] = deque()
        """What is to be joined, and the wall-clock time of its last part."""
        self._due: deque[tuple[float, str]] = deque()
        """No part of a request itself: most are written long before."""
        self._early: OrderedDict[str, FinishedRequest] = OrderedDict()
        self.num_incomplete = 0
        """Records that were written without a part that should have come."""

    def __repr__(self) -> str:
        return f"<RequestRecorder open={len(self._open)} due={len(self._due)} whole={len(self._whole)}>"

    def arrived(
        self, request_id: str, endpoint: str, tenant: str, path: str, now_s: float, model: str = ""
    ) -> None:
        """HAProxy announced a request that has not ended: of one that has, the line may be written. model:
        the adapter that it asks for; empty: the endpoint's model."""
        if request_id not in self._open:
            wall_s = self._clock.wall_s()
            self._open[request_id] = _Parts(endpoint, model or endpoint, tenant, path, now_s, wall_s)
        else:
            self.parked(request_id, now_s)

    def answered(self, request_id: str, decision: Bound | Refused, now_s: float) -> None:
        """The router decided."""
        parts = self._open.get(request_id)
        if parts is None:
            return
        parts.answered_s = now_s
        if isinstance(decision, Bound):
            parts.bound = decision
        else:
            parts.code = decision.code
            self._set_due(request_id, parts, now_s)

    def parked(self, request_id: str, now_s: float) -> None:
        """The request goes on waiting in the relay: HAProxy's line will be of its second pass."""
        parts = self._open.get(request_id)
        if parts is not None and parts.arrived_s is not None:
            parts.parked_ms = int((now_s - parts.arrived_s) * 1000)

    def ended(self, request_id: str, endpoint: str, state: TerminalState) -> None:
        """The dispatcher settled a request's state."""
        parts = self._open.get(request_id)
        if parts is None:
            parts = self._open[request_id] = _Parts(endpoint, finished=self._early.pop(request_id, None))
        parts.state = state
        self._set_due(request_id, parts, self._clock.now_s())

    def completed(self, completion: Completion) -> None:
        """HAProxy's line, after the dispatcher took it. One of a request that was written, or a second one,
        changes nothing."""
        parts = self._open.get(completion.id)
        if parts is None or parts.completion is not None:
            return
        parts.completion = completion
        if parts.state is None:  # the router refused to know it, so that the dispatcher did not count it
            parts.state = classify(completion)
        if _has_last_word(parts) or not _is_told_by_front(parts):
            self._write(completion.id, parts)

    def front_finished(self, finished: FinishedRequest) -> None:
        """A front's word. Fronts tell all routers of all requests."""
        request_id = finished.request_id
        parts = self._open.get(request_id)
        if parts is None:
            if gateway_of(request_id) == self._gateway_id:
                early = self._early.get(request_id)
                if early is None or _is_better(finished, early):
                    self._early[request_id] = finished
                if len(self._early) > MAX_EARLY:
                    self._early.popitem(last=False)
        elif parts.finished is None or _is_better(finished, parts.finished):
            parts.finished = finished
            if parts.completion is not None and _has_last_word(parts):
                self._write(request_id, parts)

    def answered_by_haproxy(self, completion: Completion) -> None:
        """A request that HAProxy refused before it had an endpoint."""
        self._write(completion.id, _Parts(state=classify(completion), completion=completion))

    def hand_out(self, max_records: int | None = None) -> bool:
        """Join what is whole and hand it out, the first ones first. True if some are left."""
        whole = self._whole
        for _ in range(len(whole) if max_records is None else min(max_records, len(whole))):
            request_id, parts, wall_s = whole.popleft()
            self._on_record(_join(self._gateway_id, request_id, parts, wall_s))
        return bool(whole)

    def tick(self, now_s: float) -> None:
        """Take what has waited long enough for whole."""
        while self._due and self._due[0][0] <= now_s:
            request_id = self._due.popleft()[1]
            parts = self._open.get(request_id)
            if parts is not None and parts.due_s <= now_s:
                self.num_incomplete += parts.completion is None or _is_told_by_front(parts)
                self._write(request_id, parts)

    def flush(self) -> None:
        """Hand out everything that has ended: the router stops."""
        for request_id, parts in list(self._open.items()):
            if parts.state is not None:
                self._write(request_id, parts)
        self.hand_out()

    def _set_due(self, request_id: str, parts: _Parts, now_s: float) -> None:
        parts.due_s = now_s + PARTS_LIMIT_S
        self._due.append((parts.due_s, request_id))

    def _write(self, request_id: str, parts: _Parts) -> None:
        self._open.pop(request_id, None)
        self._whole.append((request_id, parts, self._clock.wall_s()))


def _is_told_by_front(parts: _Parts) -> bool:
    """Whether the front's word is to be expected: it generated, or tried to."""
    line = parts.completion
    if line is None or line.connect_ms < 0 or line.path not in _GENERATION_PATHS:
        return False
    return line.status not in (502, 503, 504)


def _is_better(word: FinishedRequest, known: FinishedRequest) -> bool:
    """Whether `word` is of a later try: HAProxy sends what was refused or broken off elsewhere."""
    is_finished, was_finished = (each.state is TerminalState.FINISHED for each in (word, known))
    return is_finished > was_finished or (
        is_finished == was_finished and word.num_output_tokens > known.num_output_tokens
    )


def _has_last_word(parts: _Parts) -> bool:
    """Whether no front will say more: not if HAProxy saw a whole answer, and who spoke broke its own off."""
    front, line = parts.finished, parts.completion
    if front is None or line is None:
        return False
    return front.state is TerminalState.FINISHED or classify(line) is not TerminalState.FINISHED


def _word_on_answer(parts: _Parts) -> FinishedRequest | None:
    """Return what is known of the answer that HAProxy saw; nothing where only an earlier try was heard of."""
    front, line = parts.finished, parts.completion
    if front is None or line is None or classify(line) is not TerminalState.FINISHED:
        return front
    is_other = front.state in (TerminalState.REFUSED, TerminalState.ABORTED)
    is_other |= front.state is TerminalState.FAILED and parts.state is TerminalState.FINISHED
    return None if is_other else front


_NO_LINE = Completion("", status=-1, bytes_in=-1, bytes_out=-1)


def _join(gateway_id: str, request_id: str, parts: _Parts, wall_s: float) -> RequestRecord:
    """Return the record."""
    line, front, bound = parts.completion or _NO_LINE, _word_on_answer(parts), parts.bound
    held_ms = ttft_ms = head_ms = first_ms = None
    if parts.answered_s is not None and parts.arrived_s is not None:
        held_ms = _milliseconds(parts.answered_s - parts.arrived_s)
    if line.connect_ms >= 0:  # it reached a server
        head_ms = parts.parked_ms + line.request_ms + line.wait_ms + line.connect_ms
        if front is not None and front.ttft_s > 0:
            ttft_ms = _milliseconds(head_ms / 1000 + front.ttft_s)
        if line.first_byte_ms >= 0:
            first_ms = head_ms + line.first_byte_ms
    return RequestRecord(
        id=request_id,
        client_id=_text(line.client_id),
        gateway=gateway_id,
        endpoint=parts.endpoint,
        model=parts.model,
        tenant=parts.tenant or _text(line.tenant),
        path=parts.path or _text(line.path),
        arrived_s=int((parts.arrived_wall_s or wall_s - max(line.total_ms, 0) / 1000) * 1000) / 1000,
        held_ms=held_ms,
        replica=_replica(line, bound),
        placement=bound.reason if bound is not None else "",
        cached_ratio=bound.cached_ratio if bound is not None else None,
        retries=0 if line.retries == "0" else _retries(line.retries),
        first_byte_ms=first_ms,
        ttft_ms=ttft_ms,
        total_ms=parts.parked_ms + line.total_ms if line.total_ms >= 0 else None,
        status=line.status if line.status > 0 else None,
        state=(parts.state or TerminalState.FAILED).value,
        code=parts.code if parts.state is TerminalState.REFUSED else "",
        finish_reason=front.finish_reason if front is not None else "",
        prompt_tokens=front.num_prompt_tokens if front is not None else None,
        cached_tokens=front.num_cached_tokens if front is not None else None,
        output_tokens=front.num_output_tokens if front is not None else None,
        engine_ms=round(front.engine_s * 1000, 6) if front is not None else None,
        bytes_in=line.bytes_in if line.bytes_in >= 0 else None,
        bytes_out=line.bytes_out if line.bytes_out >= 0 else None,
        resumptions=front.num_resumptions if front is not None else None,
        hosts=front.hosts if front is not None else None,
    )


def _milliseconds(seconds: float) -> float:
    """Return milliseconds with three digits: an eighth of the time that `round` takes."""
    return int(seconds * 1e6 + 0.5) / 1000


def _replica(line: Completion, bound: Bound | None) -> str:
    """The one that answered: HAProxy may have gone on to another one than the router chose."""
    if bound is not None and line.server in (bound.server_name, ""):
        return bound.replica_id
    return "" if line.server.startswith("<") else decode_name(line.server)


def _text(value: str) -> str:
    """HAProxy writes `-` for what is not there."""
    return "" if value == "-" else value


def _retries(text: str) -> int:
    """HAProxy writes `+2` when the last of two retries went to another server."""
    text = text.lstrip("+")
    return int(text) if text.isdigit() else 0
