"""A front without a model, for tests of the gateway: HTTP, event streams, load reports, in this event loop.

The request says what its answer looks like: {"mock": {"events": 3, "gap_s": 0.01, "status": 200}}.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import FinishedRequest, LoadReport, ReplicaState, ReportAck, TerminalState

REPORT_PERIOD_S = 0.05
_pids = itertools.count(1_000_000)


@dataclass
class MockFront:
    """One replica. `start()` it, `kill()` it like a process that dies, or `drain()` it."""

    replica_id: str
    endpoint: str
    router_socket: str
    max_open: int = 64
    state: ReplicaState = "ready"
    is_reporting_finished: bool = False
    lease_s: float = 1.0
    open_requests: set[str] = field(default_factory=set)
    served: list[str] = field(default_factory=list)
    headers_seen: list[dict[str, str]] = field(default_factory=list)
    bodies_seen: list[bytes] = field(default_factory=list)
    """The first 200 bytes of each."""
    body_hashes: list[bytes] = field(default_factory=list)
    fail_before_first_byte: bool = False
    is_refusing: bool = False
    """It refuses each request, as a front does that leaves beside ready siblings."""
    num_refused: int = 0
    is_released: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0
    is_silent: bool = False
    is_cut: bool = False

    async def start(self) -> MockFront:
        self.pid = next(_pids)
        self._sequence = 0
        self._finished: list[FinishedRequest] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_killed = False
        self._wake = asyncio.Event()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        self._reporter = asyncio.create_task(self._report_for_ever())
        return self

    async def kill(self) -> None:
        """Close everything at once, as the end of the process would."""
        self._is_killed = True
        self._reporter.cancel()
        # asyncio loses a connection that was accepted but has no transport yet when its server closes (the
        # transport's constructor asserts that the server is open). So: accept no more, let those become
        # transports (two turns of the loop), then close.
        for listener in self._server.sockets:
            asyncio.get_running_loop().remove_reader(listener.fileno())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in [*self._tasks, self._reporter]:
            task.cancel()
        await asyncio.gather(*self._tasks, self._reporter, return_exceptions=True)

    def drain(self) -> None:
        self.state = "draining"
        self._wake.set()

    def lose_reports(self, *, is_silent: bool) -> None:
        """Report no more: over an open connection (is_silent), or by losing it."""
        self.is_silent = is_silent
        self.is_cut = not is_silent
        self._wake.set()

    def report_again(self) -> None:
        self.is_silent = self.is_cut = False

    def report_now(self) -> None:
        self._wake.set()

    async def _report_for_ever(self) -> None:
        while True:
            if self.is_cut:
                await asyncio.sleep(0.01)
                continue
            try:
                reader, writer = await asyncio.open_unix_connection(self.router_socket)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            acks = asyncio.create_task(self._read_acks(reader))
            try:
                while not acks.done() and not self.is_cut:
                    self._wake.clear()
                    if not self.is_silent:
                        writer.write(encode_frame(self._report()))
                        await writer.drain()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(REPORT_PERIOD_S):
                            await self._wake.wait()
            except OSError:
                pass
            finally:
                acks.cancel()
                writer.transport.abort()

    async def _read_acks(self, reader: asyncio.StreamReader) -> None:
        decoder: FrameDecoder[ReportAck] = FrameDecoder(ReportAck)
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                for ack in decoder.feed(data):
                    if ack.is_released:
                        self.is_released.set()

    def _report(self) -> LoadReport:
        self._sequence += 1
        finished, self._finished = self._finished, []
        return LoadReport(
            replica_id=self.replica_id,
            endpoint=self.endpoint,
            model="mock",
            address=f"127.0.0.1:{self.port}",
            pid=self.pid,
            sequence=self._sequence,
            lease_s=self.lease_s,
            state=self.state,
            num_open=len(self.open_requests),
            max_open=self.max_open,
            finished=finished if self.is_reporting_finished else [],
        )

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a connection. Not a coroutine: one that is cancelled before it runs would leave it open."""
        if self._is_killed:
            writer.transport.abort()
            return
        self._writers.add(writer)
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._close(done, writer))

    def _close(self, task: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        self._tasks.discard(task)
        self._writers.discard(writer)
        writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while await self._serve_one(reader, writer):
                pass

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if head[0].startswith("GET /health"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            return True
        if self.fail_before_first_byte:
            writer.transport.abort()
            return False
        request_id = headers["x-headrace-request-id"]
        self.headers_seen.append(headers)
        self.bodies_seen.append(body[:200])
        self.body_hashes.append(hashlib.sha256(body).digest())
        self.open_requests.add(request_id)
        state, num_tokens = TerminalState.ABORTED, 1
        try:
            if self.is_refusing:
                state, num_tokens = TerminalState.REFUSED, 0
                self._refuse(writer)
            else:
                await self._answer(json.loads(body).get("mock", {}), writer)
                state = TerminalState.FINISHED
        finally:
            self.open_requests.discard(request_id)
            if not self.is_refusing:
                self.served.append(request_id)
            self._finished.append(
                FinishedRequest(request_id, state, "stop", "", num_tokens, 0, num_tokens, 0.0, 0.0)
            )
            self._wake.set()
        return True

    def _refuse(self, writer: asyncio.StreamWriter) -> None:
        self.num_refused += 1
        error = b'{"error":{"message":"this replica is leaving","code":"overloaded"}}'
        head = b"HTTP/1.1 503 X\r\nretry-after: 1\r\ncontent-length: %d\r\n\r\n" % len(error)
        writer.write(head + error)

    async def _answer(self, wishes: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        events = wishes.get("events", 1)
        status = wishes.get("status", 200)
        who = self.replica_id.encode()
        writer.write(
            b"HTTP/1.1 %d X\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            b"x-replica: %b\r\n\r\n" % (status, who)
        )
        for number in range(events):
            if wishes.get("gap_s"):
                await asyncio.sleep(wishes["gap_s"])
            event = b"data: %d\n\n" % number
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
        end = b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(end), end))
        await writer.drain()
