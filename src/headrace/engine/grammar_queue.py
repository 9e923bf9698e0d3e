"""Requests that wait until their grammar is compiled, so that running requests do not wait with them.

Owns the thread that compiles. Must not know what a grammar says, nor scheduling.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from headrace.engine.constraint import Constraint
from headrace.engine.request import EngineRequest

COMPILE_LIMIT_S = 20.0
"""Longest time that a request waits for its grammar. Fronts let only such grammars through as compile in a
second, so this means an engine that has no time."""
_IDLE_POLL_S = 1.0
"""Pause between two looks whether the engine is idle, the first one included: the engine's first request, if
it comes at once, does not meet the preparation, nor does its start."""
_STACK_BYTES = 8 << 20
"""Twice what a front's grammar worker has: what is nested too deeply breaks there."""


class Compiler(Protocol):
    """What makes constraints (`engine.grammars.GrammarCompiler`). Used by one thread."""

    def constrain(self, grammar: str, token_ids: Sequence[int]) -> tuple[Constraint | None, str]:
        """Return a constraint that has taken `token_ids`, or None and why not."""
        ...

    def prepare(self) -> None:
        """Make what the first grammar would have to wait for. Does nothing the second time."""
        ...


@dataclass(slots=True)
class Settled:
    """Requests that stopped waiting."""

    ready: list[EngineRequest] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(request id, error)."""


class _Job(NamedTuple):
    arrival: int
    grammar: str
    token_ids: list[int]


class _Result(NamedTuple):
    arrival: int
    constraint: Constraint | None
    error: str


class _Waiting(NamedTuple):
    request: EngineRequest
    deadline_s: float


class GrammarQueue:
    """Bounded by the requests that the engine takes. All methods are for the engine's thread."""

    def __init__(self, make_compiler: Callable[[], Compiler]) -> None:
        """`make_compiler` is called at the first grammar, or before, in the compiling thread."""
        self._make_compiler = make_compiler
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[_Result] = queue.SimpleQueue()
        self._waiting: dict[str, _Waiting] = {}
        self._thread: threading.Thread | None = None
        self._may_prepare: Callable[[], bool] | None = None

    def __repr__(self) -> str:
        return f"<GrammarQueue {len(self._waiting)} waiting>"

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def prepare_when(self, is_idle: Callable[[], bool]) -> None:
        """Prepare for the first grammar at a moment when `is_idle`, which is asked in the compiling thread,
        unless that grammar comes first. While it prepares, steps may wait for up to 50 ms, twice."""
        assert self._thread is None, f"{self!r} has begun"
        self._may_prepare = is_idle
        self._thread = self._start_thread()

    def add(self, request: EngineRequest, grammar: str, now_s: float) -> None:
        """Make the constraint of `request`, with the tokens that it brings; `settle` gives it back."""
        if self._thread is None:
            self._thread = self._start_thread()
        self._waiting[request.request_id] = _Waiting(request, now_s + COMPILE_LIMIT_S)
        generated = request.token_ids[request.num_prompt_tokens :]
        self._jobs.put(_Job(request.arrival, grammar, generated))

    def remove(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        self._waiting.pop(request_id, None)

    def settle(self, now_s: float, wait_s: float = 0.0) -> Settled:
        """Return the requests that need not wait any longer. None yet: look again for up to `wait_s`."""
        settled = Settled()
        if not self._waiting:
            return settled
        by_arrival = {waiting.request.arrival: waiting.request for waiting in self._waiting.values()}
        for result in self._take_results(wait_s):
            request = by_arrival.get(result.arrival)
            if request is None:
                continue  # aborted; its id may belong to another request by now
            del self._waiting[request.request_id]
            if result.constraint is None:
                settled.failed.append((request.request_id, f"the grammar does not work: {result.error}"))
            else:
                request.constraint = result.constraint
                settled.ready.append(request)
        for request_id, waiting in list(self._waiting.items()):
            if now_s > waiting.deadline_s:
                del self._waiting[request_id]
                error = f"its grammar was not compiled within {COMPILE_LIMIT_S:g} s; send the request again"
                settled.failed.append((request_id, error))
        return settled

    def _take_results(self, wait_s: float) -> list[_Result]:
        results = []
        try:
            results.append(self._results.get(timeout=wait_s) if wait_s > 0 else self._results.get_nowait())
            while True:
                results.append(self._results.get_nowait())
        except queue.Empty:
            return results

    def _start_thread(self) -> threading.Thread:
        usual = threading.stack_size(_STACK_BYTES)
        # A daemon: nothing that it does is missed when the engine ends.
        thread = threading.Thread(target=self._run, name="grammars", daemon=True)
        thread.start()
        threading.stack_size(usual)
        return thread

    def _run(self) -> None:
        compiler: Compiler | None = None
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_POLL_S if self._may_prepare else None)
            except queue.Empty:
                if self._may_prepare is not None and self._may_prepare():
                    self._may_prepare = None
                    compiler = self._prepare()
                continue
            self._may_prepare = None
            try:
                compiler = compiler or self._make_compiler()
                constraint, error = compiler.constrain(job.grammar, job.token_ids)
            except Exception as failure:  # whatever it is, it must end this one request and no other
                constraint, error = None, f"{type(failure).__name__}: {failure}"
            self._results.put(_Result(job.arrival, constraint, error))

    def _prepare(self) -> Compiler | None:
        try:
            compiler = self._make_compiler()
            compiler.prepare()
        except Exception:  # whatever it is, the first grammar meets it again, and its request is told
            return None
        return compiler
