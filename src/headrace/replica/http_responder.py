"""The seam between routes and connections: how one request is answered, whatever HTTP it came over.

Must not know sockets or frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import msgspec

from headrace.api.openai import describe_error
from headrace.errors import RequestError


class Responder(ABC):
    """Answers one request: whole (`send`), or as a stream (`start`, then `write`, at last `end`)."""

    __slots__ = ("is_done", "on_gone")

    def __init__(self) -> None:
        self.is_done = False
        """Answered, or the client is gone."""
        self.on_gone: Callable[[], None] | None = None
        """Called at most once, when the client leaves before the answer's end."""

    @abstractmethod
    def send(
        self, status: int, body: bytes, headers: str = "", content_type: str = "application/json"
    ) -> None:
        """Send a whole answer. `headers`: further `name: value\\r\\n` lines."""

    @abstractmethod
    def start(self, headers: str = "") -> bytes:
        """Return the head of a streamed answer, to be sent with the first frames."""

    @abstractmethod
    def write(self, head: bytes, frames: bytes) -> None:
        """Send `frames`, at once; `head` is what `start` gave, or empty."""

    @abstractmethod
    def end(self, head: bytes, frames: bytes) -> None:
        """Send the last frames and end the stream."""

    @abstractmethod
    def close_after(self) -> None:
        """Close the connection after this answer."""

    def send_error(self, error: RequestError, headers: str = "") -> None:
        """Send `error` in OpenAI's shape."""
        self.send(error.status, msgspec.json.encode(describe_error(error)), headers + retry_header(error))

    def gone(self) -> None:
        """The client left. Called by the connection."""
        callback, self.on_gone, self.is_done = self.on_gone, None, True
        if callback is not None:
            callback()


def retry_header(error: RequestError) -> str:
    """Return the Retry-After line of `error`, in whole seconds as HTTP wants it, or nothing."""
    if error.retry_after_s is None:
        return ""
    return f"retry-after: {max(1, round(error.retry_after_s))}\r\n"
