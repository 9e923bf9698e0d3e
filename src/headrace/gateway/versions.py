"""How each generation of an endpoint's replicas fares with this router's requests: for rollouts. Pure.

Owns the counts, from the router's start. Must not know which generation is new, old or better.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from headrace.api.messages import EndpointRule, FinishedRequest, TerminalState, VersionDemand

MAX_VERSIONS = 16
"""Generations remembered per endpoint. The one that nothing was heard of for longest is forgotten."""


@dataclass(slots=True)
class VersionCounts:
    """One generation's totals. Seconds are sums over the finished requests."""

    finished: int = 0
    failed: int = 0
    slow_ttft: int = 0
    slow_itl: int = 0
    ttft_s: float = 0.0
    itl_s: float = 0.0


class VersionBook:
    """All generations of one endpoint."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, VersionCounts] = OrderedDict()

    def __repr__(self) -> str:
        return f"<VersionBook {len(self._counts)} generations>"

    def count(self, generation: str, finished: FinishedRequest, rule: EndpointRule) -> None:
        """Take a request's end as its front tells it. Aborted and refused ones say nothing of a version."""
        if finished.state is TerminalState.FAILED:
            self.count_failure(generation)
        if finished.state is not TerminalState.FINISHED:
            return
        counts = self._of(generation)
        itl_s = mean_itl_s(finished)
        counts.finished += 1
        counts.ttft_s += finished.ttft_s
        counts.itl_s += itl_s
        counts.slow_ttft += 0 < rule.ttft_s < finished.ttft_s
        counts.slow_itl += 0 < rule.itl_s < itl_s

    def count_failure(self, generation: str) -> None:
        """An accepted request was broken off by its replica."""
        self._of(generation).failed += 1

    def demands(self, endpoint: str) -> list[VersionDemand]:
        return [
            VersionDemand(
                endpoint=endpoint,
                generation=generation,
                finished=counts.finished,
                failed=counts.failed,
                slow_ttft=counts.slow_ttft,
                slow_itl=counts.slow_itl,
                ttft_s=counts.ttft_s,
                itl_s=counts.itl_s,
            )
            for generation, counts in self._counts.items()
        ]

    def _of(self, generation: str) -> VersionCounts:
        counts = self._counts.get(generation)
        if counts is None:
            counts = self._counts[generation] = VersionCounts()
            if len(self._counts) > MAX_VERSIONS:
                self._counts.popitem(last=False)
        self._counts.move_to_end(generation)
        return counts


def mean_itl_s(finished: FinishedRequest) -> float:
    """Return a request's mean time between its tokens, in seconds; 0 with fewer than two."""
    if finished.num_output_tokens < 2:
        return 0.0
    mean_s = (finished.total_s - finished.ttft_s) / (finished.num_output_tokens - 1)
    return mean_s if math.isfinite(mean_s) and mean_s > 0 else 0.0
