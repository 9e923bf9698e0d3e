"""The n-gram index: it finds what a search through the whole text finds, at a bounded cost per token."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from headrace.api.messages import GenerationRequest, SamplingParams
from headrace.engine.request import EngineRequest
from headrace.engine.speculation.ngram import NgramIndex, NgramProposer
from headrace.engine.speculation.proposer import Wanted


def new_request(prompt: list[int]) -> EngineRequest:
    return EngineRequest(GenerationRequest("r", prompt, SamplingParams(max_tokens=500)), 0, frozenset(), 4096)


def search(tokens: list[int]) -> tuple[int, int]:
    """What `find` promises, by brute force: of the 8 latest places of the last pair, the longest match."""
    last = len(tokens) - 1
    places = [p for p in range(last - 1, 0, -1) if tokens[p - 1 : p + 1] == tokens[last - 1 : last + 1]][:8]
    best, best_length = -1, 0
    for place in places:
        length = 2
        while length < 16 and place - length >= 0 and tokens[place - length] == tokens[last - length]:
            length += 1
        if length > best_length:
            best, best_length = place + 1, length
    return best, best_length


def propose(request: EngineRequest, max_tokens: int) -> list[int]:
    proposer = NgramProposer()
    if not proposer.outlook(request, max_tokens):
        return []
    return proposer.propose([Wanted(request, max_tokens)])[0]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 60))
def test_the_index_grown_token_by_token_finds_what_a_search_finds(tokens: list[int], start: int) -> None:
    index = NgramIndex()
    for length in range(min(start, len(tokens)), len(tokens) + 1):
        index.extend(tokens[:length])
        match_length = index.find(tokens[:length])
        assert (index.start, match_length) == search(tokens[:length])


def test_the_longest_match_is_continued() -> None:
    request = new_request([1, 2, 3, 4, 5, 6, 9, 2, 3, 7, 7, 1, 2, 3])
    assert propose(request, 4) == [4, 5, 6, 9]


def test_a_text_that_repeats_itself_is_taken_to_go_on() -> None:
    request = new_request([5, 1, 2, 3, 1, 2, 3])
    assert propose(request, 8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_new_words_and_short_texts_give_no_guess() -> None:
    for prompt in ([1], [1, 1], [1, 2], [1, 2, 3, 4]):
        assert propose(new_request(prompt), 4) == []


def test_longer_matches_promise_more_and_each_right_guess_makes_the_match_longer() -> None:
    proposer = NgramProposer()
    short = proposer.outlook(new_request([9, 1, 2, 5, 5, 8, 1, 2]), 32)
    long = proposer.outlook(new_request([9, 1, 2, 5, 5, 9, 1, 2]), 32)
    assert len(short) == len(long) == 32
    assert list(short[1:5]) == list(long[:4])
    assert list(short) == sorted(short)
    assert 0 < short[0] < long[0] < 1


def test_a_token_costs_the_same_at_any_length_of_the_text() -> None:
    """Counts the tokens that are read, not seconds."""

    class CountingList(list[int]):
        reads = 0

        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            CountingList.reads += len(range(*key.indices(len(self)))) if isinstance(key, slice) else 1
            return super().__getitem__(key)

    generator = random.Random(7)
    reads = []
    for length in (1000, 8000):
        request = new_request([generator.randrange(6) for _ in range(length)])
        propose(request, 4)
        request.token_ids = CountingList(request.token_ids)
        CountingList.reads = 0
        for _ in range(100):
            request.token_ids.append(generator.randrange(6))
            propose(request, 4)
        reads.append(CountingList.reads)
    assert max(reads) <= 1.2 * min(reads), reads
