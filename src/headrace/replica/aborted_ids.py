"""Ids that were aborted a moment ago, and must not be used again yet.

The step that ran when its abort was sent still gives a request's tokens under its id. Were the id used again
at once, as when a gateway sends a request again whose connection broke, they would be taken for the new
request's. Must not know engines.
"""

from __future__ import annotations

MAX_REMEMBERED = 1024
"""More aborts than any engine can have outputs under way for."""


class AbortedIds:
    """The last of them."""

    def __init__(self) -> None:
        self._ids: dict[str, None] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._ids

    def add(self, request_id: str) -> None:
        self._ids[request_id] = None
        if len(self._ids) > MAX_REMEMBERED:
            del self._ids[next(iter(self._ids))]

    def clear(self) -> None:
        """The engine is gone: nothing comes any more."""
        self._ids.clear()
