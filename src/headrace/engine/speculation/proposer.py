"""The seam of those who guess: tokens that may follow a request's tokens, to be verified in the same step.

A guess costs nothing but time: which tokens come out never depends on it (`verify`).
Must not know sampling, logits, or how many guesses pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from headrace.engine.request import EngineRequest


class Wanted(NamedTuple):
    """A request that takes up to `max_tokens` (>= 1) guesses. Its block table has room for all of them behind
    its tokens."""

    request: EngineRequest
    max_tokens: int


class Proposer(Protocol):
    """Turn: outlook (of each request), then propose (for several at once). What it keeps of a request is in
    `request.proposer_state`."""

    description: str
    """For people: `n-grams`."""

    def outlook(self, request: EngineRequest, max_tokens: int) -> Sequence[float]:
        """Return how often guesses like the next ones are right in general: of each, at most `max_tokens`,
        the probability in (0, 1), given that those before it are. Empty: there is nothing to guess."""
        ...

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """Return each one's guesses, at most its max_tokens, possibly none. Each had an outlook with the same
        tokens."""
        ...

    def sleep(self, level: Literal[1, 2]) -> None:
        """Give memory back, as `ModelRunner.sleep`. No request is open."""
        ...

    def wake(self) -> None:
        """Take the memory again, as `ModelRunner.wake`."""
        ...
