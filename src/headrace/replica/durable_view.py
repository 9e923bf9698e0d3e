"""What one durable front says of itself: its state, its load reports, its metrics.

Owns the words and the reports' numbers: of a replica's front they are `self_view`'s. Must not know how its
parts do their work, nor who asks.
"""

from __future__ import annotations

from typing import Protocol

from headrace.api.messages import FinishedRequest, LoadReport, ReplicaSpec, ReplicaState
from headrace.clock import Clock
from headrace.observability.front_metrics import FrontMetrics
from headrace.replica.moves import Moves
from headrace.replica.prefix_digest import PrefixNews
from headrace.replica.self_view import AnyParts, FrontTraits, FrontView
from headrace.replica.stream_class import text_class_of


class HostedStreams(Protocol):
    """Where this front's streams are: its stream keeper."""

    moves: Moves

    @property
    def num_hosted(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    def check_integrity(self) -> None: ...


class DurableParts(AnyParts, Protocol):
    """A durable front."""

    @property
    def keeper(self) -> HostedStreams: ...


class DurableView(FrontView[DurableParts]):
    """One durable front's words about itself."""

    def __init__(
        self,
        spec: ReplicaSpec,
        parts: DurableParts,
        metrics: FrontMetrics,
        clock: Clock,
        traits: FrontTraits,
    ) -> None:
        super().__init__(spec, parts, metrics, traits)
        self._clock = clock
        self.error = ""
        """Why it can never serve; empty: it can, or will."""

    def __repr__(self) -> str:
        return f"{self._spec.replica_id}, {self.state()}, {self._parts.ledger.num_open} open"

    def state(self) -> ReplicaState:
        """Return its own state: replicas may be there or not."""
        if self._parts.departure.has_begun:
            return "draining"
        if self.error:
            return "failed"
        return "ready" if self._parts.has_model() else "starting"

    def why_not_ready(self) -> str:
        """Say in a sentence why no request should come; empty: it may."""
        match self.state():
            case "draining":
                return "this front is leaving"
            case "failed":
                return self.error
            case "starting":
                return "the model's tokenizer is being loaded"
        return ""

    def update_metrics(self) -> FrontMetrics:
        """Return the metrics with their gauges set to now. Raises AssertionError if a request was lost."""
        metrics, parts = self._metrics, self._parts
        metrics.num_open = parts.ledger.num_open
        metrics.is_ready = self.state() == "ready"
        metrics.num_hosted, metrics.num_stranded = parts.keeper.num_hosted, parts.keeper.num_waiting
        self.check_integrity()
        return metrics

    def check_integrity(self) -> None:
        """Raise AssertionError unless every request is counted, and is where it is said to be."""
        self._parts.ledger.check_integrity()
        self._parts.keeper.check_integrity()

    # ---- reports

    def report_interval_s(self) -> float:
        """Return the longest time between two reports."""
        is_busy = self._parts.ledger.num_open > 0 or self._parts.departure.has_begun
        return self._traits.busy_interval_s if is_busy else self._spec.lease_s / 3

    def make_report(self, finished: list[FinishedRequest], _prefixes: PrefixNews) -> LoadReport:
        """Say how it is now, under the next number."""
        self._num_reports += 1
        spec, parts = self._spec, self._parts
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
            num_open=parts.ledger.num_open,
            max_open=spec.max_open,
            last_error=self.error,
            is_retryable=not self.error,
            finished=finished,
            generation=spec.generation,
            socket_path=self.socket_path,
            # By gateway alone: tenants' requests are counted where they are computed.
            open_by_gateway=parts.ledger.open_by_gateway(),
            speaks_h2=self._traits.speaks_h2,
            num_hosted=parts.keeper.num_hosted,
            leave_by_s=parts.departure.left_s(),
            gateway_id=spec.gateway_id,
            text_class=text_class_of(spec.engine),
            moved=parts.keeper.moves.recent(self._clock.now_s()),
        )
