"""Sizes and durations as people write them, and back. Pure."""

from __future__ import annotations

PAGE_BYTES = 4096
KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def format_bytes(num_bytes: float) -> str:
    """Return `num_bytes` with a binary unit: `1.5 GiB`."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """Return `seconds` in the unit that reads best: `350 µs`, `12 ms`, `3.2 s`, `4 min 10 s`."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def whole_pages(num_bytes: int) -> int:
    """Return bytes rounded up to pages of memory."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
