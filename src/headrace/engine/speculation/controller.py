"""How likely one request's guesses are to be right, and when to try again after they stopped paying.

The proposer says how often guesses like these are right in general; what is learned of this request shifts
the odds. Pure. Must not know how guesses are made or verified, what they cost, or the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_LEARNING_RATE = 0.25
"""Step of the logistic regression that learns the shift: measured, 0.15 to 0.5 make no difference on text,
and some 8 wrong guesses turn a request off that has nothing to repeat."""
_MOST_SHIFT = 4.0
_LEAST_GAIN = 0.05
"""Guesses that come true less often than this are not made, however cheap rows are."""
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256
"""Guesses not made before one is tried again; doubled each time it was in vain."""


class DraftController:
    """One request's luck with guesses. Turn: expect, settle, and observe if guesses were made."""

    __slots__ = ("_expected", "_num_paused", "_pause", "_shift")

    def __init__(self, shift: float = 0.0) -> None:
        """`shift`: what other requests' luck suggests."""
        self._shift = shift
        """Added to the log odds of each guess."""
        self._expected: list[float] = []
        """What was expected last: the probability of each guess, given those before it."""
        self._num_paused = 0
        self._pause = _FIRST_PAUSE

    def __repr__(self) -> str:
        return f"<DraftController odds times {math.exp(self._shift):.2f}, {self._num_paused} not made>"

    def expect(self, outlook: Sequence[float]) -> list[float]:
        """Return for each guess the probability that it becomes a token, as far as that is worth a row.

        `outlook`: how often such guesses are right in general, each given those before it, in (0, 1).
        """
        factor, probability = math.exp(self._shift), 1.0
        expected = self._expected
        expected.clear()
        probabilities: list[float] = []
        for usual in outlook:
            odds = factor * usual / (1.0 - usual)
            conditional = odds / (1.0 + odds)
            expected.append(conditional)
            probability *= conditional
            if probability < _LEAST_GAIN:
                break
            probabilities.append(probability)
        return probabilities

    def settle(self, num_paying: int) -> int:
        """Return how many guesses to make of those expected last, given how many pay: as many; or one, to
        see whether it is still so, after a long pause. With nothing to guess there is nothing to settle."""
        if num_paying:
            self._num_paused = 0
            return num_paying
        if not self._expected:
            return 0
        self._num_paused += 1
        return int(self._num_paused > self._pause)

    def observe(self, num_drafts: int, num_accepted: int) -> float:
        """Take what became of the guesses; return by how many more than expected were right, of those that
        were reached. None says nothing."""
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
