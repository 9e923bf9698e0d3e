"""Reading custom metrics: whatever a source does costs its own metric alone, and says why."""

from __future__ import annotations

import asyncio
import gzip
import math
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headrace.api.config import Config
from headrace.api.config_loader import parse_config
from headrace.clock import SystemClock, VirtualClock
from headrace.control import custom_metrics
from headrace.control.custom_metrics import MAX_BYTES, CustomMetrics, Unreadable, read_sample
from headrace.errors import ConfigError
from headrace.policy.scaling_metrics import MetricReading, replicas_asked


def config(*sources: str, name: str = "jobs", max_age_s: float = 60.0) -> Config:
    metrics = [
        {"name": name, "source": source, "per_replica": 10, "max_age_s": max_age_s} for source in sources
    ]
    return parse_config({"endpoints": {"chat": {"model": "m", "scaling": {"metrics": metrics}}}})


async def read(*sources: str, clock: VirtualClock | SystemClock | None = None) -> list[MetricReading]:
    metrics = CustomMetrics(clock or SystemClock())
    metrics.want(config(*sources))
    await metrics.read_all()
    return metrics.readings("chat")


@asynccontextmanager
async def serving(answer: bytes | Callable[[asyncio.StreamWriter], object]) -> AsyncIterator[str]:
    """Answer every request with these bytes, or let a function write."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            if callable(answer):
                await answer(writer)  # type: ignore[misc]
            else:
                writer.write(answer)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics"
    finally:
        server.close()


def http(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
    return head.encode() + body


async def test_a_file_and_an_address_are_read_and_labels_are_added_up(tmp_path: Path) -> None:
    file = tmp_path / "metrics"
    file.write_text(
        '# TYPE jobs gauge\njobs{queue="a"} 30\njobs{queue="b"} 12\njobs_done 900\nbroken line {\n'
    )
    async with serving(http(b"jobs 7\n")) as url:
        of_file, of_url = await read(str(file), url)
    assert (of_file.value, of_url.value) == (42, 7)
    assert replicas_asked(of_file)[0] == pytest.approx(4.2)
    assert replicas_asked(of_url)[0] == pytest.approx(0.7)


async def test_a_file_is_as_old_as_its_last_change(tmp_path: Path) -> None:
    file = tmp_path / "metrics"
    file.write_text("jobs 5\n")
    os.utime(file, (900.0, 900.0))
    (reading,) = await read(str(file), clock=VirtualClock(1000.0))
    assert (reading.value, reading.age_s) == (5, 100)
    assert replicas_asked(reading)[0] is None


async def test_a_sample_with_a_time_of_its_own_is_as_old_as_that_says(tmp_path: Path) -> None:
    file = tmp_path / "metrics"
    file.write_text("jobs 5 950000\n")  # milliseconds since 1970
    os.utime(file, (990.0, 990.0))
    (reading,) = await read(str(file), clock=VirtualClock(1000.0))
    assert reading.age_s == 50
    file.write_text("jobs 5 2000000\n")
    (reading,) = await read(str(file), clock=VirtualClock(1000.0))
    assert math.isnan(reading.age_s)
    assert replicas_asked(reading)[0] is None


async def test_what_was_read_before_a_source_failed_still_counts_until_it_is_too_old(tmp_path: Path) -> None:
    file = tmp_path / "metrics"
    file.write_text("jobs 50\n")
    os.utime(file, (1000.0, 1000.0))
    clock = VirtualClock(1000.0)
    metrics = CustomMetrics(clock)
    metrics.want(config(str(file)))
    await metrics.read_all()
    file.unlink()
    await metrics.read_all()
    assert replicas_asked(metrics.readings("chat")[0])[0] == 5
    clock.advance(61)
    asked, note = replicas_asked(metrics.readings("chat")[0])
    assert asked is None
    assert "61 s old" in note
    assert "No such file" in note


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (http(b"", "404 Not Found"), "status 404"),
        (http(b"", "302 Found", "Location: file:///etc/passwd\r\n"), "redirects (302)"),
        (http(b"x" * (MAX_BYTES + 1)), "larger than 1 MiB"),
        (http(gzip.compress(b"jobs 5\n"), headers="Content-Encoding: gzip\r\n"), "compressed"),
        (http(b"other 5\n"), "no metric jobs"),
        (http(b"jobs five\n"), "text format"),
        (http(b"\xff\xfe\n"), "no metric jobs"),
        (b"nonsense\r\n\r\n", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
async def test_an_address_that_gives_nothing_usable_says_so(answer: bytes, word: str) -> None:
    async with serving(answer) as url:
        (reading,) = await read(url)
    assert reading.value is None
    assert word in reading.error
    assert "127.0.0.1" not in reading.error


async def test_an_address_that_hangs_or_drips_ends_with_the_limit_and_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom_metrics, "READ_LIMIT_S", 1.0)
    released = asyncio.Event()

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not released.is_set():
            writer.write(b"#\n")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def hang(writer: asyncio.StreamWriter) -> None:
        await released.wait()

    file = tmp_path / "metrics"
    file.write_text("jobs 5\n")
    async with serving(drip) as dripping, serving(hang) as hanging:
        first, second, third = await read(dripping, hanging, str(file))
        released.set()
    assert "no answer within" in first.error
    assert "no answer within" in second.error
    assert third.value == 5


@pytest.mark.parametrize("kind", ["pipe", "directory", "missing", "large"])
async def test_a_path_that_is_no_readable_file_says_so(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "source"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "large":
        path.write_bytes(b"jobs 5\n" * (MAX_BYTES // 7 + 1))
    (reading,) = await read(str(path))
    assert reading.value is None
    words = {"pipe": "not a file", "directory": "directory", "missing": "No such file", "large": "larger"}
    assert words[kind] in reading.error


@pytest.mark.parametrize(
    "text", ["jobs NaN\n", "jobs +Inf\n", "jobs -3\n", "jobs 1e999\n", "jobs 1e300\n", "jobs 1\njobs NaN\n"]
)
def test_impossible_values_are_read_and_not_believed(text: str) -> None:
    sample = read_sample(text, "jobs", 0.0)
    assert replicas_asked(MetricReading("jobs", 1.0, 60.0, sample.value, 0.0))[0] is None


def test_more_samples_than_anyone_means_are_refused() -> None:
    text = "".join(f'jobs{{n="{number}"}} 1\n' for number in range(10_001))
    with pytest.raises(Unreadable, match="at most 10000"):
        read_sample(text, "jobs", 0.0)


async def test_sources_that_are_wanted_no_more_are_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "metrics"
    file.write_text("jobs 5\n")
    metrics = CustomMetrics(SystemClock())
    metrics.want(config(str(file)))
    await metrics.read_all()
    metrics.want(config())
    assert metrics.readings("chat") == []
    assert repr(metrics) == "<CustomMetrics 0 sources, 0 unreadable>"


async def test_run_reads_until_it_is_cancelled(tmp_path: Path) -> None:
    file = tmp_path / "metrics"
    file.write_text("jobs 5\n")
    metrics = CustomMetrics(SystemClock())
    metrics.want(config(str(file)))
    task = asyncio.create_task(metrics.run())
    async with asyncio.timeout(5):
        while metrics.readings("chat")[0].value is None:  # noqa: ASYNC110, a thread reads
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("source", ["file:///etc/passwd", "ftp://host/x", "http://"])
def test_other_kinds_of_sources_are_refused_by_the_config(source: str) -> None:
    with pytest.raises(ConfigError, match="http"):
        config(source)
