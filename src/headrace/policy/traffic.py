"""Which version gets a request while one replaces another, by parts of all requests, and for how long it
waits for that one's replicas while others have room. Pure.

Must not know replicas, or why parts are what they are (`rollout`).
"""

from __future__ import annotations

from collections.abc import Mapping

import xxhash

_SCALE = 2.0**-64
MAX_OWN_WAIT_S = 1.0
"""Longest wait for a version's replicas beside another one's with room: over a burst parts hold, and where a
version stays full its requests are worth more than its part."""
SLO_PART = 0.25
"""Of the TTFT that is promised; the rest is for the prompt."""


def own_wait_s(ttft_s: float) -> float:
    """Return for how long after its arrival a request waits for its own version. ttft_s: the SLO; 0: none."""
    return min(MAX_OWN_WAIT_S, ttft_s * SLO_PART) if ttft_s > 0 else MAX_OWN_WAIT_S


def choose_version(request_id: str, traffic: Mapping[str, float]) -> str:
    """Return the generation whose turn a request is; empty: of none that is named. The same id gives the same
    answer, and who got the first named version goes on getting it as its part grows.

    traffic: generation -> its part, 0 to 1, together at most 1.
    """
    place = xxhash.xxh64_intdigest(request_id.encode()) * _SCALE
    for generation, part in traffic.items():
        if place < part:
            return generation
        place -= part
    return ""
