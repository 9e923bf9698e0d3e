"""HAProxy's completion log: one line per ended request, and the terminal state that it stands for. Pure.

Must not know held requests or replicas.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from headrace.api.messages import TerminalState

MAX_LINE_BYTES = 4096


class Completion(msgspec.Struct, frozen=True, gc=False):
    """One line; the fields of `haproxy_answers.COMPLETION_LOG_FORMAT`. Times in milliseconds, -1: never."""

    id: str
    client_id: str = ""
    tenant: str = ""
    path: str = ""
    backend: str = ""
    server: str = ""
    status: int = 0
    termination: str = "--"
    request_ms: int = -1
    """Until the request's head was read."""
    wait_ms: int = -1
    """Then, until a server was to be connected: held by the router, waiting for a place."""
    connect_ms: int = -1
    first_byte_ms: int = -1
    """From the connection to the answer's head."""
    total_ms: int = -1
    bytes_in: int = 0
    bytes_out: int = 0
    retries: str = ""
    refused: str = "-"
    """The name of a later pass that fronts refused, and that comes again: its line ends nothing."""

    @property
    def is_end(self) -> bool:
        return self.refused in ("", "-")


def classify(completion: Completion) -> TerminalState:
    """Return how a request ended, from the status and HAProxy's termination state (manual 8.5).

    First letter: who ended it. C, c: the client left or stopped reading. S, s, P, I, R, D, K: server or
    gateway. L: HAProxy answered. The second letter says when; H, D: while headers, data came.
    """
    cause = completion.termination[:1]
    if cause in ("C", "c"):
        return TerminalState.ABORTED
    if 400 <= completion.status < 500 or (completion.status == 503 and cause in ("-", "L")):
        return TerminalState.REFUSED
    if 200 <= completion.status < 400 and cause in ("-", "L"):
        return TerminalState.FINISHED
    return TerminalState.FAILED


class CompletionDecoder:
    """Turns received bytes into completions. Lines that are not understood are counted and left out."""

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(Completion)
        self._buffer = bytearray()
        self.num_ignored = 0

    def feed(self, data: bytes) -> Iterator[Completion]:
        """Add received bytes; yield every complete line's completion."""
        buffer = self._buffer
        buffer += data
        *lines, rest = buffer.split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            self.num_ignored += 1
            rest = bytearray()
        self._buffer = bytearray(rest)
        for line in lines:
            if not line:
                continue
            try:
                yield self._decoder.decode(line)
            except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
                self.num_ignored += 1
