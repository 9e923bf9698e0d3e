"""Guesses what followed the same words earlier in the same text (prompt lookup).

Owns an index per request that grows with its tokens: work per token does not depend on the context's length.
Deterministic. Pure. Must not know models, batches, or whether a guess was right.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Literal

from headrace.engine.request import EngineRequest
from headrace.engine.speculation.proposer import Wanted

LEAST_MATCH = 2
"""Fewest tokens that must be the same."""
_LONGEST_MATCH = 16
"""Beyond it, longer matches say no more."""
_ACCEPTANCE = (0.5, 0.6, 0.7, 0.75, 0.78, 0.8, 0.83, 0.86, 0.88, 0.9, 0.91, 0.92, 0.93, 0.94, *[0.96] * 48)
"""How often what followed a match of 2, 3, ... tokens follows again. Measured on SmolLM2-135M continuing
code, summarising documents and chatting, smoothed. Each right guess makes the match longer."""
_MAX_CANDIDATES = 8
"""Most earlier places that are compared, the latest first."""
_NOWHERE = -1


class NgramIndex:
    """Where each pair of tokens ended earlier: the latest place, and a chain back through all others."""

    __slots__ = ("_latest", "_num_indexed", "_previous", "start")

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int], int] = {}
        self._previous = array("i")
        """[position of a pair's second token]: the place before it with the same pair."""
        self._num_indexed = 0
        self.start = _NOWHERE
        """Where the text went on after the match that was found last."""

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
        """Find the longest match of the text's end, the latest of equals; return its length (0: none) and set
        `start`. Only the latest places of the last pair are compared, each over a bounded length."""
        self.start = _NOWHERE
        if len(token_ids) < LEAST_MATCH + 1:
            return 0
        end = len(token_ids) - 1
        place = self._latest.get((token_ids[end - 1], token_ids[end]), _NOWHERE)
        best_length = 0
        for _ in range(_MAX_CANDIDATES):
            if place == _NOWHERE:
                break
            length = _match_length(token_ids, place, end)
            if length > best_length:
                self.start, best_length = place + 1, length
                if length >= _LONGEST_MATCH:
                    break
            place = self._previous[place]
        return best_length


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

    def outlook(self, request: EngineRequest, max_tokens: int) -> Sequence[float]:
        index = request.proposer_state
        if index is None:
            index = request.proposer_state = NgramIndex()
        assert isinstance(index, NgramIndex)
        index.extend(request.token_ids)
        length = index.find(request.token_ids)
        return _ACCEPTANCE[length - LEAST_MATCH :][:max_tokens] if length else ()

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [_continue(request, max_tokens) for request, max_tokens in wanted]

    def sleep(self, level: Literal[1, 2]) -> None:
        """What it keeps goes with the requests."""

    def wake(self) -> None: ...


def _continue(request: EngineRequest, max_tokens: int) -> list[int]:
    """Return how the text went on after the match that `outlook` found."""
    index, token_ids = request.proposer_state, request.token_ids
    assert isinstance(index, NgramIndex), f"{request!r} was not looked up"
    start = index.start
    guesses = token_ids[start : start + max_tokens]
    # What follows may run into the text's end: a text that repeats itself goes on repeating.
    period = len(token_ids) - start
    while len(guesses) < max_tokens:
        guesses.append(guesses[len(guesses) - period])
    return guesses
