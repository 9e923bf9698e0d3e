"""Load reports to every router and controller that wants them.

Owns one connection per socket path, each with its own pace: a dead or hung listener delays no other.
Of the load only the newest report counts; finished requests are kept, up to a bound, until each listener
got them; of the prefix cache each router is told the changes. Must not know what is reported.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import FinishedRequest, LeaveBy, LoadReport, ReportAck, SetSleep, Siblings
from headrace.errors import ProtocolError, text_of
from headrace.replica.prefix_digest import PrefixDigest, PrefixFeed, PrefixNews

MIN_RETRY_S = 0.05
MAX_RETRY_S = 1.0
BUSY_INTERVAL_S = 0.05
CONTROLLER_INTERVAL_S = 0.2
"""A controller decides no more often, and hears of changes and ends at once."""
MIN_GAP_S = 0.01
"""Between two reports to one listener: the first news leave at once, and what follows them closely together.
A busy router would wake up for each single end, which HAProxy tells it anyway."""
_IO_LIMIT_S = 2.0
_MAX_KEPT = 4096
_MAX_PER_REPORT = 512
_CONTROLLER_SOCKET = "controller.sock"
_log = logging.getLogger(__name__)

Order = SetSleep | Siblings | LeaveBy
OnOrder = Callable[[Order], None]
"""Hears what a controller says: how deep the engine is to sleep, and who the siblings are."""
MakeReport = Callable[[list[FinishedRequest], PrefixNews], LoadReport]


class ReportSink:
    """One listener: connects, reports, reads acknowledgements, and starts over when the connection ends."""

    def __init__(
        self,
        path: str,
        make_report: MakeReport,
        interval_s: Callable[[], float],
        digest: PrefixDigest | None = None,
        on_order: OnOrder | None = None,
    ) -> None:
        self._path = path
        self._make_report = make_report
        self._interval_s = interval_s
        self._finished: deque[FinishedRequest] = deque(maxlen=_MAX_KEPT)
        self._news = asyncio.Event()
        self.is_router = Path(path).name != _CONTROLLER_SOCKET
        """Routers send requests, so a drain waits for their release; controllers do not."""
        self._prefixes: PrefixFeed | None = None
        if digest is not None and self.is_router:
            self._prefixes = digest.subscribe()
        self.is_connected = False
        self.is_released = False
        self._released_from = 0
        self._on_order = on_order

    def __repr__(self) -> str:
        state = "connected" if self.is_connected else "disconnected"
        return f"ReportSink({self._path}, {state}, {len(self._finished)} finished requests to tell)"

    def tell(self, finished: FinishedRequest) -> None:
        self._finished.append(finished)
        self._news.set()

    def notify(self) -> None:
        self._news.set()

    def has_news(self) -> bool:
        return bool(self._finished)

    async def run(self) -> None:
        """Report until cancelled."""
        retry_s = MIN_RETRY_S
        while True:
            try:
                async with asyncio.timeout(_IO_LIMIT_S):
                    reader, writer = await asyncio.open_unix_connection(self._path)
            except (OSError, TimeoutError):
                await asyncio.sleep(retry_s)
                retry_s = min(MAX_RETRY_S, 2 * retry_s)
                continue
            try:
                await self._serve(reader, writer)
                retry_s = MIN_RETRY_S
            except (OSError, TimeoutError, ProtocolError) as error:
                _log.info("reports to %s: %s", self._path, text_of(error))
            finally:
                self.is_connected = self.is_released = False
                writer.transport.abort()
            await asyncio.sleep(retry_s)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Return when the listener closed the connection. Raises OSError, TimeoutError, ProtocolError."""
        self.is_connected = True
        if self._prefixes is not None:
            self._prefixes.restart()
        loop = asyncio.get_running_loop()
        reading = asyncio.create_task(self._read(reader))
        reading.add_done_callback(lambda _: self._news.set())
        try:
            while not (reading.done() or writer.is_closing()):  # `reading` hears a moment later of the end
                self._news.clear()
                finished = [self._finished[i] for i in range(min(len(self._finished), _MAX_PER_REPORT))]
                news = PrefixNews() if self._prefixes is None else self._prefixes.take()
                writer.write(encode_frame(self._make_report(finished, news)))
                async with asyncio.timeout(_IO_LIMIT_S):
                    await writer.drain()
                self._forget(finished)
                if len(self._finished) >= _MAX_PER_REPORT:
                    continue
                sent_s = loop.time()
                least_s = 0.0 if self.is_router else CONTROLLER_INTERVAL_S
                await self._wait_for_news(max(self._interval_s(), least_s))
                await asyncio.sleep(max(0.0, sent_s + MIN_GAP_S - loop.time()))
            await reading
        finally:
            reading.cancel()

    def _forget(self, told: list[FinishedRequest]) -> None:
        # At the bound, older entries may have fallen out meanwhile.
        for entry in told:
            if self._finished and self._finished[0] is entry:
                self._finished.popleft()

    async def _wait_for_news(self, limit_s: float) -> None:
        if self._finished:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._news.wait()

    def ask_release(self, sequence: int) -> None:
        """Acknowledgements of reports before number `sequence` release nothing any more."""
        self.is_released = False
        self._released_from = sequence
        self._news.set()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        # Only a controller may put the engine to sleep, name siblings, or send it away.
        kinds = ReportAck if self.is_router or self._on_order is None else ReportAck | Order
        decoder: FrameDecoder[ReportAck | Order] = FrameDecoder(kinds)
        while data := await reader.read(65536):
            for message in decoder.feed(data):
                if isinstance(message, ReportAck):
                    if message.sequence >= self._released_from:
                        self.is_released = message.is_released
                elif self._on_order is not None:
                    self._on_order(message)


