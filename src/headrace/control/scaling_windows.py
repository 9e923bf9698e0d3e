"""What the scaler remembers: time as observed, rates of demand, the shape of requests, start times. Pure.

Owns the windows of one endpoint. Believes nothing that cannot be: counters that restart, clocks that jump and
numbers that are none leave what was known before. Must not know replicas' states or decisions.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from headrace.api.messages import EndpointDemand
from headrace.policy.scaling_capacity import RequestShape

MAX_STEP_S = 30.0
"""More time than this between two observations was not observed: the clock jumped, or this process stood."""
SAMPLE_S = 1.0
MAX_SAMPLES = 2048
MAX_ROUTERS = 64
MAX_KNOWN_RATES = 16
MEMORY_REQUESTS = 256.0
MEMORY_S = 120.0
"""A request counts a third in the mean shape once so many others have ended and so long has passed."""
SPREAD_MEMORY_S = 300.0
OUTPUT_CV2 = 1.0
"""Squared coefficient of variation of answers' lengths, of which only means are told."""
MAX_STARTS = 64
MAX_START_S = 3600.0
MAX_TOTAL = 1e15


class ObservedTime:
    """Seconds that were observed: it never goes back, and stands still over what nobody saw."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._last_s: float | None = None

    def advance(self, clock_s: float) -> bool:
        """Take the clock. False if it jumped: then rates over this step mean nothing."""
        last_s = self._last_s
        if not math.isfinite(clock_s):
            return False
        self._last_s = clock_s
        if last_s is None:
            return False
        step_s = clock_s - last_s
        if not 0 <= step_s <= MAX_STEP_S:
            return False
        self.now_s += step_s
        return True


class LastUse:
    """When an endpoint was last used, and whether a user took it to zero since."""

    def __init__(self) -> None:
        self.at_s = -math.inf
        """Observed time of the last request."""
        self.is_ended = False
        """A user wants no replica, and no later request has needed one yet."""
        self._num_left = 0
        """Requests that were held when it was ended, if some still are: they are served first."""

    def observe(self, num_arrived: float, num_held: int, num_in_flight: int, now_s: float) -> None:
        """Take what is there. Once it is ended only a request that is held uses it again: where no replica is
        every later one is held, while arrivals and ends are told of late and may have been before."""
        if self.is_ended:
            self._num_left = min(self._num_left, num_held)
            self.is_ended = num_held == self._num_left
        if not self.is_ended and (num_arrived or num_held or num_in_flight):
            self.at_s = now_s

    def end(self, num_held: int) -> None:
        """A user wants no replica; `num_held` requests wait for one."""
        self.at_s, self.is_ended, self._num_left = -math.inf, True, num_held

    def want(self) -> None:
        """A user wants replicas again."""
        self.is_ended = False


class Totals(NamedTuple):
    """Counters of one router, or what they grew by."""

    requests: float
    prompt_tokens: float
    measured: float
    measured_prompt: float
    measured_cached: float
    measured_output: float
    engine_s: float

    @classmethod
    def of(cls, demand: EndpointDemand) -> Totals | None:
        """Return a router's counters; None if they cannot be."""
        totals = cls(
            demand.arrived - demand.over_limits,
            demand.arrived_prompt_tokens,
            demand.measured,
            demand.prompt_tokens,
            demand.cached_tokens,
            demand.output_tokens,
            demand.engine_s,
        )
        return totals if all(0 <= value <= MAX_TOTAL for value in totals) else None  # NaN compares false

    def since(self, before: Totals) -> Totals | None:
        """Return what they grew by; None if one fell: its router began anew."""
        grown = Totals(*(now - then for now, then in zip(self, before, strict=True)))
        return grown if all(value >= 0 for value in grown) else None


class CounterBook:
    """The last counters of each router."""

    def __init__(self) -> None:
        self._last: dict[str, Totals] = {}

    def take(self, demands: Mapping[str, EndpointDemand]) -> list[Totals]:
        """Return by how much each router's counters grew since it was last seen. A router that is seen for
        the first time, or whose counters fell, only sets the mark."""
        growths = []
        for router, demand in demands.items():
            totals, before = Totals.of(demand), self._last.get(router)
            if totals is None:
                continue
            self._last.pop(router, None)
            self._last[router] = totals
            growth = totals.since(before) if before is not None else None
            if growth is not None:
                growths.append(growth)
        while len(self._last) > MAX_ROUTERS:
            del self._last[next(iter(self._last))]
        return growths


