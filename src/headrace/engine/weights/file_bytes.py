"""Reads parts of one model file. Bytes are read, not mapped: what somebody cuts meanwhile is an error, where
a mapping would end the process.

Must not know formats.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ModelChanged, ModelError


class FileBytes:
    """One open file: also if another takes its name, all parts come from the same one."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError if it cannot be opened."""
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def __repr__(self) -> str:
        return f"FileBytes({self._path})"

    def read(self, offset_bytes: int, size_bytes: int) -> NDArray[np.uint8]:
        """Return a part of the file, in memory of its own. Raises ModelError; ModelChanged if it ends
        before."""
        data = np.empty(size_bytes, np.uint8)
        done = 0
        try:
            while done < size_bytes:
                num_read = os.preadv(self._descriptor, [data[done:].data], offset_bytes + done)
                if not num_read:
                    raise ModelChanged(f"{self._path}: was cut while it was read")
                done += num_read
        except OSError as error:
            raise ModelError(f"{self._path}: cannot be read: {error.strerror or error}") from error
        return data
