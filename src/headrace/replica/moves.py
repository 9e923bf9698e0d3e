"""Where a durable front's requests went that are not where their router placed them: what routers are told.

Owns the list, and for how long an entry is told. Must not know why a request moved.
"""

from __future__ import annotations

TOLD_FOR_S = 3.0
"""A move is in every report for so long, since one may be lost. To a router that comes later it is no news:
it knows no request from before."""
MAX_TOLD = 2048
"""Moves in one report, the newest ones."""


class Moves:
    """The last place of each open request that moved."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, float]] = {}
        """Request -> replica, and when; the newest last."""

    def __repr__(self) -> str:
        return f"Moves({len(self._places)} requests)"

    def note(self, request_id: str, placed_at: str, replica_id: str, now_s: float) -> None:
        """A request is in the engine of a replica now. `placed_at`: where its router placed it."""
        before = self._places.pop(request_id, None)
        if before is not None or placed_at != replica_id:
            self._places[request_id] = replica_id, now_s

    def forget(self, request_id: str) -> None:
        """It ended, or one of its choices did: the others' next move is told again."""
        self._places.pop(request_id, None)

    def recent(self, now_s: float) -> dict[str, str]:
        """Return what is to be told now."""
        told: dict[str, str] = {}
        for request_id, (replica_id, moved_s) in reversed(self._places.items()):
            if now_s - moved_s > TOLD_FOR_S or len(told) >= MAX_TOLD:
                break
            told[request_id] = replica_id
        return told
