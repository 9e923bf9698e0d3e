"""The largest number of the last seconds, in bounded memory. Pure."""

from __future__ import annotations

import math
from collections import deque

_GRAIN = 32
"""Numbers are remembered in steps of 1/32, upwards: that bounds how many there are."""


class Largest:
    """The largest of what was added within a window. `now_s` never goes back."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque()
        """Times and values, each larger than all after it: the first is the largest."""

    def add(self, value: float, now_s: float, window_s: float) -> float:
        """Take a finite value and return the largest of the last `window_s`."""
        values = self._values
        value = math.ceil(value * _GRAIN) / _GRAIN
        while values and values[-1][1] <= value:
            values.pop()
        values.append((now_s, value))
        while values[0][0] < now_s - window_s:
            values.popleft()
        return values[0][1]

    @property
    def value(self) -> float:
        """What the last `add` returned; 0 before it."""
        return self._values[0][1] if self._values else 0.0

    def __len__(self) -> int:
        return len(self._values)

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
