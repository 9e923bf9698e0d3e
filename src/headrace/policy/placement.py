"""Placement: which replica gets a request. Pure: observation in; decision, reason and scores out.

Owns the seam, when a replica has room, and the two placers that look at load or turns alone
(`prefix_placement` has the one that weighs cached prefixes). Must not know addresses, servers or sockets.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from headrace.policy.prompt import PromptHead

PlacementReason = Literal[
    "prefix", "session", "spread", "least_loaded", "round_robin", "no_replica", "no_room"
]
"""prefix, session: for what it has cached. spread: others have more cached and are busier. The last two mean:
wait."""
MAX_EXPLANATION_BYTES = 1024
_LOOKAHEAD_DIVISOR = 16


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
        """Open requests by its own last report, as far as they may be this router's."""
        ...

    @property
    def num_open_elsewhere(self) -> int:
        """Open requests by its own last report that came through other gateways, or through none."""
        ...

    @property
    def max_open(self) -> int:
        """Most open requests that it takes."""
        ...

    @property
    def max_running(self) -> int:
        """Most requests that its engine computes together; 0: unknown."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests that wait in its engine."""
        ...

    @property
    def num_free_tokens(self) -> int:
        """Tokens for which its KV memory has room, cached blocks counted as room; -1: unknown."""
        ...

    @property
    def prefill_token_s(self) -> float:
        """Measured engine time per uncached prompt token; 0: not measured yet."""
        ...

    @property
    def decode_token_s(self) -> float:
        """The same per output token, with its part of the step's fixed cost."""
        ...

    @property
    def step_per_request_s(self) -> float:
        """Measured time by which each decoding request lengthens a step of its engine."""
        ...

    @property
    def num_uncomputed_tokens(self) -> int:
        """Prompt tokens that its engine has yet to compute, by its last report."""
        ...

    @property
    def num_assigned(self) -> int:
        """Requests ever bound to it; breaks ties, so that idle replicas take turns."""
        ...


class Placement(msgspec.Struct, frozen=True, gc=False):
    """Where a request goes, and why. `replica_id` is None when it must wait."""

    replica_id: str | None
    reason: PlacementReason
    scores: dict[str, float] = {}
    """Of every replica, lower is better: expected seconds, or open requests where no cost is measured.
    Replicas without room are not scored by cost."""
    cached_ratio: float = 0.0
    """Part of the prompt that is expected in the replica's prefix cache, 0 to 1."""
    prefill_s: float = 0.0
    """Engine time expected for the rest of the prompt; 0 where no cost is measured."""


class CacheChanges(NamedTuple):
    """What a report says of a prefix cache."""

    epoch: Hashable
    """Another one than before: the cache began anew, empty."""
    added: Sequence[int]
    removed: Sequence[int]


class Placer(Protocol):
    """One endpoint's placement, with what it remembers of replicas."""

    def place(self, replicas: Sequence[ReplicaObservation], prompt: PromptHead, now_s: float) -> Placement:
        """Choose a replica for a request among those that may be chosen. Remembers nothing of the request.

        The same `replicas` object as before says that nothing of them changed but what the router itself
        counts (num_in_flight, num_assigned): what follows from the rest need not be computed again.
        """
        ...

    def bound(self, placement: Placement, prompt: PromptHead, now_s: float) -> None:
        """Note that a request was bound as `placement` says: its prefix is about to be cached there."""
        ...

    def report(self, replica: ReplicaObservation, changes: CacheChanges, now_s: float) -> None:
        """Take a replica's report: its figures and the changes of its prefix cache."""
        ...

    def finished(self, num_bytes: int, num_tokens: int) -> None:
        """Learn from a finished request how many tokens a prompt of `num_bytes` has."""
        ...

    def forget(self, replica_id: str) -> None:
        """The replica is gone, and its cache with it."""
        ...


class _Forgetful:
    """What placers have in common that remember nothing."""

    def bound(self, placement: Placement, prompt: PromptHead, now_s: float) -> None:
        pass

    def report(self, replica: ReplicaObservation, changes: CacheChanges, now_s: float) -> None:
        pass

    def finished(self, num_bytes: int, num_tokens: int) -> None:
        pass

    def forget(self, replica_id: str) -> None:
        pass


class LeastLoaded(_Forgetful):
    """The replica with the fewest open requests."""

    def place(self, replicas: Sequence[ReplicaObservation], prompt: PromptHead, now_s: float) -> Placement:
        scores = {replica.replica_id: float(load_of(replica)) for replica in replicas}
        best: ReplicaObservation | None = None
        best_key = (0.0, 0)
        for replica in replicas:
            load = scores[replica.replica_id]
            key = (load, replica.num_assigned)
            if (best is None or key < best_key) and has_room(replica, int(load)):
                best, best_key = replica, key
        if best is None:
            return must_wait(scores)
        return Placement(best.replica_id, "least_loaded", scores)


class RoundRobin(_Forgetful):
    """Each replica in its turn; one without room is passed over."""

    def __init__(self) -> None:
        self._last = ""

    def place(self, replicas: Sequence[ReplicaObservation], prompt: PromptHead, now_s: float) -> Placement:
        scores = {replica.replica_id: float(load_of(replica)) for replica in replicas}
        able = sorted(replica.replica_id for replica in replicas if has_room(replica, load_of(replica)))
        if not able:
            return must_wait(scores)
        after = [replica_id for replica_id in able if replica_id > self._last]
        return Placement((after or able)[0], "round_robin", scores)

    def bound(self, placement: Placement, prompt: PromptHead, now_s: float) -> None:
        self._last = placement.replica_id or ""


def must_wait(scores: dict[str, float]) -> Placement:
    """Return the placement of a request that finds no room."""
    return Placement(None, "no_room" if scores else "no_replica", scores)


def load_of(replica: ReplicaObservation) -> int:
    """Open requests: the larger of what we sent and what it reports of us, and what others sent.

    The report is up to one period old and our own count misses what a router before us sent; neither alone
    is safe.
    """
    return max(replica.num_in_flight, replica.num_open) + replica.num_open_elsewhere


def has_room(replica: ReplicaObservation, load: int) -> bool:
    """Whether a replica with `load` open requests may be given another now.

    A request that would wait in the engine waits in the router instead, where the fair queue decides and
    another replica may become free first; a few are sent ahead, so that the engine never runs dry between two
    reports.
    """
    return load < most_open(replica)


def most_open(replica: ReplicaObservation) -> int:
    """Return with how many open requests a replica has no room for another, until its next report."""
    max_running = replica.max_running
    if not max_running:
        return replica.max_open
    lookahead = max_running // _LOOKAHEAD_DIVISOR or 1
    if replica.num_waiting > lookahead:
        return 0
    return min(replica.max_open, max_running + lookahead)


def explain(placement: Placement) -> str:
    """Return a decision as one line of ASCII, at most MAX_EXPLANATION_BYTES; the best alternatives first."""
    chosen = placement.replica_id or "none"
    score = placement.scores.get(chosen)
    line = f"replica={chosen}; reason={placement.reason}; cached={placement.cached_ratio:.2f}"
    if score is not None:
        line += f"; score={score:.6g}"
    others = sorted((score, name) for name, score in placement.scores.items() if name != chosen)
    separator = "; alternatives="
    for score, name in others:
        part = f"{separator}{name}:{score:.6g}"
        if len(line) + len(part) > MAX_EXPLANATION_BYTES:
            break
        line += part
        separator = ","
    return line.encode("ascii", "replace").decode()
