"""What a front's own engine is still needed for, as those see it who want it free: a departure, a sleep.

Must not know who asks, or where streams go.
"""

from __future__ import annotations

from collections.abc import Callable

from headrace.replica.engine_client import EngineClient
from headrace.replica.resumption import StreamKeeper


class EngineStreams:
    """What the own engine is still needed for, for whoever wants it free."""

    def __init__(self, engine: EngineClient, keeper: StreamKeeper, num_preparing: Callable[[], int]) -> None:
        """`num_preparing`: requests that will go to the engine in a moment."""
        self._engine = engine
        self._keeper = keeper
        self._num_preparing = num_preparing

    def num_in_engine(self) -> int:
        return self._num_preparing() + self._engine.num_requests + self._keeper.num_waiting

    def can_hand_over(self) -> bool:
        return self._keeper.has_room_elsewhere()

    def hand_over(self) -> int:
        return self._keeper.hand_over()