class Listener(Protocol):
    """A `ReportSink`, or what stands for one on a virtual clock."""

    is_released: bool

    @property
    def is_router(self) -> bool: ...

    @property
    def is_connected(self) -> bool: ...

    def tell(self, finished: FinishedRequest) -> None: ...

    def notify(self) -> None: ...

    def has_news(self) -> bool: ...

    def ask_release(self, sequence: int) -> None: ...


ListenerT = TypeVar("ListenerT", bound=Listener)


class Listeners(Generic[ListenerT]):
    """What all listeners of one front are told, and what they said together."""

    def __init__(self, sinks: list[ListenerT]) -> None:
        self.sinks = sinks

    def on_busy(self) -> None:
        """The replica was idle and is busy now: report at once, and often."""
        self.notify()

    def on_end(self, finished: FinishedRequest) -> None:
        """Report a request's end, at once."""
        for sink in self.sinks:
            sink.tell(finished)

    def notify(self) -> None:
        """Report at once: the state changed."""
        for sink in self.sinks:
            sink.notify()

    def has_router(self) -> bool:
        """Whether a router is connected."""
        return any(sink.is_router and sink.is_connected for sink in self.sinks)

    def ask_release(self, sequence: int) -> None:
        """Report at once; from report number `sequence` on, every router must release this replica anew."""
        for sink in self.sinks:
            sink.ask_release(sequence)

    def is_released(self) -> bool:
        """Whether every connected router will send no more requests."""
        return all(sink.is_released for sink in self.sinks if sink.is_router and sink.is_connected)

    def has_told_all(self) -> bool:
        """Whether every connected listener was sent every finished request."""
        return not any(sink.is_connected and sink.has_news() for sink in self.sinks)


class Reporter(Listeners[ReportSink]):
    """All listeners of one front, each with its connection."""

    def __init__(
        self,
        paths: list[str],
        make_report: MakeReport,
        interval_s: Callable[[], float],
        digest: PrefixDigest | None = None,
        on_order: OnOrder | None = None,
    ) -> None:
        super().__init__([ReportSink(path, make_report, interval_s, digest, on_order) for path in paths])

    async def run(self) -> None:
        """Report until cancelled."""
        async with asyncio.TaskGroup() as group:
            for sink in self.sinks:
                group.create_task(sink.run())
