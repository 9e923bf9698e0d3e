"""More threads for a step that cannot wait, while cores are idle.

Owns the second, larger team of an engine, started when it is first used; its threads sleep otherwise. Which
team computes a step changes no bit of it. Must not know which steps cannot wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from headrace.engine.operations.kernels import Library, Team


def num_runnable_threads() -> int:
    """Return how many threads of this machine compute or want to, the caller included (proc_loadavg(5))."""
    try:
        with open("/proc/loadavg", "rb") as file:
            return int(file.read().split()[3].split(b"/")[0])
    except (OSError, ValueError, IndexError):
        return 1 << 20  # not known: nothing is spare


class SpareCores:
    """Chooses between an engine's own team and one with a thread for every core that it may use."""

    def __init__(
        self,
        library: Library,
        team: Team,
        num_cores: int | None = None,
        num_runnable: Callable[[], int] = num_runnable_threads,
    ) -> None:
        """`num_cores`: those that this process may use, unless it is given."""
        self._library = library
        self._team = team
        self._num_cores = len(os.sched_getaffinity(0)) if num_cores is None else num_cores
        self._num_runnable = num_runnable
        self._large_team: Team | None = None

    def __repr__(self) -> str:
        return f"SpareCores({self._team.num_threads} threads of {self._num_cores} cores)"

    def team(self) -> Team:
        """Return the larger team if most of the cores that it adds are idle now, else the usual one."""
        num_more = self._num_cores - self._team.num_threads
        if num_more <= 0 or self._num_cores - self._num_runnable() < num_more / 2:
            return self._team
        if self._large_team is None:
            try:
                self._large_team = self._library.start_team(self._num_cores)
            except OSError:  # no more threads: as it was
                self._num_cores = self._team.num_threads
                return self._team
        return self._large_team
