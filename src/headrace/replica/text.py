"""From token ids to text, piece by piece: UTF-8 never split, stop strings found across token boundaries.

Owns the state of one answer's text. Every operation is O(1) amortised per token.
Must not know tokenizers' files, HTTP or frames.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """The bytes that each token stands for; empty for special tokens."""

    def __getitem__(self, token_id: int) -> bytes: ...


class TextDecoder:
    """Decodes the tokens of one answer. Bytes that are the beginning of a character wait for the rest."""

    __slots__ = ("_held", "_token_bytes")

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._held = b""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Add tokens; return the text that became certain, possibly empty."""
        table = self._token_bytes
        if len(token_ids) == 1:
            data = table[token_ids[0]]
        else:
            data = b"".join([table[token_id] for token_id in token_ids])
        if self._held:
            data = self._held + data
        text, num_bytes = codecs.utf_8_decode(data, "replace", False)
        self._held = data[num_bytes:]
        return text

    def finish(self) -> str:
        """Return what was waiting: U+FFFD for a character that never became whole."""
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")


class StopStrings:
    """Finds the first of several stop strings in a text that comes in pieces.

    Text that may be the beginning of a stop string is held back. The result does not depend on where the
    pieces end: the stop string that is complete first wins, and of those the longest. One Knuth-Morris-Pratt
    automaton per stop string (SIAM J. Comput. 6(2), 1977).
    """

    __slots__ = ("_failures", "_first_characters", "_held", "_matched", "_patterns", "found")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._patterns = tuple(stops)
        self._failures = tuple(_failure_function(stop) for stop in stops)
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._matched = [0] * len(stops)
        """How many characters of each stop string the text so far ends with."""
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        """Add text; return what can be sent. After `found` is set nothing comes any more."""
        if self.found is not None:
            return ""
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        whole = self._held + text
        for position in range(len(self._held), len(whole)):
            stop = self._advance(whole[position])
            if stop is not None:
                self.found = stop
                self._held = ""
                return whole[: position + 1 - len(stop)]
        num_held = max(self._matched)
        certain = len(whole) - num_held
        self._held = whole[certain:]
        return whole[:certain]

    def finish(self) -> str:
        """Return the text that was held back: the answer ended without completing a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        longest: str | None = None
        for index, pattern in enumerate(self._patterns):
            failure, matched = self._failures[index], self._matched[index]
            while matched and pattern[matched] != character:
                matched = failure[matched - 1]
            if pattern[matched] == character:
                matched += 1
            if matched == len(pattern) and (longest is None or len(pattern) > len(longest)):
                longest = pattern
            # A complete pattern ends the text, so its state is never advanced again.
            self._matched[index] = matched
        return longest


def _failure_function(pattern: str) -> tuple[int, ...]:
    """For each prefix of `pattern`: the length of its longest proper prefix that is also its suffix."""
    failure = [0] * len(pattern)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[position] != pattern[length]:
            length = failure[length - 1]
        if pattern[position] == pattern[length]:
            length += 1
        failure[position] = length
    return tuple(failure)
