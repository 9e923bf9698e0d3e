"""How many replicas keep the wait of those who come within bounds. Pure.

The tail of the wait in front of N servers, with demand D in servers: heavy-traffic theory gives the
exponential P(W > t) = P(W > 0) * exp(-2 * (N - D) * t / I) (Kingman 1962; Whitt 1993 for many servers), and
P(W > 0) = rho ** (sqrt(2 * (N + 1)) - 1) with rho = D / N (Sakasegawa 1977). I is the dispersion of the
arriving work in seconds, the variance over the mean of what arrives in a window: for arrivals with squared
coefficient of variation ca2 and service of mean S and cs2 it is S * (ca2 + cs2), which needs neither apart.
"""

from __future__ import annotations

import math

_STEPS = 20


def late_ratio(num_replicas: float, demand: float, dispersion_s: float, slack_s: float) -> float:
    """Return P(W > slack_s), 0 to 1."""
    if demand <= 0:
        return 0.0
    if num_replicas <= demand or slack_s <= 0:
        return 1.0
    waits = math.pow(demand / num_replicas, math.sqrt(2 * (num_replicas + 1)) - 1)
    if dispersion_s <= 0:
        return 0.0
    return waits * math.exp(-2 * (num_replicas - demand) * slack_s / dispersion_s)


def replicas_within(demand: float, dispersion_s: float, slack_s: float, ratio: float) -> float:
    """Return the least number of replicas, not rounded, of which at most `ratio` of the requests wait longer
    than `slack_s` (> 0)."""
    if demand <= 0 or dispersion_s <= 0:
        return max(0.0, demand)
    low, high = demand, demand + dispersion_s * math.log(1 / ratio) / (2 * slack_s)
    for _ in range(_STEPS):  # the tail falls with the number of replicas
        middle = (low + high) / 2
        if late_ratio(middle, demand, dispersion_s, slack_s) > ratio:
            low = middle
        else:
            high = middle
    return high
