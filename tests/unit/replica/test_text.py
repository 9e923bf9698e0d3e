"""Text pieces: UTF-8 is never split, stop strings do not depend on where tokens end."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.replica.text import StopStrings, TextDecoder

BYTES = {i: bytes([i]) for i in range(256)}


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[begin:end] for begin, end in pairwise(places)]


def run_stops(stops: list[str], parts: list[str]) -> tuple[str, str | None]:
    matcher = StopStrings(stops)
    out = "".join(matcher.feed(part) for part in parts)
    return out + ("" if matcher.found else matcher.finish()), matcher.found


def oracle(stops: list[str], text: str) -> tuple[str, str | None]:
    """The stop string that is complete first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(st.text(), st.lists(st.integers(0, 400), max_size=12))
def test_bytes_cut_anywhere_give_the_same_text_and_only_whole_characters(text: str, cuts: list[int]) -> None:
    data = text.encode()
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    decoder = TextDecoder(BYTES)
    parts = [decoder.feed(data[a:b]) for a, b in pairwise(places)]
    assert "".join(parts) + decoder.finish() == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@given(st.binary(max_size=40))
def test_any_bytes_decode_as_they_would_at_once(data: bytes) -> None:
    decoder = TextDecoder(BYTES)
    text = "".join(decoder.feed([byte]) for byte in data) + decoder.finish()
    assert text == data.decode("utf-8", "replace")


def test_a_character_that_never_becomes_whole_is_replaced_at_the_end() -> None:
    decoder = TextDecoder(BYTES)
    assert decoder.feed("é".encode()[:1]) == ""
    assert decoder.finish() == "\ufffd"


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    st.text("abc", max_size=30),
    st.lists(st.integers(0, 30), max_size=10),
)
def test_stop_strings_do_not_depend_on_the_pieces(stops: list[str], text: str, cuts: list[int]) -> None:
    assert run_stops(stops, pieces(text, cuts)) == oracle(stops, text)


@pytest.mark.parametrize("cut", range(len("one<end>two") + 1))
def test_a_stop_string_is_found_over_every_split(cut: int) -> None:
    text = "one<end>two"
    assert run_stops(["<end>"], [text[:cut], text[cut:]]) == ("one", "<end>")


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["stop"])
    assert matcher.feed("a st") == "a "
    assert matcher.feed("ory") == "story"
    assert matcher.feed("sto") == ""
    assert matcher.finish() == "sto"


def test_nothing_comes_after_a_stop_string() -> None:
    matcher = StopStrings(["x"])
    assert matcher.feed("axb") == "a"
    assert matcher.feed("c") == ""
