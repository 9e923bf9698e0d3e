"""The memory that all ranks of an engine share: one anonymous file, cut into regions.

Owns where each region lies, which every rank works out for itself from the same sizes. Gone when the last
rank is. Must not know what is written there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import OutOfMemory
from headrace.units import format_bytes, whole_pages


class SharedMemory:
    """Regions of shared memory by name. Zeros at first; pages become resident when they are first written."""

    def __init__(self, sizes: Mapping[str, int], descriptor: int | None = None) -> None:
        """Map the memory behind `descriptor`, or new memory: `sizes` are the regions' bytes, in order.

        Takes over the descriptor. Raises OutOfMemory; ValueError where the memory is not of these sizes.
        """
        self._offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for name, size in sizes.items():
            self._offsets[name] = (end, size)
            end += whole_pages(size)
        self.num_bytes = end
        self.descriptor = os.memfd_create("headrace-ranks") if descriptor is None else descriptor
        try:
            if descriptor is None:
                os.ftruncate(self.descriptor, end)
            elif (found := os.fstat(self.descriptor).st_size) != end:
                raise ValueError(f"shared memory has {found} bytes and should have {end}")
            self._map = mmap.mmap(self.descriptor, end, flags=mmap.MAP_SHARED)
        except OSError as error:
            os.close(self.descriptor)
            raise OutOfMemory(
                f"ranks cannot share {format_bytes(end)} of memory: {error.strerror or error}; "
                "set token_budget to fewer tokens"
            ) from error
        except ValueError:
            os.close(self.descriptor)
            raise
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def __repr__(self) -> str:
        return f"<SharedMemory {format_bytes(self.num_bytes)} in {len(self._offsets)} regions>"

    def __del__(self) -> None:
        if hasattr(self, "_map"):
            os.close(self.descriptor)  # the mapping stays for as long as something looks into it

    def address(self, region: str) -> int:
        """Where `region` begins; valid while this object lives."""
        return self._base + self._offsets[region][0]

    def array(self, region: str, dtype: Any) -> NDArray[Any]:
        """All of `region` as numbers."""
        offset, size = self._offsets[region]
        count = size // np.dtype(dtype).itemsize
        return np.frombuffer(self._map, dtype, count, offset)
