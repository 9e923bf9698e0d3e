"""What one more row lengthens a step by: fits seconds = a + r * rows over recent steps without prompt tokens.

Owns the fit: least squares, old steps forgotten exponentially, so that it follows the present batch sizes.
While all steps have the same number of rows, the last slope stays. Pure. Must not know engines or the time.
"""

from __future__ import annotations

import math

_KEEP = 1.0 - 1.0 / 128
_MAX_OUTLIER = 4.0
"""A step that takes this many times what was expected (another process ran, say) counts as this many."""
_FIRST_SHARE = 1.0 / 16
"""Until rows were seen to differ, one more is taken to lengthen a step by this share of it."""
_PULL = 0.25
"""Weight of the last slope, as of this much summed variance of the number of rows."""


class RowCost:
    """Takes each step's rows and seconds; gives a row's marginal seconds."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._mean_rows = 0.0
        self._mean_s = 0.0
        self._variance = 0.0
        self._covariance = 0.0
        """Weighted sums of squares and products around the means."""
        self.row_s = 0.0
        """Seconds by which one more row lengthens a step, >= 0. 0: nothing measured yet."""

    def __repr__(self) -> str:
        return f"<RowCost {1e3 * self.step_s(0):.3f} ms + {1e6 * self.row_s:.1f} µs/row>"

    def step_s(self, num_rows: int) -> float:
        """Return the expected seconds of a step with `num_rows` rows."""
        return max(self._mean_s + self.row_s * (num_rows - self._mean_rows), 0.0)

    def observe(self, num_rows: int, seconds: float) -> None:
        """Take one step without prompt tokens. One of no time says nothing."""
        if not 0 < seconds < math.inf or num_rows < 1:
            return
        if self._weight == 0:
            self.row_s = _FIRST_SHARE * seconds / num_rows
            self._mean_s, self._mean_rows = seconds, float(num_rows)
        elif (expected_s := self.step_s(num_rows)) > 0:
            seconds = min(seconds, _MAX_OUTLIER * expected_s)
        self._weight = _KEEP * self._weight + 1.0
        off_rows, off_s = num_rows - self._mean_rows, seconds - self._mean_s
        self._mean_rows += off_rows / self._weight
        self._mean_s += off_s / self._weight
        # Welford's update of sums around a moving mean (Technometrics 4(3), 1962), with weights.
        self._variance = _KEEP * self._variance + off_rows * (num_rows - self._mean_rows)
        self._covariance = _KEEP * self._covariance + off_rows * (seconds - self._mean_s)
        slope = (self._covariance + _PULL * self.row_s) / (self._variance + _PULL)
        # Rows alone cannot take more than the whole step: noise would say so.
        self.row_s = min(max(slope, 0.0), self._mean_s / self._mean_rows)
