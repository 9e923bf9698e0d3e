"""A change of an engine's sleep that is under way, and what is said of it. Must not know engines."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SleepChange:
    """A Sleep or Wake that the engine has not answered yet."""

    level: int
    done: asyncio.Future[str]

    def is_reached(self, level: int) -> bool:
        """Whether a load that tells of `level` was sent after the change."""
        return level >= self.level if self.level else level == 0


def sleep_phase(level: int) -> str:
    """Name the depth of sleep for users; nothing for an engine that is awake."""
    return f"asleep at level {level}" if level else ""
