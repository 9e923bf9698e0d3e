"""The names of models under which a replica is asked: its endpoint's, and those of its adapters.

Must not know requests.
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace.errors import NotFound

_MAX_SHOWN = 200
"""Characters of a name that came from outside."""


class ServedModels:
    """What a front serves."""

    def __init__(self, endpoint: str, adapters: Iterable[str] = ()) -> None:
        self.endpoint = endpoint
        self._adapters = frozenset(adapters)
        self.names = (endpoint, *adapters)
        """The endpoint's first."""

    def __repr__(self) -> str:
        return f"ServedModels({', '.join(self.names)})"

    def check(self, name: str) -> None:
        """Raise NotFound unless `name` is what this replica serves."""
        if name not in self.names:
            known = ", ".join(repr(known) for known in self.names)
            raise NotFound(
                f"model {name[:_MAX_SHOWN]!r} does not exist; this replica serves {known}", param="model"
            )

    def adapter_of(self, name: str) -> str:
        """Return which adapter computes the answers of `name`; empty: none."""
        return name if name in self._adapters else ""
