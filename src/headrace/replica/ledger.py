"""Every generation request from arrival to its one terminal state.

Owns the open requests and their ends: counted, logged, reported, exactly once each.
Must not know HTTP, text or engines.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from headrace.api.messages import FinishedRequest, TerminalState, gateway_of
from headrace.clock import Clock
from headrace.observability.front_metrics import FrontMetrics
from headrace.observability.line_log import LineLog


@dataclass(slots=True, eq=False)
class RequestRecord:
    """What is known of one request; filled in as it goes. Seconds are on the front's clock."""

    request_id: str
    client_request_id: str
    path: str
    arrived_s: float
    tenant: str = ""
    is_stream: bool = False
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    engine_s: float = 0.0
    """Engine time measured for it, all its choices together."""
    first_token_s: float = 0.0
    """0: none came."""
    finish_reason: str = ""
    status: int = 0
    """The HTTP status that was sent; 0: none."""
    error: str = ""
    num_resumptions: int = 0
    """Times that one of its streams went on in another engine, or in its own after a restart."""
    hosts: list[str] = field(default_factory=list)
    """Siblings that continued it, in order; bounded by attempts and drains."""


class LedgerListener(Protocol):
    """Who wants to know at once."""

    def on_busy(self) -> None:
        """The first request is open."""
        ...

    def on_end(self, finished: FinishedRequest) -> None:
        """A request reached its terminal state."""
        ...


class Ledger:
    """All requests of one front."""

    def __init__(
        self,
        metrics: FrontMetrics,
        log: LineLog,
        clock: Clock,
        listener: LedgerListener,
    ) -> None:
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._listener = listener
        self._open: set[RequestRecord] = set()
        self._open_by_gateway: Counter[str] = Counter()
        self._open_by_tenant: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"Ledger({len(self._open)} open of {self._metrics.num_accepted} accepted)"

    @property
    def num_open(self) -> int:
        return len(self._open)

    def open_by_gateway(self) -> dict[str, int]:
        """Return how many open requests each gateway sent; of others under the empty name."""
        return dict(self._open_by_gateway)

    def open_by_tenant(self) -> dict[str, int]:
        """Return how many open requests each tenant has."""
        return dict(self._open_by_tenant)

    def open(self, record: RequestRecord) -> None:
        """Take a request that arrived."""
        self._open.add(record)
        self._open_by_gateway[gateway_of(record.request_id)] += 1
        self._open_by_tenant[record.tenant] += 1
        self._metrics.num_accepted += 1
        if len(self._open) == 1:
            self._listener.on_busy()

    def close(self, record: RequestRecord, state: TerminalState) -> None:
        """End a request. It must be open: there is no second end."""
        assert record in self._open, f"request {record.request_id} ended twice (now {state})"
        self._open.remove(record)
        _count_down(self._open_by_gateway, gateway_of(record.request_id))
        _count_down(self._open_by_tenant, record.tenant)
        metrics, now_s = self._metrics, self._clock.now_s()
        metrics.num_ended[state] += 1
        metrics.num_prompt_tokens += record.num_prompt_tokens
        metrics.num_cached_tokens += record.num_cached_tokens
        metrics.engine_s += record.engine_s
        total_s = now_s - record.arrived_s
        ttft_s = record.first_token_s - record.arrived_s if record.first_token_s else 0.0
        if state is TerminalState.FINISHED:
            metrics.e2e_latency.observe(total_s)
        self._log.write(
            {
                "time": round(self._clock.wall_s(), 3),
                "request_id": record.request_id,
                "client_request_id": record.client_request_id,
                "tenant": record.tenant,
                "path": record.path,
                "status": record.status,
                "state": state.value,
                "finish_reason": record.finish_reason,
                "stream": record.is_stream,
                "prompt_tokens": record.num_prompt_tokens,
                "cached_tokens": record.num_cached_tokens,
                "output_tokens": record.num_output_tokens,
                "ttft_s": round(ttft_s, 6),
                "total_s": round(total_s, 6),
                "engine_ms": round(record.engine_s * 1000, 6),
                "error": record.error,
                "resumptions": record.num_resumptions,
                "hosts": record.hosts,
            }
        )
        self._listener.on_end(
            FinishedRequest(
                record.request_id,
                state,
                record.finish_reason,
                record.tenant,
                record.num_prompt_tokens,
                record.num_cached_tokens,
                record.num_output_tokens,
                ttft_s,
                total_s,
                record.engine_s,
                record.num_resumptions,
                record.hosts,
            )
        )

    def check_integrity(self) -> None:
        """Raise AssertionError, showing the sum, unless accepted = ended + open."""
        ended = {state.value: count for state, count in self._metrics.num_ended.items()}
        accepted, num_open = self._metrics.num_accepted, len(self._open)
        assert accepted == sum(ended.values()) + num_open, f"{accepted} accepted != {ended} + {num_open} open"
        for counts in (self._open_by_gateway, self._open_by_tenant):
            assert num_open == counts.total(), f"{num_open} open != {dict(counts)}"


def _count_down(counts: Counter[str], name: str) -> None:
    """Keep no zeros: gateways and tenants come and go."""
    if counts[name] > 1:
        counts[name] -= 1
    else:
        del counts[name]
