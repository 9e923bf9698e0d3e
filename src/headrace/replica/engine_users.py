"""Who hears of what an engine does: the streams in it, and who follows its prefix cache.

The seam between an engine, wherever it is, and what is made of its tokens. Owns nothing.
"""

from __future__ import annotations

from typing import Protocol

from headrace.api.messages import StepBatch, StepOutput


class EngineStream(Protocol):
    """One request inside the engine, as its owner sees it."""

    def on_output(self, output: StepOutput, now_s: float) -> bool:
        """Take what one step gave; say whether it wants to be flushed. After an output with a finish_reason
        nothing comes any more."""
        ...

    def flush(self) -> None:
        """The step's outputs are complete: write what is to be written, once."""
        ...

    def on_engine_lost(self, reason: str) -> None:
        """The engine is gone and with it this request; nothing comes any more."""
        ...

    def on_broken(self) -> None:
        """`on_output` raised: a bug of ours. End this request without harming others."""
        ...


class CacheWatcher(Protocol):
    """Who follows the engine's prefix cache. Must not raise."""

    def on_ready(self, block_size: int) -> None:
        """An engine is ready, its cache empty."""
        ...

    def on_step(self, batch: StepBatch) -> None: ...

    def on_abort(self, request_id: str) -> None: ...

    def on_lost(self) -> None:
        """The engine is gone, and its cache with it."""
        ...
