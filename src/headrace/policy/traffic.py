"""Which version gets a request while one replaces another: by parts of all requests. Pure.

Must not know replicas, or why parts are what they are (`rollout`).
"""

from __future__ import annotations

from collections.abc import Mapping

import xxhash

_SCALE = 2.0**-64


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
