"""Guesses what followed the same words earlier in the same text (prompt lookup).

Owns an index per request that grows with its tokens: work per token does not depend on the context's length.
Deterministic. Pure. Must not know models, batches, or whether a guess was right.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from headrace.engine.speculation.proposer import Wanted

LEAST_MATCH = 2
"""Fewest tokens that must be the same. One says too little: measured, a quarter of its guesses are right."""
_LONGEST_MATCH = 16
"""Beyond it, longer matches are no better."""
_MAX_CANDIDATES = 8
"""Most earlier places that are compared, the latest first."""
_NOWHERE = -1


class NgramIndex:
    """Where each pair of tokens ended earlier: the latest place, and a chain back through all others."""

    __slots__ = ("_latest", "_num_indexed", "_previous")

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int], int] = {}
        self._previous = array("i")
        """[position of a pair's second token]: the place before it with the same pair."""
        self._num_indexed = 0

    def __repr__(self) -> str:
        return f"<NgramIndex {len(self._latest)} pairs in {self._num_indexed} tokens>"

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take in all tokens but the last, whose pair is the one to look up. Tokens only grow."""
        latest, previous = self._latest, self._previous
        for position in range(self._num_indexed, len(token_ids) - 1):
            if position == 0:
                previous.append(_NOWHERE)
                continue
            pair = (token_ids[position - 1], token_ids[position])
            previous.append(latest.get(pair, _NOWHERE))
            latest[pair] = position
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)

    def find(self, token_ids: Sequence[int]) -> int:
        """Return the position that followed the longest match of the text's end, the latest of equals; or -1.

        Only the latest places of the last pair are compared, each over a bounded length.
        """
        if len(token_ids) < LEAST_MATCH + 1:
            return _NOWHERE
        end = len(token_ids) - 1
        place = self._latest.get((token_ids[end - 1], token_ids[end]), _NOWHERE)
        best, best_length = _NOWHERE, 0
        for _ in range(_MAX_CANDIDATES):
            if place == _NOWHERE:
                break
            length = _match_length(token_ids, place, end)
            if length > best_length:
                best, best_length = place + 1, length
                if length >= _LONGEST_MATCH:
                    break
            place = self._previous[place]
        return best


def _match_length(token_ids: Sequence[int], place: int, end: int) -> int:
    """How many tokens up to `place` are those up to `end`, at most _LONGEST_MATCH. The last two are known."""
    length = LEAST_MATCH
    longest = min(_LONGEST_MATCH, place + 1)
    while length < longest and token_ids[place - length] == token_ids[end - length]:
        length += 1
    return length


class NgramProposer:
    """Continues each request's text as it went on after the longest earlier match of its end."""

    description = "n-grams"

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self._propose(item) for item in wanted]

    def _propose(self, wanted: Wanted) -> list[int]:
        request, max_tokens = wanted
        index = request.proposer_state
        if index is None:
            index = request.proposer_state = NgramIndex()
        assert isinstance(index, NgramIndex)
        token_ids = request.token_ids
        index.extend(token_ids)
        start = index.find(token_ids)
        if start < 0:
            return []
        guesses = token_ids[start : start + max_tokens]
        # What follows may run into the text's end: a text that repeats itself goes on repeating.
        period = len(token_ids) - start
        while len(guesses) < max_tokens:
            guesses.append(guesses[len(guesses) - period])
        return guesses
