"""Exact statistics over samples: no histogram, no interpolation, no I/O.

Owns what a percentile and a summary are. Must not know what is measured or in which unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec


class Summary(msgspec.Struct, frozen=True):
    """One quantity over `count` samples, in the samples' unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def percentile(sorted_samples: Sequence[float], ratio: float) -> float:
    """Return the nearest-rank percentile: the smallest sample that at least `ratio` of all samples are not
    above. Always one of the samples. `sorted_samples` rises and has at least one; ratio is in (0, 1].
    """
    assert sorted_samples, "a percentile needs at least one sample"
    assert 0 < ratio <= 1, f"ratio is {ratio}; it must be in (0, 1]"
    # 0.9 * 10 is 9.000000000000002 in some products: a rank that is a whole number up to rounding is one.
    rank = math.ceil(ratio * len(sorted_samples) - 1e-9)
    return sorted_samples[max(rank, 1) - 1]


def summarise(samples: Iterable[float], scale: float = 1.0) -> Summary | None:
    """Summarise samples, each multiplied by `scale` (1000 for seconds to milliseconds). None without any."""
    ordered = sorted(samples)
    if not ordered:
        return None
    return Summary(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered) * scale,
        p50=percentile(ordered, 0.50) * scale,
        p90=percentile(ordered, 0.90) * scale,
        p99=percentile(ordered, 0.99) * scale,
        max=ordered[-1] * scale,
    )
