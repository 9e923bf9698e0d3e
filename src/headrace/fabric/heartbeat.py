"""A file that a process touches while it is well, and who finds out that it is not.

As a file, because the two may share nothing else. Must not know: what the process does, or what follows.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

SILENCE_LIMIT_S = 10.0
"""A process that has touched its file before and has not for so long hangs."""
FIRST_BEAT_LIMIT_S = 120.0
"""The first time may take long: it connects to others first."""
STOOD_STILL_S = 2.0
"""Whoever looks so much later than he meant to did not run himself."""


def beat(path: Path) -> None:
    """Say that this process is well. Does not need room on the disk, and never fails."""
    with contextlib.suppress(OSError):
        os.utime(path)


@dataclass(slots=True)
class _Watched:
    path: Path
    mtime_ns: int | None
    heard_s: float
    limit_s: float = FIRST_BEAT_LIMIT_S


class Heartbeats:
    """Looks after processes by their files, each LOOK_S."""

    LOOK_S = 0.5

    def __init__(self) -> None:
        self._watched: dict[str, _Watched] = {}
        self._looked_s = 0.0

    def __repr__(self) -> str:
        return f"Heartbeats({', '.join(self._watched) or 'none'})"

    def watch(self, name: str, path: Path, now_s: float) -> None:
        """Look after a process that was started just now. `path` is there."""
        self._watched[name] = _Watched(path, _mtime_ns(path), now_s)

    def forget(self, name: str) -> None:
        """It ended."""
        self._watched.pop(name, None)

    def hung(self, now_s: float) -> dict[str, float]:
        """Return those that hang, with the seconds since they were well. Call it every LOOK_S."""
        stood_still = now_s - self._looked_s > STOOD_STILL_S
        self._looked_s = now_s
        found = {}
        for name, watched in self._watched.items():
            mtime_ns = _mtime_ns(watched.path)
            if mtime_ns is None:
                watched.heard_s = now_s
            elif mtime_ns != watched.mtime_ns:
                watched.mtime_ns, watched.heard_s, watched.limit_s = mtime_ns, now_s, SILENCE_LIMIT_S
            elif stood_still:
                watched.heard_s = now_s
            elif now_s - watched.heard_s > watched.limit_s:
                found[name] = now_s - watched.heard_s
        return found


def _mtime_ns(path: Path) -> int | None:
    """None: the file cannot be asked. Nobody is killed for that."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
