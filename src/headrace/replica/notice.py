"""The file that appears when this machine is about to go away: a spot or maintenance notice.

Owns what such a file says, and looking for it. Must not know what follows from it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable

import msgspec

from headrace.clock import Clock

CHECK_S = 1.0
DEFAULT_DEADLINE_S = 30.0
"""What a notice without a readable deadline means: clouds give between 30 s and 2 minutes."""
_MAX_BYTES = 4096
_log = logging.getLogger(__name__)


class _Notice(msgspec.Struct):
    deadline_s: float


def read_deadline(data: bytes) -> float | None:
    """Return the deadline of a notice, in seconds since 1970; None if it does not say one."""
    try:
        deadline_s = msgspec.json.decode(data, type=_Notice).deadline_s
    except msgspec.DecodeError:
        return None
    return deadline_s if math.isfinite(deadline_s) and deadline_s >= 0 else None


def read_notice(path: str) -> bytes | None:
    """Return what the notice says, as far as it can be read; None: there is none."""
    try:
        # Not blocking: whoever makes the notice may have made a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b"" if os.path.exists(path) else None
    try:
        return os.read(descriptor, _MAX_BYTES)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


class NoticeWatcher:
    """Looks for a notice once a second. It is read again and again: it may be written after it is made."""

    def __init__(self, path: str, clock: Clock, on_notice: Callable[[float], None]) -> None:
        """`on_notice` hears how many seconds are left, at each look once there is a notice; <= 0: none."""
        self._path = path
        self._clock = clock
        self._on_notice = on_notice
        self._seen_s: float | None = None

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            data = await asyncio.to_thread(read_notice, self._path)
            if data is not None:
                self._tell(data)
            await asyncio.sleep(CHECK_S)

    def _tell(self, data: bytes) -> None:
        now_s, deadline_s = self._clock.wall_s(), read_deadline(data)
        if self._seen_s is None:
            self._seen_s = now_s
            known = (
                ""
                if deadline_s is not None
                else f", without a deadline: {DEFAULT_DEADLINE_S:g} s are assumed"
            )
            _log.warning("notice: %s says that this machine goes away%s", self._path, known)
        if deadline_s is None:
            deadline_s = self._seen_s + DEFAULT_DEADLINE_S
        self._on_notice(deadline_s - now_s)
