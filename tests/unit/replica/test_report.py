"""Load reports reach every listener, whatever the others do."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import uvloop

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import FinishedRequest, LoadReport, ReportAck, TerminalState
from headrace.replica import report
from headrace.replica.prefix_digest import PrefixNews
from headrace.replica.report import CONTROLLER_INTERVAL_S, Reporter

pytestmark = pytest.mark.slow


class Listener:
    """A router as its fronts see it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self.reports: list[LoadReport] = []
        self.is_released = False
        self.answer = b""
        """Sent instead of an acknowledgement."""

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        decoder: FrameDecoder[LoadReport] = FrameDecoder(LoadReport)
        with suppress(OSError):
            while data := await reader.read(65536):
                for report in decoder.feed(data):
                    self.reports.append(report)
                    writer.write(self.answer or encode_frame(ReportAck(report.sequence, self.is_released)))
        writer.close()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        with suppress(FileNotFoundError):
            os.unlink(self._path)

    @property
    def finished_ids(self) -> list[str]:
        return [finished.request_id for report in self.reports for finished in report.finished]


class World:
    """A reporter and its listeners."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sequence = 0
        self.made_s: dict[int, float] = {}
        """When each report was made, by its number."""
        self.interval_s = 10.0
        self.reporter = Reporter(
            [self.path("router.sock"), self.path("controller.sock")],
            self.make_report,
            lambda: self.interval_s,
        )

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def make_report(self, finished: list[FinishedRequest], _prefixes: PrefixNews) -> LoadReport:
        self.sequence += 1
        self.made_s[self.sequence] = asyncio.get_running_loop().time()
        return LoadReport("chat-1", "chat", "m", "", 1, self.sequence, 3.0, "ready", finished=finished)

    async def wait(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - the condition is on what other tasks did
                await asyncio.sleep(0.002)

    @asynccontextmanager
    async def listening(self, name: str) -> AsyncIterator[Listener]:
        listener = Listener(self.path(name))
        await listener.start()
        try:
            yield listener
        finally:
            await listener.stop()

    @asynccontextmanager
    async def reporting(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.reporter.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.fixture
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="headrace-") as directory:
        yield World(Path(directory))


def finished(request_id: str) -> FinishedRequest:
    return FinishedRequest(request_id, TerminalState.FINISHED, "stop", "", 1, 0, 1, 0.1, 0.2)


async def test_a_finish_is_reported_at_once_and_to_every_listener(world: World) -> None:
    listeners = world.listening("router.sock"), world.listening("controller.sock")
    async with listeners[0] as router, listeners[1] as controller, world.reporting():
        await world.wait(lambda: bool(router.reports and controller.reports))
        world.reporter.on_end(finished("a"))
        await world.wait(lambda: router.finished_ids == controller.finished_ids == ["a"])
        await world.wait(world.reporter.has_told_all)


async def test_reports_come_at_the_interval(world: World) -> None:
    world.interval_s = 0.02
    async with world.listening("router.sock") as router, world.reporting():
        await world.wait(lambda: len(router.reports) >= 5)
    sequences = [report.sequence for report in router.reports]
    assert sequences == sorted(set(sequences))


async def test_a_controller_hears_no_more_often_than_it_decides(world: World) -> None:
    world.interval_s = 0.02
    async with world.listening("controller.sock") as controller, world.reporting():
        await world.wait(lambda: len(controller.reports) >= 3)
    made_s = [world.made_s[report.sequence] for report in controller.reports]
    assert all(later - earlier >= CONTROLLER_INTERVAL_S for earlier, later in pairwise(made_s))


async def test_a_listener_that_comes_back_hears_what_it_missed_in_order(world: World) -> None:
    async with world.reporting():
        async with world.listening("router.sock") as router:
            await world.wait(lambda: bool(router.reports))
        await world.wait(lambda: not world.reporter.has_router())
        for index in range(1000):
            world.reporter.on_end(finished(str(index)))
        async with world.listening("router.sock") as router:
            await world.wait(lambda: len(router.finished_ids) >= 1000)
    assert router.finished_ids == [str(index) for index in range(1000)]
    assert max(len(report.finished) for report in router.reports) <= 512


async def test_what_a_lost_listener_misses_is_bounded(world: World) -> None:
    for index in range(10_000):
        world.reporter.on_end(finished(str(index)))
    async with world.listening("router.sock") as router, world.reporting():
        await world.wait(lambda: router.finished_ids[-1:] == ["9999"])
    assert len(router.finished_ids) == 4096


async def test_only_routers_have_to_release(world: World) -> None:
    listeners = world.listening("router.sock"), world.listening("controller.sock")
    async with listeners[0] as router, listeners[1], world.reporting():
        await world.wait(world.reporter.has_router)
        assert not world.reporter.is_released()
        router.is_released = True
        world.reporter.notify()
        await world.wait(world.reporter.is_released)


async def test_a_controller_alone_is_no_router(world: World) -> None:
    async with world.listening("controller.sock") as controller, world.reporting():
        await world.wait(lambda: bool(controller.reports))
        assert not world.reporter.has_router()
        assert world.reporter.is_released()


async def test_a_listener_that_sends_nonsense_is_left_and_tried_again(world: World) -> None:
    async with world.listening("router.sock") as router, world.listening("controller.sock") as controller:
        router.answer = b"\xff" * 100
        async with world.reporting():
            await world.wait(lambda: len(router.reports) >= 3)
            router.answer = b""
            await world.wait(world.reporter.has_router)
            world.reporter.on_end(finished("a"))
            await world.wait(lambda: "a" in router.finished_ids and "a" in controller.finished_ids)


async def test_ends_that_follow_each_other_closely_share_a_report(world: World) -> None:
    async with world.listening("router.sock") as router, world.reporting():
        await world.wait(lambda: len(router.reports) == 1)
        began_s = asyncio.get_running_loop().time()
        for index in range(100):
            world.reporter.on_end(finished(str(index)))
            await asyncio.sleep(0)
        num_gaps = int((asyncio.get_running_loop().time() - began_s) / report.MIN_GAP_S)
        await world.wait(lambda: len(router.finished_ids) == 100)
        assert len(router.reports) <= 3 + num_gaps, "one per gap, and the ends"


def test_a_listener_that_ends_in_the_moment_of_a_report_ends_no_reports_to_others(
    short_place: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the loop that fronts have, which refuses to write to a connection that it has closed by itself."""
    monkeypatch.setattr(report, "MIN_GAP_S", 0.0)
    monkeypatch.setattr(report, "MIN_RETRY_S", 0.0)

    async def reset_often() -> None:
        world = World(tmp_path)
        world.interval_s = 0.0
        reporting = asyncio.create_task(world.reporter.run())
        async with world.listening("router.sock") as router, world.listening("controller.sock") as other:
            for _ in range(200):
                seen = len(other.reports)
                await world.wait(lambda seen=seen: len(other.reports) > seen or reporting.done())  # type: ignore[misc]
                await other.stop()
                await other.start()
            seen = len(router.reports)
            await world.wait(lambda: len(router.reports) > seen or reporting.done())
        assert not reporting.done(), reporting.exception()
        reporting.cancel()

    uvloop.run(reset_often())
