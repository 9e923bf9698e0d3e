"""Memory for an engine's keys and values that the front holds, so that an engine's death does not free it.

The next engine begins with what is there, and siblings on this machine copy what they continue. Owns the
memory's life: from the first engine's start until there is to be none any more. Must not know its content.
"""

from __future__ import annotations

import logging
import os

from headrace.api.messages import KV_MEMORY_NAME, EngineSpec, KvPlace

_log = logging.getLogger(__name__)


def can_keep(spec: EngineSpec) -> bool:
    """Whether an engine's memory can outlive it. Ranks have a part each, and other engines their own ways."""
    return spec.kind == "native" and spec.tensor_parallel == 1


class KeptMemory:
    """A file without a name, which grows when the engine writes into it. One per front."""

    def __init__(self, is_wanted: bool) -> None:
        """`is_wanted`: by engines of this kind (`can_keep`)."""
        self._is_wanted = is_wanted
        self.descriptor = -1
        """To be inherited by the engine; negative: none, it takes memory of its own."""

    def __repr__(self) -> str:
        return f"KeptMemory({self.descriptor})"

    @property
    def place(self) -> KvPlace | None:
        """Where others on this machine find it."""
        return KvPlace(os.getpid(), self.descriptor) if self.descriptor >= 0 else None

    def open(self) -> int:
        """Have it from now on; return the descriptor, or a negative number where there is none."""
        if self._is_wanted and self.descriptor < 0:
            try:
                self.descriptor = os.memfd_create(KV_MEMORY_NAME)
            except OSError as error:  # a kernel or a sandbox without it
                _log.warning("keys and values end with their engine: %s", error)
        return self.descriptor

    def close(self) -> None:
        """Give it back: to the system, when nobody reads it any more."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
