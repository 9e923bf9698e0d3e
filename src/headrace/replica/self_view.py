"""What one replica says of itself: its state, its load reports, its metrics, and why it takes no guest.

Owns the words, put together from what its parts know at that moment, and the reports' numbers. Must not know
how the parts do their work, nor who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from headrace.api.messages import (
    EngineLoad,
    EngineReady,
    FinishedRequest,
    GenerationRequest,
    KvPlace,
    LeaveBy,
    LoadReport,
    ReplicaSpec,
    ReplicaState,
    SetSleep,
    Sibling,
    Siblings,
)
from headrace.api.openai import ModelCard
from headrace.observability.front_metrics import FrontMetrics
from headrace.policy.resumption import OwnEngine, guest_room
from headrace.replica.local_siblings import local_siblings
from headrace.replica.placed_guests import PlacedGuests
from headrace.replica.prefix_digest import PrefixNews
from headrace.replica.report import BUSY_INTERVAL_S
from headrace.replica.stream_class import stream_class_of, text_class_of


class EngineFacts(Protocol):
    """The engine, as its client knows it."""

    phase: str
    info: EngineReady | None
    load: EngineLoad | None
    num_restarts: int
    last_error: str
    is_retryable: bool

    @property
    def state(self) -> str: ...

    @property
    def pid(self) -> int: ...

    @property
    def kv_place(self) -> KvPlace | None: ...

    def why_not_ready(self) -> str: ...


class OpenRequests(Protocol):
    """The requests of this front: its ledger."""

    @property
    def num_open(self) -> int: ...

    def open_by_gateway(self) -> dict[str, int]: ...

    def open_by_tenant(self) -> dict[str, int]: ...

    def check_integrity(self) -> None: ...


class OwnStreams(Protocol):
    """Where this front's streams are: its stream keeper."""

    @property
    def num_hosted(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    def set_siblings(self, siblings: Sequence[Sibling]) -> None: ...

    def check_integrity(self) -> None: ...


class Guests(Protocol):
    """Siblings' streams in this engine."""

    placed: PlacedGuests
    """Those that routers placed here: they count as this replica's requests."""

    @property
    def num_guests(self) -> int: ...

    def check_integrity(self) -> None: ...


class Sleep(Protocol):
    """Whether the engine is to sleep."""

    is_leaving: bool
    error: str

    def set_level(self, level: int) -> None: ...


class Leaving(Protocol):
    """Whether this replica leaves, and by when."""

    @property
    def has_begun(self) -> bool: ...

    def left_s(self) -> float: ...


class KnownEngine(Protocol):
    """What is known of the engine or engines behind a front; None: nothing yet."""

    info: EngineReady | None


class AnyParts(Protocol):
    """A front of any kind: looked at when something is said, never kept."""

    @property
    def engine(self) -> KnownEngine: ...

    @property
    def ledger(self) -> OpenRequests: ...

    @property
    def departure(self) -> Leaving: ...

    def has_model(self) -> bool:
        """Whether text can become tokens and back."""
        ...


class ReplicaParts(AnyParts, Protocol):
    """A front of a replica."""

    @property
    def engine(self) -> EngineFacts: ...

    @property
    def keeper(self) -> OwnStreams: ...

    @property
    def guests(self) -> Guests: ...

    @property
    def standby(self) -> Sleep: ...

    def on_notice(self, left_s: float) -> None:
        """Its machine goes away in so many seconds: leave."""
        ...


def fingerprint_of(spec: ReplicaSpec) -> str:
    """Return the `system_fingerprint` of answers that engines of this kind compute."""
    return f"headrace-{spec.engine.kind}"


def headers_of(spec: ReplicaSpec) -> str:
    """Return the header lines by which each answer says whose it is, and whether its engine is simulated."""
    lines = f"x-headrace-replica: {spec.replica_id}\r\n"
    return lines + ("x-headrace-engine: simulated\r\n" if spec.engine.kind == "simulated" else "")


@dataclass(frozen=True, slots=True)
class FrontTraits:
    """What never changes in a front's life. created_s: wall clock."""

    pid: int
    created_s: int
    speaks_h2: bool = True
    busy_interval_s: float = BUSY_INTERVAL_S


PartsT = TypeVar("PartsT", bound=AnyParts)


class FrontView(Generic[PartsT]):
    """What fronts of all kinds say of themselves alike. The addresses are set as it begins to listen; empty:
    it does not."""

    def __init__(self, spec: ReplicaSpec, parts: PartsT, metrics: FrontMetrics, traits: FrontTraits) -> None:
        self._spec = spec
        self._parts = parts
        self._metrics = metrics
        self._traits = traits
        self._num_reports = 0
        self.address = ""
        self.socket_path = ""

    @property
    def next_sequence(self) -> int:
        """The number of the next report."""
        return self._num_reports + 1

    def model_card(self) -> ModelCard:
        """Return what is said of the model to clients."""
        info, spec = self._parts.engine.info, self._spec
        limit = None if info is None else info.max_context_tokens
        return ModelCard(spec.endpoint, "model", self._traits.created_s, "headrace", spec.engine.model, limit)


class SelfView(FrontView[ReplicaParts]):
    """One front's words about itself."""

    def __init__(
        self, spec: ReplicaSpec, parts: ReplicaParts, metrics: FrontMetrics, traits: FrontTraits
    ) -> None:
        super().__init__(spec, parts, metrics, traits)
        self.peer_path = ""

    def __repr__(self) -> str:
        where = self.address or "no address"
        return f"{self._spec.replica_id} at {where}, {self.state()}, {self._parts.ledger.num_open} open"

    # ---- its state

    def state(self) -> ReplicaState:
        parts = self._parts
        engine_state = parts.engine.state
        if parts.departure.has_begun:
            return "draining"
        if engine_state == "failed":
            return "failed"
        if engine_state == "asleep" or (parts.standby.is_leaving and engine_state == "ready"):
            return "standby"
        return "ready" if engine_state == "ready" and parts.has_model() else "starting"

    def why_not_ready(self) -> str:
        """Say in a sentence why no request should come; empty: it may."""
        state = self.state()
        if state == "ready":
            return ""
        if state == "draining":
            return "this replica is leaving"
        if state == "standby" and self._parts.standby.is_leaving:
            return "this replica goes on standby; use another one"
        if self._parts.engine.state == "ready":
            return "the model's tokenizer is being loaded"
        return self._parts.engine.why_not_ready()

    def own_engine(self) -> OwnEngine:
        """Return the own engine as a place for this front's streams."""
        parts = self._parts
        state = parts.engine.state
        return OwnEngine(
            "ready" if state == "ready" else "starting" if state == "starting" else "gone",
            self.stream_class(),
            is_leaving=parts.departure.has_begun or parts.standby.is_leaving,
        )

    def stream_class(self) -> str:
        """Return which engines' streams can go on here token for token; empty: it is not known yet."""
        info = self._parts.engine.info
        return "" if info is None else stream_class_of(self._spec.stream_class, info)

    def why_no_guest(self, guest: GenerationRequest) -> str:
        """Say why a sibling's stream is not taken; empty: it is."""
        if (state := self.state()) != "ready":
            return f"this replica is {state}"
        if guest.stream_class != self.stream_class():
            return "this engine computes differently"
        guests, placed = self._parts.guests, self._parts.guests.placed
        if placed.has(guest.placed):
            return ""  # another choice of a request that is here
        num_open = self._parts.ledger.num_open + placed.num_requests + guests.num_guests - placed.num_streams
        if num_open >= guest_room(self._spec.max_open):
            return f"{num_open} requests and guests are here, which is all that it takes"
        return ""

    # ---- reports

    def report_interval_s(self) -> float:
        """Return the longest time between two reports."""
        parts = self._parts
        is_busy = parts.ledger.num_open > 0 or parts.guests.num_guests > 0 or parts.departure.has_begun
        return self._traits.busy_interval_s if is_busy else self._spec.lease_s / 3

    def make_report(self, finished: list[FinishedRequest], prefixes: PrefixNews) -> LoadReport:
        """Say how it is now, under the next number."""
        self._num_reports += 1
        spec, parts, engine = self._spec, self._parts, self._parts.engine
        placed = parts.guests.placed
        return LoadReport(
            replica_id=spec.replica_id,
            endpoint=spec.endpoint,
            model=spec.engine.model,
            address=self.address,
            pid=self._traits.pid,
            node_address=spec.node_address,
            sequence=self._num_reports,
            lease_s=spec.lease_s,
            state=self.state(),
            phase=self._phase(),
            num_open=parts.ledger.num_open + placed.num_requests,
            max_open=spec.max_open,
            engine=engine.load,
            engine_info=engine.info,
            engine_pid=engine.pid,
            engine_restarts=engine.num_restarts,
            last_error=engine.last_error,
            is_retryable=engine.is_retryable,
            finished=finished,
            generation=spec.generation,
            socket_path=self.socket_path,
            open_by_gateway=_sum(parts.ledger.open_by_gateway(), placed.by_gateway()),
            open_by_tenant=_sum(parts.ledger.open_by_tenant(), placed.by_tenant()),
            prefix_epoch=prefixes.epoch,
            prefixes_added=prefixes.added,
            prefixes_removed=prefixes.removed,
            speaks_h2=self._traits.speaks_h2,
            peer_socket=self.peer_path,
            stream_class=self.stream_class(),
            num_guests=parts.guests.num_guests - placed.num_streams,
            num_hosted=parts.keeper.num_hosted,
            leave_by_s=parts.departure.left_s(),
            text_class=text_class_of(spec.engine),
            kv_place=engine.kv_place,
        )

    def _phase(self) -> str:
        # While it starts, fails or leaves, the engine's words say more than an old wish that came to nothing.
        error = self._parts.standby.error
        return error if error and self.state() in ("ready", "standby") else self._parts.engine.phase

    def follow(self, order: SetSleep | Siblings | LeaveBy) -> None:
        """Do what the controller said."""
        if isinstance(order, SetSleep):
            self._parts.standby.set_level(order.level)
        elif isinstance(order, LeaveBy):
            self._parts.on_notice(order.left_s)
        else:
            siblings = local_siblings(order.siblings, self._spec.run_dir, self._spec.replica_id)
            self._parts.keeper.set_siblings(siblings)

    # ---- what people and monitoring ask

    def update_metrics(self) -> FrontMetrics:
        """Return the metrics with their gauges set to now. Raises AssertionError if a request was lost."""
        metrics, parts = self._metrics, self._parts
        metrics.num_open = parts.ledger.num_open
        metrics.num_engine_restarts = parts.engine.num_restarts
        metrics.is_ready = self.state() == "ready"
        metrics.engine_load = parts.engine.load or EngineLoad()
        metrics.num_guests, metrics.num_hosted = parts.guests.num_guests, parts.keeper.num_hosted
        metrics.num_stranded = parts.keeper.num_waiting
        self.check_integrity()
        return metrics

    def check_integrity(self) -> None:
        """Raise AssertionError unless every request is counted, and is where it is said to be."""
        self._parts.ledger.check_integrity()
        self._parts.guests.check_integrity()
        self._parts.keeper.check_integrity()


def _sum(counts: dict[str, int], others: dict[str, int]) -> dict[str, int]:
    if not others:
        return counts
    return {name: counts.get(name, 0) + others.get(name, 0) for name in (counts | others)}
