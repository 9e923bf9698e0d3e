"""One stream that left its first engine: where it is, what it has been through, and its tokens' way home.

Owns the sum of its engines' time and the gap in it. Must not know where it could go.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol, runtime_checkable

import msgspec

from headrace.api.messages import GenerationRequest, KvPlace, StepOutput
from headrace.errors import RequestError
from headrace.observability.front_metrics import ResumeCause
from headrace.policy.resumption import SUSPECT_CRASHES, Stranded
from headrace.replica.engine_users import EngineStream


@runtime_checkable
class Continuable(EngineStream, Protocol):
    """A stream, and what it takes to continue it elsewhere."""

    request: GenerationRequest
    token_ids: list[int]
    engine_ns: int

    def on_resumed(self, host: str) -> None:
        """It goes on in the engine of the replica `host`; empty: in its own."""
        ...

    def fail(self, error: RequestError) -> None:
        """It cannot go on."""
        ...


@runtime_checkable
class Triable(Protocol):
    """A stream that may be suspected of breaking engines."""

    def is_on_trial(self) -> bool:
        """It is suspected, and has given no token in the engine that has it."""
        ...


def num_on_trial(streams: Iterable[EngineStream]) -> int:
    """Count the suspects among an engine's streams, guests included."""
    return sum([isinstance(stream, Triable) and stream.is_on_trial() for stream in streams])


class CarriedStreamOwner(Protocol):
    """Who decides where the stream goes."""

    def on_carried_lost(self, carried: CarriedStream, reason: str) -> None:
        """Its engine is gone."""
        ...

    def on_given_back(self, carried: CarriedStream, reason: str) -> None:
        """Its host did not take it, or no longer carries it."""
        ...

    def on_gap_end(self, seconds: float) -> None:
        """It gave its first token since it lost an engine."""
        ...

    def forget(self, carried: CarriedStream) -> None:
        """It ended."""
        ...


class CarriedStream:
    """A stream that left its first engine. `host`: the replica that has it; empty: its own; None: nobody."""

    __slots__ = (
        "_engine_ns_before",
        "_keeper",
        "avoided",
        "cause",
        "engine_id",
        "gap_from_s",
        "host",
        "kv_source",
        "lost_reason",
        "num_attempts",
        "num_crashes",
        "num_tokens",
        "path",
        "stranded_at_s",
        "stream",
        "stream_class",
        "waited_s",
    )

    def __init__(self, keeper: CarriedStreamOwner, stream: Continuable, stream_class: str) -> None:
        self._keeper = keeper
        self._engine_ns_before = 0
        self.stream = stream
        self.stream_class = stream_class
        self.host: str | None = ""
        self.path = ""
        self.kv_source: KvPlace | None = None
        """Where what the engine before computed of it can be read."""
        self.engine_id = stream.request.request_id
        """Its id in the engine that has it."""
        self.num_attempts = 0
        self.num_crashes = 0
        self.num_tokens = 0
        """When it was last stranded."""
        self.waited_s = 0.0
        self.stranded_at_s = 0.0
        self.gap_from_s: float | None = None
        """When it lost its engine, until its next token."""
        self.avoided: dict[str, float] = {}
        self.cause: ResumeCause | Literal["placed"] = "engine_lost"
        """Why it is where it is. placed: it begins there."""
        self.lost_reason = ""

    def __repr__(self) -> str:
        place = "nowhere" if self.host is None else self.host or "its own engine"
        return (
            f"CarriedStream({self.stream.request.request_id} at {place}, {len(self.stream.token_ids)} tokens)"
        )

    @property
    def is_catching_up(self) -> bool:
        """A sibling has it, and it has given no token there yet."""
        return bool(self.host) and self.gap_from_s is not None

    def is_on_trial(self) -> bool:
        """It is in an engine, suspected, and has given no token yet."""
        is_suspect = self.num_crashes >= SUSPECT_CRASHES and not self._has_news()
        return is_suspect and self.host is not None

    def as_stranded(self, now_s: float) -> Stranded:
        """Return what is known of it, as if it had no engine."""
        if self._has_news():
            return Stranded(self.stream_class, self.num_attempts)
        waited_s = self.waited_s + (now_s - self.stranded_at_s if self.host is None else 0.0)
        return Stranded(self.stream_class, self.num_attempts, self.num_crashes, waited_s, self.avoided)

    def strand(self, now_s: float) -> None:
        """It has no engine from now on."""
        self.host = None
        self.stranded_at_s = now_s
        self._engine_ns_before = self.stream.engine_ns
        if self.gap_from_s is None:
            self.gap_from_s = now_s
        if self._has_news():
            self.num_tokens = len(self.stream.token_ids)
            self.num_crashes, self.waited_s = 0, 0.0
            self.avoided.clear()

    def _has_news(self) -> bool:
        """Whether it gave a token since it was last stranded."""
        return len(self.stream.token_ids) > self.num_tokens

    # ---- what engines and hosts tell

    def on_output(self, output: StepOutput, now_s: float) -> bool:
        if output.token_ids and self.gap_from_s is not None:
            self._keeper.on_gap_end(now_s - self.gap_from_s)
            self.gap_from_s = None
        if self._engine_ns_before:
            output = msgspec.structs.replace(output, engine_ns=self._engine_ns_before + output.engine_ns)
        is_touched = self.stream.on_output(output, now_s)
        if output.finish_reason is not None:
            self._keeper.forget(self)
        return is_touched

    def flush(self) -> None:
        self.stream.flush()

    def on_engine_lost(self, reason: str) -> None:
        self._keeper.on_carried_lost(self, reason)

    def on_given_back(self, reason: str) -> None:
        self._keeper.on_given_back(self, reason)

    def on_broken(self) -> None:
        self._keeper.forget(self)
        self.stream.on_broken()
