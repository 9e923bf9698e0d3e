"""When to start a dead engine again. Pure: an observation in, a decision with its reason out."""

from __future__ import annotations

from dataclasses import dataclass

START_HOLD_S = 1.0
"""A lost engine's successor is started at most so much later for the streams that siblings take over."""
START_HOLD_TICK_S = 0.02


@dataclass(frozen=True, slots=True)
class EngineEnd:
    """How one engine process ended. Seconds on the clock; ready_at_s is None if it never took requests."""

    ended_at_s: float
    ready_at_s: float | None
    error: str
    is_retryable: bool


@dataclass(frozen=True, slots=True)
class RestartDecision:
    """delay_s: start again after it. None: give up."""

    delay_s: float | None
    reason: str


class RestartPolicy:
    """Exponential back-off between `min_delay_s` and `max_delay_s`; gives up after `max_failures` ends in a
    row that never became ready, or at an error that starting again cannot help."""

    def __init__(
        self,
        min_delay_s: float = 0.1,
        max_delay_s: float = 10.0,
        healthy_s: float = 30.0,
        max_failures: int = 5,
    ) -> None:
        self._min_delay_s = min_delay_s
        self._max_delay_s = max_delay_s
        self._healthy_s = healthy_s
        self._max_failures = max_failures
        self._num_unready = 0
        self._next_delay_s = min_delay_s

    def decide(self, end: EngineEnd) -> RestartDecision:
        """Count `end` and say what follows."""
        if not end.is_retryable:
            return RestartDecision(None, f"starting again cannot help: {end.error}")
        if end.ready_at_s is None:
            self._num_unready += 1
        else:
            self._num_unready = 0
            if end.ended_at_s - end.ready_at_s >= self._healthy_s:
                self._next_delay_s = self._min_delay_s
        if self._num_unready >= self._max_failures:
            return RestartDecision(
                None, f"it ended {self._num_unready} times without getting ready: {end.error}"
            )
        delay_s = self._next_delay_s
        self._next_delay_s = min(self._max_delay_s, 2 * delay_s)
        return RestartDecision(delay_s, f"starting again in {delay_s:g} s: {end.error}")
