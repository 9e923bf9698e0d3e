"""How a replica leaves: released by its routers, its open streams handed over, its engine free, in time.

Owns the order and its time limits. Must not know what serves requests, or how streams move.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Protocol

from headrace.clock import Clock
from headrace.replica.standby import OpenStreams

RELEASE_LIMIT_S = 5.0
"""Longest wait for routers to release a draining replica."""
LAST_MOMENTS_S = 2.0
"""Before its machine goes, a replica ends what is left: telling clients and reporting take time."""
_NO_ROUTER_WAIT_S = 0.2
_POLL_S = 0.01


class Routers(Protocol):
    """Who sends requests here."""

    def has_router(self) -> bool: ...

    def is_released(self) -> bool:
        """Whether every connected router will send no more requests."""
        ...

    def notify(self) -> None:
        """Report at once."""
        ...


class Departure:
    """One replica's leaving. Waits in turn: `wait_for_release`, `free_engine`, `wait_for_streams`."""

    def __init__(
        self, clock: Clock, routers: Routers, streams: OpenStreams, handover_after_s: float, grace_s: float
    ) -> None:
        self._clock = clock
        self._routers = routers
        self._streams = streams
        self._handover_after_s = handover_after_s
        self._grace_s = grace_s
        self._began_s = math.inf
        self._released_s = math.inf
        self.leave_by_s = math.inf
        """When the machine goes away, on the clock; infinite: it is not known to. May change at any time."""

    def __repr__(self) -> str:
        return f"Departure({'under way' if self.has_begun else 'not begun'}, by {self.leave_by_s:g} s)"

    @property
    def has_begun(self) -> bool:
        return self._began_s < math.inf

    def left_s(self) -> float:
        """Return the seconds until the machine goes away, as reports tell them: negative without notice."""
        return -1.0 if self.leave_by_s == math.inf else max(0.0, self.leave_by_s - self._clock.now_s())

    async def wait_for_release(self) -> None:
        """Say that this replica leaves; wait until routers send it nothing more."""
        self._began_s = self._clock.now_s()
        self._routers.notify()
        await self._wait_until(self._is_released, lambda: self._began_s + self._soon(RELEASE_LIMIT_S))
        self._released_s = self._clock.now_s()

    async def free_engine(self) -> bool:
        """Wait for open streams to end, hand over what then is left, as siblings take it. True: the engine is
        needed no more. False: the time is over."""
        handover_s = self._released_s + self._soon(self._handover_after_s)
        await self._wait_until(self._is_free, lambda: min(handover_s, self._end_s()))
        await self._wait_until(self._is_handed_over, self._end_s)
        return self._is_free()

    async def wait_for_streams(self, num_open: Callable[[], int]) -> None:
        """Wait for the requests that siblings finish."""
        await self._wait_until(lambda: num_open() == 0, self._end_s)

    async def wait_for_last(self, condition: Callable[[], bool], limit_s: float) -> None:
        """Wait for what is left to do once the grace is over, for limit_s at most."""
        end_s = self._clock.now_s() + limit_s
        await self._wait_until(condition, lambda: end_s)

    def _end_s(self) -> float:
        return min(self._released_s + self._grace_s, self.leave_by_s - LAST_MOMENTS_S)

    def _soon(self, limit_s: float) -> float:
        """Of the time that is left, a wait gets a third at most."""
        return min(limit_s, max(0.0, (self.leave_by_s - LAST_MOMENTS_S - self._clock.now_s()) / 3))

    def _is_handed_over(self) -> bool:
        if not self._is_free():
            self._streams.hand_over()
        return self._is_free()

    def _is_free(self) -> bool:
        return self._streams.num_in_engine() == 0

    def _is_released(self) -> bool:
        if self._routers.has_router():
            return self._routers.is_released()
        return self._clock.now_s() - self._began_s > _NO_ROUTER_WAIT_S

    async def _wait_until(self, condition: Callable[[], bool], by_s: Callable[[], float]) -> None:
        # Conditions of several owners, at the end only: polling is simpler than an event in each.
        while not condition() and self._clock.now_s() < by_s():  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
