"""When an open loop sends: a pure schedule that is asked what is due.

Owns which request is due when, and the end of a run. Must not know clocks, timers or sockets.
"""

from __future__ import annotations

from collections.abc import Iterator


class OpenLoopSchedule:
    """Hands out arrivals as they fall due, whatever became of the earlier ones.

    Ends after `max_requests` or at `duration_s` seconds, whichever is set and comes first.
    """

    def __init__(
        self,
        arrivals: Iterator[float],
        start_s: float,
        *,
        max_requests: int | None = None,
        duration_s: float | None = None,
    ) -> None:
        assert max_requests is not None or duration_s is not None, "an open loop needs an end"
        self._arrivals = arrivals
        self._start_s = start_s
        self._max_requests = max_requests
        self._duration_s = duration_s
        self._num_handed_out = 0
        self._next_s: float | None = None
        self._advance()

    def __repr__(self) -> str:
        return f"<OpenLoopSchedule: {self._num_handed_out} handed out, next at {self._next_s}>"

    @property
    def num_handed_out(self) -> int:
        """The index of the request that is due next."""
        return self._num_handed_out

    @property
    def next_s(self) -> float | None:
        """When the next request is due, on the caller's clock; None at the end."""
        return self._next_s

    def due(self, now_s: float) -> list[tuple[int, float]]:
        """Return (index, scheduled time) of every request due by `now_s` that was not handed out yet."""
        requests = []
        while self._next_s is not None and self._next_s <= now_s:
            requests.append((self._num_handed_out, self._next_s))
            self._num_handed_out += 1
            self._advance()
        return requests

    def _advance(self) -> None:
        if self._max_requests is not None and self._num_handed_out >= self._max_requests:
            self._next_s = None
            return
        offset_s = next(self._arrivals)
        is_over = self._duration_s is not None and offset_s >= self._duration_s
        self._next_s = None if is_over else self._start_s + offset_s
