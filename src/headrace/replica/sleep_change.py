"""A change of the engine's sleep that is under way, and the words for how deep it sleeps.

Owns who waits for the change. Must not know processes.
"""

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
    """Return the phase of an engine that sleeps so deep; empty: it is awake."""
    return f"asleep at level {level}" if level else ""
