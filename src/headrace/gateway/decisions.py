"""Where the last requests went and why, by request id; and which placer an endpoint has. No I/O.

Must not know how a decision is made: `policy` does.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, assert_never

import msgspec

from headrace.policy.placement import LeastLoaded, Placement, Placer, RoundRobin
from headrace.policy.prefix_placement import PrefixPlacer

MAX_DECISIONS = 4096


class Decision(msgspec.Struct, frozen=True, gc=False):
    """One request's placement."""

    placement: Placement
    num_prompt_bytes: int
    decided_s: float
    """On the router's clock."""


class DecisionLog:
    """The newest decisions; the oldest is forgotten at the bound."""

    def __init__(self, max_decisions: int = MAX_DECISIONS) -> None:
        self._max_decisions = max_decisions
        self._decisions: OrderedDict[str, Decision] = OrderedDict()

    def __len__(self) -> int:
        return len(self._decisions)

    def __repr__(self) -> str:
        return f"<DecisionLog {len(self)}/{self._max_decisions}>"

    def add(self, request_id: str, decision: Decision) -> None:
        self._decisions[request_id] = decision
        if len(self._decisions) > self._max_decisions:
            self._decisions.popitem(last=False)

    def get(self, request_id: str) -> Decision | None:
        """Return a request's decision; None if it was not bound by us, or long ago."""
        return self._decisions.get(request_id)


def make_placer(kind: Literal["prefix", "least_loaded", "round_robin"]) -> Placer:
    """Return a new placer of the kind that an endpoint's rule names."""
    if kind == "prefix":
        return PrefixPlacer()
    if kind == "least_loaded":
        return LeastLoaded()
    if kind == "round_robin":
        return RoundRobin()
    assert_never(kind)
