"""The passes of one request of the relay: how often it is sent, why it comes again, and after which pause.

HAProxy says of an answer that it is none: no router and no replica was there, or every front that was asked
refused. Owns the count, the pauses and the limits. No I/O: `now_s` comes in. Must not know sockets, or what
the request is.
"""

from __future__ import annotations

from typing import Literal

AGAIN_HEADER = b"\r\nx-headrace-again:"
"""HAProxy's word that the request is to come again: `refused` by fronts, or (anything else) nobody there."""
AGAIN_S = 0.25
MAX_AGAIN_S = 4.0
AGAIN_LIMIT_S = 30.0
"""A router is back within a second or two; after so long its gateway is beyond help."""
MAX_REFUSED = 7
"""Passes that may be refused before the last one. With their pauses nearly 16 s beside the time for which the
router holds the request, which is limited from its arrival: longer than any change of replicas takes to be
known."""
LAST = "last"
"""The name of the pass whose answer is the client's, whatever it is."""
MAX_HEAD_BYTES = 65_536

Word = Literal["away", "refused"]


def read_word(first: bytes | bytearray) -> Word | Literal["answer", "unknown"]:
    """Return what a pass's answer that begins so is: HAProxy's word to come again, or an answer. unknown:
    more of it is needed."""
    status = b"HTTP/1.1 503"
    if not first.startswith(status[: len(first)]):
        return "answer"
    head, end, _ = bytes(first).partition(b"\r\n\r\n")
    if not end:
        return "unknown" if len(first) < MAX_HEAD_BYTES else "answer"
    _, found, rest = head.lower().partition(AGAIN_HEADER)
    if not found:
        return "answer"
    return "refused" if rest.split(b"\r\n", 1)[0].strip() == b"refused" else "away"


class Passes:
    """The passes of one request. Its client's own was the first."""

    def __init__(self) -> None:
        self._num_passes = 1
        self._num_refused = 0
        self._away_since_s: float | None = None

    def __repr__(self) -> str:
        return f"<Passes {self._num_passes}, {self._num_refused} refused>"

    def begin(self) -> str:
        """A pass begins: return its name, which no other one of the request has but the last."""
        self._num_passes += 1
        return LAST if self._num_refused >= MAX_REFUSED else str(self._num_passes)

    def pause_s(self, word: Word, now_s: float) -> float | None:
        """Return for how long to wait before the next pass; None: there is no other one."""
        if word == "refused":
            self._away_since_s = None
            self._num_refused += 1
            pause_s = min(AGAIN_S * 2 ** (self._num_refused - 1), MAX_AGAIN_S)
            return pause_s if self._num_refused <= MAX_REFUSED else None
        if self._away_since_s is None:
            self._away_since_s = now_s
        return AGAIN_S if now_s - self._away_since_s <= AGAIN_LIMIT_S else None
