"""Load reports of one simulated front to one listener, with the pace of `replica.report`.

Owns the connection, what its listener was told, and the release that a router gave. Must not know what is
reported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from headrace.api.messages import FinishedRequest, LoadReport, ReportAck
from headrace.api.run_paths import CONTROLLER_SOCKET
from headrace.replica.prefix_digest import PrefixDigest, PrefixFeed, PrefixNews
from headrace.replica.report import MAX_RETRY_S, MIN_GAP_S, MIN_RETRY_S
from headrace.sim.machine import Process
from headrace.sim.network import MAX_UNREAD, End, Weather, connect
from headrace.sim.timeline import Timer

IO_LIMIT_S = 2.0
MAX_PER_REPORT = 512
MakeReport = Callable[[list[FinishedRequest], PrefixNews], LoadReport]


class ReportSink:
    """One listener: connects, reports, reads what comes back, and starts over when the connection ends."""

    def __init__(
        self,
        front: Process,
        weather: Weather,
        address: str,
        make_report: MakeReport,
        interval_s: Callable[[], float],
        digest: PrefixDigest | None,
    ) -> None:
        """digest: of a router only, which is told what is cached."""
        self._front = front
        self._weather = weather
        self._address = address
        self._make_report = make_report
        self._interval_s = interval_s
        self._finished: deque[FinishedRequest] = deque(maxlen=4096)
        self._prefixes: PrefixFeed | None = digest.subscribe() if digest is not None else None
        self.is_router = not address.endswith(CONTROLLER_SOCKET)
        self._end: End | None = None
        self._next: Timer | None = None
        self._next_s = 0.0
        self._sent_s = -1.0
        self._blocked_since_s: float | None = None
        self._retry_s = MIN_RETRY_S
        self.is_released = False
        self._released_from = 0
        self.on_message: Callable[[Any], None] = lambda message: None
        """Everything but acknowledgements."""
        self._connect()

    @property
    def is_connected(self) -> bool:
        return self._end is not None

    def has_news(self) -> bool:
        return bool(self._finished)

    def tell(self, finished: FinishedRequest) -> None:
        self._finished.append(finished)
        self.notify()

    def notify(self) -> None:
        """Report at once, but not closely after the last one."""
        if self._end is not None:
            now_s = self._front.timeline.now_s
            self._schedule(max(now_s, self._sent_s + MIN_GAP_S))

    def ask_release(self, sequence: int) -> None:
        """Acknowledgements of reports before number `sequence` release nothing any more."""
        self.is_released = False
        self._released_from = sequence
        self.notify()

    # ---- the connection

    def _connect(self) -> None:
        connect(self._front, self._weather, self._address, self._on_connected, self._retry)

    def _retry(self) -> None:
        self._front.after(self._retry_s, self._connect, "report retry")
        self._retry_s = min(MAX_RETRY_S, 2 * self._retry_s)

    def _on_connected(self, end: End) -> None:
        self._end = end
        end.on_message = self._on_reply
        end.on_close = self._on_lost
        self._retry_s = MIN_RETRY_S
        self._blocked_since_s = None
        if self._prefixes is not None:
            self._prefixes.restart()
        self._report()

    def _on_lost(self) -> None:
        self._end = None
        self.is_released = False
        if self._next is not None:
            self._next.cancel()
            self._next = None
        self._retry()

    def _on_reply(self, message: object) -> None:
        if isinstance(message, ReportAck):
            if message.sequence >= self._released_from:
                self.is_released = message.is_released
        else:
            self.on_message(message)

    # ---- reports

    def _schedule(self, when_s: float) -> None:
        if self._next is not None:
            if self._next_s <= when_s:
                return
            self._next.cancel()
        self._next_s = when_s
        self._next = self._front.after(when_s - self._front.timeline.now_s, self._report, "report")

    def _report(self) -> None:
        self._next = None
        end = self._end
        if end is None:
            return
        now_s = self._front.timeline.now_s
        if end.peer.num_unread > MAX_UNREAD:
            self._wait_for_reader(end, now_s)
            return
        self._blocked_since_s = None
        finished = [self._finished.popleft() for _ in range(min(len(self._finished), MAX_PER_REPORT))]
        news = PrefixNews() if self._prefixes is None else self._prefixes.take()
        report = self._make_report(finished, news)
        end.send(report)
        if self._front.random.random() < self._weather.duplicate_ratio:
            end.send(report)
        self._sent_s = now_s
        self._schedule(now_s + (MIN_GAP_S if self._finished else max(MIN_GAP_S, self._interval_s())))

    def _wait_for_reader(self, end: End, now_s: float) -> None:
        """The socket's buffer is full: wait a moment, then give the connection up."""
        if self._blocked_since_s is None:
            self._blocked_since_s = now_s
        if now_s - self._blocked_since_s > IO_LIMIT_S:
            end.close()
            self._on_lost()
        else:
            self._schedule(now_s + 0.1)
