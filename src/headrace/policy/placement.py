"""Placement: which replica gets a request. Pure: observation in; decision, reason and scores out.

Least loaded for now; a later policy adds cached prefixes to the score.
Must not know addresses, servers or sockets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from headrace.policy.prompt import PromptHead

PlacementReason = Literal["least_loaded", "no_replica", "no_room"]


class ReplicaObservation(Protocol):
    """What placement sees of a replica. The router's own record has this shape, so nothing is copied."""

    @property
    def replica_id(self) -> str: ...

    @property
    def num_in_flight(self) -> int:
        """Requests that this router bound to it and that have not ended."""
        ...

    @property
    def num_open(self) -> int:
        """Open requests by its own last report: includes what other routers or HAProxy sent."""
        ...

    @property
    def max_open(self) -> int:
        """Most open requests that it takes."""
        ...

    @property
    def num_assigned(self) -> int:
        """Requests ever bound to it; breaks ties, so that idle replicas take turns."""
        ...


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes. `replica_id` is None when it must wait; `scores` are loads, lower is better."""

    replica_id: str | None
    reason: PlacementReason
    scores: dict[str, int]
    cached_ratio: float = 0.0
    """Part of the prompt that is expected in the replica's prefix cache, 0 to 1."""


class Placer(Protocol):
    """One endpoint's placement, with what it remembers of replicas."""

    def place(self, replicas: Sequence[ReplicaObservation], prompt: PromptHead, now_s: float) -> Placement:
        """Choose a replica for a request among those that may be chosen. Remembers nothing."""
        ...

    def bound(self, replica_id: str, prompt: PromptHead, now_s: float) -> None:
        """Note that a request was bound: its prefix is about to be cached there."""
        ...

    def forget(self, replica_id: str) -> None:
        """The replica is gone, and its cache with it."""
        ...


class LeastLoaded:
    """The placer that looks at load alone."""

    def place(self, replicas: Sequence[ReplicaObservation], prompt: PromptHead, now_s: float) -> Placement:
        return place(replicas)

    def bound(self, replica_id: str, prompt: PromptHead, now_s: float) -> None:
        pass

    def forget(self, replica_id: str) -> None:
        pass


def load_of(replica: ReplicaObservation) -> int:
    """Requests that count against max_open: the larger of what we sent and what it reports.

    The report is up to one period old and our own count misses what others sent; neither alone is safe.
    """
    return max(replica.num_in_flight, replica.num_open)


def place(replicas: Iterable[ReplicaObservation]) -> Placement:
    """Choose among replicas that may be chosen (ready, serving): the least loaded one with room."""
    scores: dict[str, int] = {}
    best: ReplicaObservation | None = None
    best_key = (0, 0)
    for replica in replicas:
        load = load_of(replica)
        scores[replica.replica_id] = load
        if load < replica.max_open and (best is None or (load, replica.num_assigned) < best_key):
            best, best_key = replica, (load, replica.num_assigned)
    if best is not None:
        return Placement(best.replica_id, "least_loaded", scores)
    return Placement(None, "no_room" if scores else "no_replica", scores)
