"""Why processes that write to our log failed, read back from it: who waited knows only that they did.

Owns the search for the first error in the log since a mark. Must not know which processes those are.
"""

from __future__ import annotations

import os
import re
import stat

_MAX_BYTES = 1 << 20
_MAX_CHARACTERS = 1000
_ERROR = re.compile(
    r"^(?:\([^)\n]*\) )?(?:(?:ERROR|CRITICAL)[^\]\n]*\] )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.M
)
"""The last line of a traceback, perhaps with what a logger writes before each line."""


class LogMark:
    """A place in this process's log (its standard error, if that is a file) from which to read."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._offset = self._size()

    def first_error(self) -> str:
        """Return the first error written since the mark: what followed was about it. Empty: none is known."""
        size = self._size()
        if size is None or self._offset is None:
            return ""
        try:
            # Its own description of the file: ours is open for writing, at its end.
            with open(f"/proc/self/fd/{self._fd}", "rb") as log:
                log.seek(self._offset)
                text = log.read(min(_MAX_BYTES, max(0, size - self._offset))).decode(errors="replace")
        except OSError:
            return ""
        found = _ERROR.search(text)
        return found[1].strip()[:_MAX_CHARACTERS] if found else ""

    def _size(self) -> int | None:
        try:
            status = os.fstat(self._fd)
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None
