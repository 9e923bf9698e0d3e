"""How many tokens to guess for one request, from how often its guesses were right.

The rule: with acceptance p the j-th guess becomes a token with probability p^j, and its row takes time in
which the batch would have made `row_tokens` tokens. So guess as long as p^j >= row_tokens: that maximises the
batch's tokens per second (Dinkelbach's condition for a ratio, Management Science 13(7), 1967).
Pure. Must not know how guesses are made or verified, or the time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

_KEEP = 1.0 - 1.0 / 16
"""Per guess: what was seen 16 guesses ago counts a third."""
_PRIOR, _PRIOR_WEIGHT = 0.5, 1.0
"""Acceptance before anything was seen, and its weight in guesses."""
_LEAST_GAIN = 0.05
"""Guesses that come true less often than this are not made, however cheap rows are."""
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256
"""Steps without guesses before one is tried again; doubled each time it was in vain."""
_NUM_PROBES = 2


class DraftChoice(NamedTuple):
    """How many tokens to guess, and why."""

    num_tokens: int
    reason: str


class DraftController:
    """One request's acceptance, and when to try again after it stopped paying."""

    __slots__ = ("_accepted", "_num_paused", "_pause", "_tried")

    def __init__(self) -> None:
        self._accepted = _PRIOR * _PRIOR_WEIGHT
        self._tried = _PRIOR_WEIGHT
        self._num_paused = 0
        self._pause = _FIRST_PAUSE

    def __repr__(self) -> str:
        return f"<DraftController acceptance {self.acceptance:.2f}>"

    @property
    def acceptance(self) -> float:
        """Smoothed probability that a guess is right, given that all before it were; within (0, 1)."""
        return min(max(self._accepted / self._tried, 0.001), 0.999)

    def choose(self, max_tokens: int, row_tokens: float) -> DraftChoice:
        """Choose for the next step. `row_tokens`: tokens that the batch makes in the time of one more row."""
        if max_tokens < 1:
            return DraftChoice(0, "no room: the answer, the token budget or the KV memory ends")
        if row_tokens >= 1.0:
            return DraftChoice(0, f"off: a row costs {row_tokens:.2f} tokens, and brings at most one")
        p, least = self.acceptance, max(row_tokens, _LEAST_GAIN)
        num_tokens = min(int(math.log(least) / math.log(p)), max_tokens)
        if num_tokens >= 1:
            self._num_paused = 0
            return DraftChoice(num_tokens, f"on: acceptance {p:.2f}, a row costs {row_tokens:.2f} tokens")
        self._num_paused += 1
        if self._num_paused > self._pause:
            return DraftChoice(min(_NUM_PROBES, max_tokens), f"probe: after {self._pause} steps without")
        return DraftChoice(0, f"off: acceptance {p:.2f}, a row costs {row_tokens:.2f} tokens")

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """Take what became of a step's guesses; none says nothing."""
        if num_drafts < 1:
            return
        num_tried = num_accepted + (num_accepted < num_drafts)
        keep = _KEEP**num_tried
        self._accepted = keep * self._accepted + num_accepted
        self._tried = keep * self._tried + num_tried
        if self._num_paused > self._pause:  # that was a probe
            self._num_paused = 0
            self._pause = _FIRST_PAUSE if num_accepted else min(2 * self._pause, _LONGEST_PAUSE)
