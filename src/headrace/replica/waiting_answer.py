"""An answer that begins before there is one: a stream of comment lines while its request is held.

The client is told at once that it waits (`x-headrace-eta-s` is HAProxy's to add); then the real answer's
events follow in the same stream, or, if the request was refused meanwhile, one error event.
Owns the coding of both sides' bodies. Must not know sockets or who sends what.
Source: server-sent events (a line that begins with a colon is a comment), RFC 9112 (chunked coding).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import httptools

COMMENT_EVERY_S = 5.0
"""Shorter than the idle limits of proxies and load balancers on the way."""
MAX_REFUSAL_BYTES = 65_536
LAST_CHUNK = b"0\r\n\r\n"


def to_chunk(data: bytes) -> bytes:
    """Return `data` as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def comment(eta_s: float, waited_s: float) -> bytes:
    """Return a comment for people who look. `eta_s`: when a replica is expected; negative: not known."""
    if eta_s > 0:
        return b": waiting for a replica, expected in %d s\n\n" % max(1, round(eta_s))
    if eta_s == 0:
        return b": waiting for a replica, expected at any moment\n\n"
    return b": waiting for a replica for %d s\n\n" % round(waited_s)


class WaitingAnswer:
    """One such answer. `write` takes bytes for the client."""

    def __init__(self, write: Callable[[bytes], None], eta_s: float, now_s: float) -> None:
        self._write = write
        self._parser = httptools.HttpResponseParser(self)
        self._eta_s = eta_s
        self._began_s = self._told_s = now_s
        self._refusal = bytearray()
        self._status = 0
        self.state: Literal["waiting", "streaming", "ended", "broken"] = "waiting"
        """broken: what came is no answer, or was cut; the client must see that."""

    def __repr__(self) -> str:
        return f"<WaitingAnswer {self.state}>"

    def begin(self, head: bytes) -> None:
        """Send the head of a chunked stream, and the first comment."""
        self._write(head + to_chunk(comment(self._eta_s, 0.0)))

    def tick(self, now_s: float) -> None:
        """Send a comment if it is time, and nothing else has come yet."""
        if self.state == "waiting" and now_s - self._told_s >= COMMENT_EVERY_S:
            self._told_s = now_s
            waited_s = now_s - self._began_s
            eta_s = max(0.0, self._eta_s - waited_s) if self._eta_s >= 0 else -1.0
            self._write(to_chunk(comment(eta_s, waited_s)))

    def feed(self, data: bytes) -> None:
        """Take bytes of the real answer."""
        if self.state in ("ended", "broken"):
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.state = "broken"

    def end(self) -> None:
        """The real answer's connection has closed."""
        if self.state != "ended":
            self.state = "broken"

    def refuse(self, body: bytes) -> None:
        """End with an error event: there will be no real answer. body: the error as JSON, in one line."""
        if self.state == "waiting":
            self._write(to_chunk(b"data: %b\n\n" % body) + LAST_CHUNK)
            self.state = "ended"

    # ---- called by httptools

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if self._status == 200:
            self.state = "streaming"

    def on_body(self, data: bytes) -> None:
        if self._status == 200:
            self._write(to_chunk(data))
        else:
            self._refusal += data[: MAX_REFUSAL_BYTES - len(self._refusal)]

    def on_message_complete(self) -> None:
        if 100 <= self._status < 200:
            return  # an interim answer; the real one follows
        if self._status != 200:
            self.state = "waiting"
            self.refuse(bytes(self._refusal).replace(b"\n", b" ").replace(b"\r", b" "))
            return
        self._write(LAST_CHUNK)
        self.state = "ended"
