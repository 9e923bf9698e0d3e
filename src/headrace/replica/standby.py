"""Puts the replica's engine to sleep and wakes it, in an order that loses no request.

Owns what depth is wanted, and the turn that gets there: say so, be released by the routers, sleep.
Open streams go to siblings, if there are any that take them. Must not know how an engine sleeps, or who
wants it to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

_log = logging.getLogger(__name__)
SleepLevel = int
"""0 awake, 1 without KV memory, 2 without weights, too."""
RELEASE_LIMIT_S = 5.0
"""Longest wait for the routers' word that they send nothing more, and then for what is open to end or go."""
_POLL_S = 0.01


class Sleeper(Protocol):
    """The engine, as seen from here."""

    @property
    def sleep_level(self) -> SleepLevel: ...

    async def set_sleep(self, level: SleepLevel) -> str:
        """Sleep or wake. Return why it could not be done; empty: it was."""
        ...


class OpenStreams(Protocol):
    """What the engine is still needed for."""

    def num_in_engine(self) -> int:
        """Requests that are in the engine, or about to be; guests included."""
        ...

    def can_hand_over(self) -> bool:
        """Whether a sibling could take a stream now."""
        ...

    def hand_over(self) -> int:
        """Move to siblings what they take; return how many streams are left."""
        ...


class Standby:
    """At most one turn runs; of several wishes the newest counts."""

    def __init__(
        self,
        engine: Sleeper,
        streams: OpenStreams,
        ask_release: Callable[[], None],
        is_released: Callable[[], bool],
        on_change: Callable[[], None],
    ) -> None:
        """`ask_release` tells every router that this replica takes no more; `is_released`: all have
        answered."""
        self._engine = engine
        self._streams = streams
        self._ask_release = ask_release
        self._is_released = is_released
        self._on_change = on_change
        self._wanted: SleepLevel = 0
        self._turn: asyncio.Task[None] | None = None
        self.is_leaving = False
        """Routers are asked to send no more, because the engine is about to sleep."""
        self.error = ""
        """Why the last wish was not carried out; empty: it was."""

    def __repr__(self) -> str:
        return f"Standby(level {self._engine.sleep_level}, {self._wanted} wanted)"

    def set_level(self, level: SleepLevel) -> None:
        """Wish for a depth of sleep; 0: wake. What comes of it is told by `on_change`."""
        self._wanted = level
        if self._turn is None or self._turn.done():
            self._turn = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End a turn that runs."""
        if self._turn is not None:
            self._turn.cancel()
            await asyncio.wait([self._turn])

    async def _run(self) -> None:
        while True:
            wanted = self._wanted
            self.error = await (self._fall_asleep(wanted) if wanted else self._engine.set_sleep(0))
            self.is_leaving = False
            if self.error:
                _log.warning("the engine stays at sleep level %d: %s", self._engine.sleep_level, self.error)
            self._on_change()
            if wanted == self._wanted:
                return

    async def _fall_asleep(self, level: SleepLevel) -> str:
        if self._engine.sleep_level == 0:
            if (problem := self._open_problem()) and not self._streams.can_hand_over():
                return problem
            self.is_leaving = True
            self._ask_release()
            self._on_change()
            await self._wait_until(self._is_released)
            await self._wait_until(self._is_free)
            if problem := self._open_problem():
                return problem
        return await self._engine.set_sleep(level)

    def _is_free(self) -> bool:
        """Whether nothing is left in the engine; siblings take what they can."""
        if self._streams.num_in_engine():
            self._streams.hand_over()
        return not self._streams.num_in_engine()

    def _open_problem(self) -> str:
        num_open = self._streams.num_in_engine()
        return f"it cannot sleep: {num_open} requests are open" if num_open else ""

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + RELEASE_LIMIT_S
        # Conditions of several owners, rarely waited for: polling is simpler than an event in each.
        while not condition() and loop.time() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
