"""The seam of those who guess: tokens that may follow a request's tokens, to be verified in the same step.

A guess costs nothing but time: which tokens come out never depends on it (`verify`).
Must not know sampling, logits, or how many guesses pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from headrace.engine.request import EngineRequest


class Wanted(NamedTuple):
    """A request that takes up to `max_tokens` (>= 1) guesses. Its block table has room for all of them behind
    its tokens."""

    request: EngineRequest
    max_tokens: int


class Proposer(Protocol):
    """Guesses tokens for several requests at once. What it keeps of one is in `request.proposer_state`."""

    description: str
    """For people: `n-grams`."""

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """Return each one's guesses, at most its max_tokens, possibly none."""
        ...
