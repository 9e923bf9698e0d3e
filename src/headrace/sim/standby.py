"""Puts a simulated replica's engine to sleep and wakes it, in the order of `replica.standby`.

Owns what depth is wanted, and the turn that gets there. Must not know how an engine sleeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.replica.standby import RELEASE_LIMIT_S

if TYPE_CHECKING:
    from headrace.sim.front import FrontProcess


class Standby:
    """At most one turn runs; of several wishes the newest counts."""

    def __init__(self, front: FrontProcess) -> None:
        self._front = front
        self.wanted = 0
        self._is_running = False
        self._is_stopped = False
        self.is_leaving = False
        self.error = ""

    def set_level(self, level: int) -> None:
        self.wanted = level
        if not self._is_running and not self._is_stopped:
            self._is_running = True
            self._front.after(0.0, self._turn, "standby")

    def stop(self) -> None:
        """End a turn that runs."""
        self._is_stopped = True
        self.is_leaving = False

    def _turn(self) -> None:
        if self._is_stopped:
            return
        front, wanted = self._front, self.wanted
        if wanted == 0 or front.engine.sleep_level:
            front.engine.set_sleep(wanted, lambda error: self._end(wanted, error))
            return
        if problem := self._open_problem():
            self._end(wanted, problem)
            return
        self.is_leaving = True
        front.ask_release()
        front.engine_changed()
        front.wait_until(
            lambda: self._is_stopped or (front.is_released() and not front.ledger.num_open),
            RELEASE_LIMIT_S,
            lambda: self._sleep(wanted),
        )

    def _sleep(self, wanted: int) -> None:
        if self._is_stopped:
            return
        if problem := self._open_problem():
            self._end(wanted, problem)
        else:
            self._front.engine.set_sleep(wanted, lambda error: self._end(wanted, error))

    def _end(self, wanted: int, error: str) -> None:
        self.error = error
        self.is_leaving = False
        self._front.engine_changed()
        if wanted != self.wanted and not self._is_stopped:
            self._front.after(0.0, self._turn, "standby")
        else:
            self._is_running = False

    def _open_problem(self) -> str:
        num_open = self._front.ledger.num_open
        return f"it cannot sleep: {num_open} requests are open" if num_open else ""
