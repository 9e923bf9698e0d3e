"""How many tokens to guess for one request: as many as pay, by how often its guesses were right.

The proposer says how often guesses like these are right in general; what is learned of this request shifts
the odds. The rule: the j-th guess becomes a token with probability P(j), that all up to it are right, and its
row takes time in which the batch would have made `row_tokens` tokens. So guess as long as P(j) >= row_tokens:
that maximises the batch's tokens per second (Dinkelbach's condition, Management Science 13(7), 1967).
Pure. Must not know how guesses are made or verified, or the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_LEARNING_RATE = 0.25
"""Step of the logistic regression that learns the shift: measured, 0.15 to 0.5 make no difference on text,
and some 8 wrong guesses turn a request off that has nothing to repeat."""
_MOST_SHIFT = 4.0
_LEAST_GAIN = 0.05
"""Guesses that come true less often than this are not made, however cheap rows are."""
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256
"""Guesses not made before one is tried again; doubled each time it was in vain."""


class DraftChoice(NamedTuple):
    """How many tokens to guess, and why."""

    num_tokens: int
    reason: str


class DraftController:
    """One request's luck with guesses, and when to try again after they stopped paying."""

    __slots__ = ("_expected", "_num_paused", "_pause", "_shift")

    def __init__(self, shift: float = 0.0) -> None:
        """`shift`: what other requests' luck suggests."""
        self._shift = shift
        """Added to the log odds of each guess."""
        self._expected: list[float] = []
        """What the last choice took for its guesses: the probability of each, given those before it."""
        self._num_paused = 0
        self._pause = _FIRST_PAUSE

    def __repr__(self) -> str:
        return f"<DraftController odds times {math.exp(self._shift):.2f}>"

    def choose(self, outlook: Sequence[float], row_tokens: float) -> DraftChoice:
        """Choose for the next step.

        `outlook`: how often such guesses are right in general, each given those before it, in (0, 1); at most
        as many are chosen. `row_tokens`: tokens that the batch makes in the time of one more row.
        """
        if not outlook:
            return DraftChoice(0, "nothing to guess")
        if row_tokens >= 1.0:
            return DraftChoice(0, f"off: a row costs {row_tokens:.2f} tokens, and brings at most one")
        factor, least = math.exp(self._shift), max(row_tokens, _LEAST_GAIN)
        probability = 1.0
        expected = self._expected
        expected.clear()
        for usual in outlook:
            odds = factor * usual / (1.0 - usual)
            conditional = odds / (1.0 + odds)
            probability *= conditional
            expected.append(conditional)
            if probability < least:
                break
        first = expected[0]
        num_tokens = len(expected) - (probability < least)
        if num_tokens:
            self._num_paused = 0
            return DraftChoice(num_tokens, f"on: acceptance {first:.2f}, a row costs {row_tokens:.2f} tokens")
        self._num_paused += 1
        if self._num_paused > self._pause:
            return DraftChoice(1, f"probe: after {self._pause} guesses not made")
        return DraftChoice(0, f"off: acceptance {first:.2f}, a row costs {row_tokens:.2f} tokens")

    def observe(self, num_drafts: int, num_accepted: int) -> float:
        """Take what became of the guesses of the last choice; return by how many more than expected were
        right, of those that were reached. None says nothing."""
        if num_drafts < 1:
            return 0.0
        surprise = sum(1.0 - p for p in self._expected[:num_accepted])
        if num_accepted < num_drafts:
            surprise -= self._expected[num_accepted]
        self._shift = learn(self._shift, _LEARNING_RATE * surprise)
        if self._num_paused > self._pause:  # that was a probe
            self._num_paused = 0
            self._pause = _FIRST_PAUSE if num_accepted else min(2 * self._pause, _LONGEST_PAUSE)
        return surprise


def learn(shift: float, change: float) -> float:
    """Return the changed shift of log odds, within its bounds."""
    return min(max(shift + change, -_MOST_SHIFT), _MOST_SHIFT)
