"""A loop that makes something so, compares again, and tries again: for whoever keeps HAProxy as it is wanted.

Must not know what is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

RETRY_PERIOD_S = 0.2
"""After a round that left something to do."""


async def repeat_rounds(
    run_round: Callable[[], Awaitable[bool]], wake: asyncio.Event, settled_period_s: float | None
) -> None:
    """Run rounds for ever: at once when `wake` is set, every settled_period_s (None: never) while nothing is
    left to do, soon otherwise. `run_round` returns whether nothing is left. Cancel it to stop."""
    while True:
        wake.clear()
        is_settled = await run_round()
        try:
            async with asyncio.timeout(settled_period_s if is_settled else RETRY_PERIOD_S):
                await wake.wait()
        except TimeoutError:
            pass
