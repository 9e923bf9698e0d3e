"""A front that records what HAProxy sends it, byte by byte as HTTP/1.1 sees it: headers, body, trailers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import httptools
from tests.integration.mock_front import MockFront


@dataclass
class Seen:
    """One request as it reached the front."""

    target: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    """Header fields in their order, and after the body the trailers."""
    trailers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


class _Parser:
    def __init__(self) -> None:
        self.finished: list[Seen] = []
        self._seen = Seen()
        self._is_in_head = True

    def on_message_begin(self) -> None:
        self._seen = Seen()
        self._is_in_head = True

    def on_url(self, url: bytes) -> None:
        self._seen.target += url.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        into = self._seen.headers if self._is_in_head else self._seen.trailers
        into.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self._is_in_head = False

    def on_body(self, data: bytes) -> None:
        self._seen.body += data

    def on_message_complete(self) -> None:
        self.finished.append(self._seen)


class RecordingFront(MockFront):
    """Answers every request with a small JSON object that tells its number."""

    def __init__(self, replica_id: str, endpoint: str, router_socket: str) -> None:
        super().__init__(replica_id, endpoint, router_socket)
        self.seen: list[Seen] = []
        self.num_bad = 0
        """Connections on which something came that is no HTTP."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        recorder = _Parser()
        parser = httptools.HttpRequestParser(recorder)
        while data := await reader.read(65_536):
            try:
                parser.feed_data(data)
            except httptools.HttpParserError:
                self.num_bad += 1
                return
            for request in recorder.finished:
                if not request.target.startswith("/health"):
                    self.seen.append(request)
                body = b'{"number":%d}' % len(self.seen)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            recorder.finished.clear()
