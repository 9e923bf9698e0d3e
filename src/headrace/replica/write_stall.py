"""Notices a peer that stopped reading: its full buffer does not get smaller for a while. Pure.

Must not know transports; who asks says how many bytes are unread, and when.
"""

from __future__ import annotations


class WriteStall:
    """How long ago a full buffer last became smaller."""

    def __init__(self) -> None:
        self._since_s = 0.0
        self._num_bytes = 0

    def begin(self, num_bytes: int, now_s: float) -> None:
        """The buffer is full."""
        self._num_bytes, self._since_s = num_bytes, now_s

    def is_over(self, num_bytes: int, now_s: float, limit_s: float) -> bool:
        """Whether the peer read nothing for longer than limit_s. To be asked while the buffer is full."""
        if num_bytes < self._num_bytes:
            self._since_s = now_s
        self._num_bytes = num_bytes
        return now_s - self._since_s > limit_s
