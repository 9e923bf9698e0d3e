"""Where this machine says that it is about to go away (a spot or maintenance notice): a file that appears.

Owns what a notice means, and looking for it again and again. Must not know what follows from it.
`notice_url` asks an address instead.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from headrace.clock import Clock

CHECK_S = 1.0
DEFAULT_DEADLINE_S = 30.0
"""What a notice without a readable deadline means: clouds give between 30 s and 2 minutes."""
_MAX_BYTES = 4096
_log = logging.getLogger(__name__)


class Notice(NamedTuple):
    """This machine goes away."""

    deadline_s: float | None
    """When, in seconds since 1970; None: it does not say."""


class NoticeSource(Protocol):
    """Something that can have a notice."""

    @property
    def name(self) -> str:
        """What logs call it."""
        ...

    async def look(self) -> Notice | None:
        """Return the notice; None: there is none, or nothing is heard of it. Raises nothing, and ends
        within a few seconds."""
        ...


class _Content(msgspec.Struct):
    deadline_s: float


def read_deadline(data: bytes) -> float | None:
    """Return the deadline of a notice, in seconds since 1970; None if it does not say one."""
    try:
        deadline_s = msgspec.json.decode(data, type=_Content).deadline_s
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


class NoticeFile:
    """A file: whatever lies at its path is a notice."""

    def __init__(self, path: str) -> None:
        self.name = path

    async def look(self) -> Notice | None:
        data = await asyncio.to_thread(read_notice, self.name)
        return None if data is None else Notice(read_deadline(data))


class NoticeWatcher:
    """Looks for a notice every second. It is read again and again: it may be given a deadline, or another
    one, after it is made."""

    def __init__(self, source: NoticeSource, clock: Clock, on_notice: Callable[[float], None]) -> None:
        """`on_notice` hears how many seconds are left, at each look that finds a notice; <= 0: none."""
        self._source = source
        self._clock = clock
        self._on_notice = on_notice
        self._seen_s: float | None = None

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            notice = await self._source.look()
            if notice is not None:
                self._tell(notice)
            await asyncio.sleep(CHECK_S)

    def _tell(self, notice: Notice) -> None:
        now_s, deadline_s = self._clock.wall_s(), notice.deadline_s
        if self._seen_s is None:
            self._seen_s = now_s
            _log.warning(
                "notice: %s says that this machine goes away%s",
                self._source.name,
                _describe_deadline(deadline_s, now_s),
            )
        if deadline_s is None:
            deadline_s = self._seen_s + DEFAULT_DEADLINE_S
        self._on_notice(deadline_s - now_s)


def _describe_deadline(deadline_s: float | None, now_s: float) -> str:
    if deadline_s is None:
        return f", without a deadline: {DEFAULT_DEADLINE_S:g} s are assumed"
    if deadline_s <= now_s:
        return f"; its deadline was {now_s - deadline_s:.0f} s ago: leaving at once"
    return f" in {deadline_s - now_s:.0f} s"
