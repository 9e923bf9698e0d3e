"""The one line on which everything happens: an event heap, true time, and the randomness of one seed.

Owns order and time. Events of the same moment run in the order in which they were made, so that a seed
always gives the same history. Must not know processes, messages or what an event does.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from random import Random

Call = Callable[[], object]


class Timer:
    """One event to come. `cancel` it, and it never happens."""

    __slots__ = ("call", "is_cancelled", "kind", "when_s")

    def __init__(self, when_s: float, call: Call | None, kind: str) -> None:
        self.when_s = when_s
        self.call = call
        self.kind = kind
        self.is_cancelled = False

    def cancel(self) -> None:
        self.call = None
        self.is_cancelled = True


class Timeline:
    """All events to come. `now_s` is true time, which no simulated process ever sees."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now_s = 0.0
        self.num_events = 0
        self.by_kind: Counter[str] = Counter()
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = 0

    def __repr__(self) -> str:
        return f"<Timeline at {self.now_s:.3f} s, {len(self._heap)} events to come>"

    def random(self, name: str) -> Random:
        """Return a source of its own for `name`: what one part draws changes nothing for the others, so that
        a history stays much the same when a fault is left out of it."""
        return Random(f"{self.seed}/{name}")  # noqa: S311, not a secret

    def at(self, when_s: float, call: Call, kind: str) -> Timer:
        """Let `call` happen at `when_s`, or now if that is past."""
        timer = Timer(when_s, call, kind)
        self.put(timer, when_s)
        return timer

    def put(self, timer: Timer, when_s: float) -> None:
        """Let `timer` happen at `when_s`, or now if that is past."""
        now_s = self.now_s
        timer.when_s = when_s if when_s > now_s else now_s
        self._order = order = self._order + 1
        heapq.heappush(self._heap, (timer.when_s, order, timer))

    def after(self, delay_s: float, call: Call, kind: str) -> Timer:
        return self.at(self.now_s + delay_s, call, kind)

    def run_next(self, end_s: float) -> bool:
        """Run the next event up to `end_s`. False: there is none, and it is `end_s` now."""
        heap = self._heap
        while heap and heap[0][0] <= end_s:
            when_s, _, timer = heapq.heappop(heap)
            call = timer.call
            if call is None:
                continue
            self.now_s = when_s
            self.num_events += 1
            self.by_kind[timer.kind] += 1
            call()
            return True
        self.now_s = max(self.now_s, end_s)
        return False
