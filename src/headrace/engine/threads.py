"""How torch's threads wait for each other. Must be called before torch is imported; must not import it.

libgomp reads its environment once, when it is loaded.
"""

from __future__ import annotations

import os

_SPIN_COUNT = "3000"
"""About 60 µs: longer than the gaps between two operations of a step, shorter than a time slice."""


def limit_spinning() -> None:
    """Let OpenMP threads sleep soon when their partner is not there.

    By default they spin for milliseconds, which keeps the processor from the very partner they wait for as
    soon as anything else runs on this machine. Two threads on two busy cores, SmolLM2: over 1 s per step of
    16 decodes with the default; 0.11 s per step of 32 so (asleep at once: 0.29 s). On quiet cores the cost is
    within the noise.
    What the user set in GOMP_SPINCOUNT or OMP_WAIT_POLICY wins.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
