"""What is kept of one request: its times, its tokens, and how it failed.

Owns the definitions of TTFT, ITL, TPOT and end to end. Must not know HTTP or who measures.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import pairwise


class ErrorKind:
    """Kinds of failure, as they are counted. An HTTP status S is counted as `http_S`."""

    CONNECT = "connect"
    """No connection: refused, unreachable, TLS failed."""
    TIMEOUT = "timeout"
    """The whole answer did not come within the time limit."""
    DISCONNECTED = "disconnected"
    """The connection ended before the head of the answer."""
    CUT = "cut"
    """The stream ended without [DONE]."""
    ERROR_EVENT = "error_event"
    """The stream carried an error."""
    MALFORMED = "malformed"
    """Not HTTP, not an event stream, or an event that is not JSON of the expected shape."""
    CLIENT_LIMIT = "client_limit"
    """This client had no connection left to send it on."""


@dataclass(slots=True)
class RequestRecord:
    """One request as the client saw it. All times are in seconds on one monotonic clock."""

    index: int
    scheduled_s: float
    """When it should have been sent: latencies count from here."""
    sent_s: float = 0.0
    """When the client came to send it."""
    end_s: float = 0.0
    """When the stream's end ([DONE]) was received, or when it failed."""
    token_times: array[float] = field(default_factory=lambda: array("d"))
    """When each chunk that carries generated text was received."""
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_completion_tokens: int | None = None
    """From the server's `usage`; None when it gave none."""
    is_done: bool = False
    """[DONE] was received."""
    error: str = ""
    """The kind of failure; empty: none."""
    error_detail: str = ""

    def fail(self, kind: str, detail: str) -> None:
        """Note a failure. The first one wins: what follows is its consequence."""
        if not self.error:
            self.error = kind
            self.error_detail = detail

    @property
    def is_ok(self) -> bool:
        return self.is_done and not self.error

    @property
    def num_output_tokens(self) -> int:
        """Tokens by the server's count, else the chunks that carried text."""
        return len(self.token_times) if self.num_completion_tokens is None else self.num_completion_tokens

    @property
    def ttft_s(self) -> float | None:
        """Scheduled time to the first chunk with text; None when none came."""
        return self.token_times[0] - self.scheduled_s if self.token_times else None

    @property
    def end_to_end_s(self) -> float:
        return self.end_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """(end to end - TTFT) / (output tokens - 1); None with fewer than two tokens."""
        if not self.token_times or self.num_output_tokens < 2:
            return None
        return (self.end_s - self.token_times[0]) / (self.num_output_tokens - 1)

    def gaps_s(self) -> list[float]:
        """Each gap between two chunks with text: the ITL samples."""
        return [after - before for before, after in pairwise(self.token_times)]
