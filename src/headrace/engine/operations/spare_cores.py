"""More threads for a step that cannot wait, where they help.

Owns the second, larger team of an engine, with a thread for every core that it may use; it is started when it
is first used, and sleeps otherwise. Whether it is faster than the usual one depends on what else runs on the
machine: that is measured, layer by layer. Which team computes changes no bit of a step.
Must not know which steps cannot wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from headrace.engine.operations.kernels import Library, Team

PROBE_EVERY = 8
"""Of so many layers the first is computed by the usual team, the second by the larger one, the rest by
whichever was faster."""


class SpareCores:
    """Chooses each layer's team in a step that cannot wait."""

    def __init__(
        self,
        library: Library,
        team: Team,
        num_cores: int | None = None,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`num_cores`: those that this process may use, unless it is given."""
        self._library = library
        self._team = team
        self._num_cores = len(os.sched_getaffinity(0)) if num_cores is None else num_cores
        self._now_s = now_s
        self._large_team: Team | None = None
        self._last_s = self._usual_s = 0.0
        self._is_large_faster = False

    def __repr__(self) -> str:
        return f"SpareCores({self._team.num_threads} threads of {self._num_cores} cores)"

    def team_for(self, layer: int) -> Team:
        """Return what computes this layer. Called as each layer of a step begins, in order."""
        if self._num_cores <= self._team.num_threads:
            return self._team
        now_s = self._now_s()
        layer_s, self._last_s = now_s - self._last_s, now_s
        turn = layer % PROBE_EVERY
        if turn == 0:
            return self._team
        if turn == 1:
            self._usual_s = layer_s
            return self._larger()
        if turn == 2:
            self._is_large_faster = layer_s < self._usual_s
        return self._larger() if self._is_large_faster else self._team

    def _larger(self) -> Team:
        if self._large_team is None:
            try:
                self._large_team = self._library.start_team(self._num_cores)
            except OSError:  # no more threads: as it was
                self._num_cores = self._team.num_threads
                return self._team
        return self._large_team