class DemandWindow:
    """Requests and prompt tokens that arrived, over time, and how unevenly."""

    def __init__(self) -> None:
        self._times = [0.0]
        self._requests = [0.0]
        self._tokens = [0.0]
        self._open = (0.0, 0.0)
        """Arrived since the last sample."""
        self._last_rate: tuple[float, float] | None = None
        self._spread = [0.0] * 5
        """Smoothed: variances and covariance of requests and tokens per second, and their means."""
        self._spread_weight = 0.0
        self._known_rates: dict[tuple[float, ...], list[tuple[float, float]]] = {}
        """By edges, since the last sample: many decisions are made between two."""

    def add(self, num_requests: float, num_tokens: float, now_s: float) -> tuple[float, float, float] | None:
        """Take what arrived since the last call. Return a sample that is whole by now: requests, prompt
        tokens, seconds."""
        self._open = (self._open[0] + num_requests, self._open[1] + num_tokens)
        step_s = now_s - self._times[-1]
        if step_s < SAMPLE_S:
            return None
        requests, tokens = self._open
        self._open = (0.0, 0.0)
        self._known_rates.clear()
        self._times.append(now_s)
        self._requests.append(self._requests[-1] + requests)
        self._tokens.append(self._tokens[-1] + tokens)
        self._observe_spread(requests / step_s, tokens / step_s, step_s)
        if len(self._times) > 2 * MAX_SAMPLES:
            for series in (self._times, self._requests, self._tokens):
                del series[:-MAX_SAMPLES]
        return requests, tokens, step_s

    @property
    def length_s(self) -> float:
        return self._times[-1] - self._times[0]

    def rates(self, edges: list[float]) -> list[tuple[float, float]]:
        """Return mean requests and prompt tokens per second between neighbours of `edges`, which are seconds
        before the last sample, oldest first."""
        key = tuple(edges)
        known = self._known_rates.get(key)
        if known is None:
            if len(self._known_rates) >= MAX_KNOWN_RATES:
                self._known_rates.clear()
            known = self._known_rates[key] = self._rates(edges)
        return known

    def _rates(self, edges: list[float]) -> list[tuple[float, float]]:
        times = self._times
        end_s = times[-1]
        points = []
        for edge in edges:
            index = min(len(times) - 1, max(0, bisect_right(times, end_s - edge) - 1))
            points.append((times[index], self._requests[index], self._tokens[index]))
        rates = []
        for (t0, r0, p0), (t1, r1, p1) in pairwise(points):
            seconds = t1 - t0
            rates.append(((r1 - r0) / seconds, (p1 - p0) / seconds) if seconds > 0 else (0.0, 0.0))
        return rates

    def dispersion_s(self, request_s: float, token_s: float) -> float:
        """Return the variance over the mean of the arriving work, in seconds, at so much work per request
        and per prompt token. From differences of neighbouring samples, so that slow changes of the level are
        none; 0: not known yet."""
        rr, rt, tt, requests, tokens = self._spread
        mean = request_s * requests + token_s * tokens
        if mean <= 0:
            return 0.0
        variance = (
            request_s**2 * (rr + OUTPUT_CV2 * requests) + 2 * request_s * token_s * rt + token_s**2 * tt
        )
        return max(0.0, variance / mean)

    def _observe_spread(self, requests: float, tokens: float, step_s: float) -> None:
        last, self._last_rate = self._last_rate, (requests, tokens)
        if last is None:
            return
        dr, dt = requests - last[0], tokens - last[1]
        # Half a squared difference of means over step_s is their variance; times step_s: per second.
        new = (dr * dr * step_s / 2, dr * dt * step_s / 2, dt * dt * step_s / 2, requests, tokens)
        self._spread_weight = min(self._spread_weight + step_s, SPREAD_MEMORY_S)
        part = step_s / self._spread_weight
        self._spread = [old + (value - old) * part for old, value in zip(self._spread, new, strict=True)]


class ShapeMeter:
    """Mean tokens and engine time of the requests of the last minutes, and of a few hundred at least."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5
        self._last_s = 0.0

    def add(self, growth: Totals, now_s: float) -> None:
        if growth.measured <= 0:
            return
        elapsed_s, self._last_s = now_s - self._last_s, now_s
        keep = math.exp(-min(growth.measured / MEMORY_REQUESTS, elapsed_s / MEMORY_S))
        values = (
            growth.measured,
            growth.measured_prompt,
            growth.measured_cached,
            growth.measured_output,
            growth.engine_s,
        )
        self._sums = [total * keep + value for total, value in zip(self._sums, values, strict=True)]

    def shape(self) -> RequestShape | None:
        """Return the means; None before any request was measured."""
        count, prompt, cached, output, _ = self._sums
        if count <= 0 or prompt + output <= 0:
            return None
        ratio = min(1.0, cached / prompt) if prompt > 0 else 0.0
        return RequestShape(prompt / count, ratio, output / count)

    def engine_s(self) -> float:
        """Return the mean engine time per request; 0: not measured."""
        return self._sums[4] / self._sums[0] if self._sums[0] > 0 else 0.0


class DurationBook:
    """The last durations of something, for their p95."""

    def __init__(self, guess_s: float) -> None:
        self._guess_s = guess_s
        self._last: deque[float] = deque(maxlen=MAX_STARTS)

    def __len__(self) -> int:
        return len(self._last)

    def add(self, seconds: float) -> None:
        if 0 <= seconds <= MAX_START_S:
            self._last.append(seconds)

    def p95_s(self) -> float:
        """Return the 95th percentile by nearest rank; the guess before anything was measured."""
        return self._quantile_s(0.95)

    def median_s(self) -> float:
        """Return the median, likewise."""
        return self._quantile_s(0.5)

    def _quantile_s(self, part: float) -> float:
        if not self._last:
            return self._guess_s
        return sorted(self._last)[math.ceil(part * len(self._last)) - 1]
