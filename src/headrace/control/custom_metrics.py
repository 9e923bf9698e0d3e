"""Reads the numbers of the user's own that ask for replicas: files and http(s) addresses, every few seconds.

Owns the readings. Whatever a source does (hang, lie, grow, redirect, vanish) costs its own metrics alone, and
status shows why. Must not know what the numbers are worth: `policy.scaling_metrics` judges.
"""

from __future__ import annotations

import asyncio
import math
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from headrace.api.config import Config
from headrace.api.endpoint_config import CustomMetric
from headrace.clock import Clock
from headrace.errors import HeadraceError
from headrace.policy.scaling_metrics import MetricReading

READ_PERIOD_S = 5.0
READ_LIMIT_S = 2.0
MAX_BYTES = 1 << 20
MAX_SAMPLES = 10_000
"""Of one name, over all its labels: they are added up."""
_FUTURE_S = 60.0
"""A sample from so far ahead has a wrong time."""


class Unreadable(HeadraceError):
    """A source gave nothing; the message says why, without its address, which may hold a password."""


class Sample(NamedTuple):
    """A metric's value, and when it was true in seconds since 1970."""

    value: float
    wall_s: float


@dataclass(slots=True)
class _Source:
    """What was last read of one source."""

    samples: dict[str, Sample | Unreadable] = field(default_factory=dict)
    """By the names that are wanted."""
    error: str = "not read yet"
    file_reading: asyncio.Future[tuple[bytes, float]] | None = None


class CustomMetrics:
    """All custom metrics of a system. `want` says which; `run` reads; `readings` never waits."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._metrics: dict[str, Sequence[CustomMetric]] = {}
        self._sources: dict[str, _Source] = {}

    def __repr__(self) -> str:
        failing = sum(bool(source.error) for source in self._sources.values())
        return f"<CustomMetrics {len(self._sources)} sources, {failing} unreadable>"

    def want(self, config: Config) -> None:
        """Take the metrics of a config. What is known of sources that stay is kept."""
        self._metrics = {
            name: endpoint.scaling.metrics
            for name, endpoint in config.endpoints.items()
            if endpoint.scaling.metrics
        }
        wanted = {metric.source for metrics in self._metrics.values() for metric in metrics}
        for source in [source for source in self._sources if source not in wanted]:
            del self._sources[source]
        for source in wanted:
            self._sources.setdefault(source, _Source())

    async def run(self) -> None:
        """Read all sources every READ_PERIOD_S, until cancelled."""
        while True:
            await self.read_all()
            await asyncio.sleep(READ_PERIOD_S)

    async def read_all(self) -> None:
        """Read all sources once, at the same time, each within READ_LIMIT_S."""
        await asyncio.gather(*(self._read(name, source) for name, source in self._sources.items()))

    def readings(self, endpoint: str) -> list[MetricReading]:
        """Return an endpoint's metrics as they were last read."""
        return [self._reading(metric) for metric in self._metrics.get(endpoint, ())]

    def _reading(self, metric: CustomMetric) -> MetricReading:
        source = self._sources[metric.source]
        sample = source.samples.get(metric.name)
        if not isinstance(sample, Sample):
            error = str(sample or source.error or "not read yet")
            return MetricReading(metric.name, metric.per_replica, metric.max_age_s, error=error)
        age_s = self._clock.wall_s() - sample.wall_s
        age_s = max(0.0, age_s) if age_s > -_FUTURE_S else math.nan
        return MetricReading(
            metric.name, metric.per_replica, metric.max_age_s, sample.value, age_s, source.error
        )

    async def _read(self, name: str, source: _Source) -> None:
        try:
            async with asyncio.timeout(READ_LIMIT_S):
                if name.startswith(("http://", "https://")):
                    data, wall_s = await _fetch(name), self._clock.wall_s()
                else:
                    data, wall_s = await _read_file_aside(name, source)
                names = {
                    metric.name
                    for metrics in self._metrics.values()
                    for metric in metrics
                    if metric.source == name
                }
                source.samples = await asyncio.to_thread(_read_samples, data, names, wall_s)
            source.error = ""
        except TimeoutError:
            source.error = f"no answer within {READ_LIMIT_S:g} s"
        except Unreadable as error:
            source.error = str(error)


async def _read_file_aside(path: str, source: _Source) -> tuple[bytes, float]:
    """Read a file in a thread. One that hangs (on a dead disk) is not read again before it returns."""
    if source.file_reading is None or source.file_reading.done():
        source.file_reading = asyncio.ensure_future(asyncio.to_thread(read_file, path))
    return await asyncio.shield(source.file_reading)


def _read_samples(data: bytes, names: Collection[str], wall_s: float) -> dict[str, Sample | Unreadable]:
    text = data.decode("utf-8", "replace")
    samples: dict[str, Sample | Unreadable] = {}
    for name in names:
        try:
            samples[name] = read_sample(text, name, wall_s)
        except Unreadable as error:
            samples[name] = error
    return samples


def read_sample(text: str, name: str, wall_s: float) -> Sample:
    """Return the sum of a metric's samples in Prometheus's text format, and the oldest of their times
    (`wall_s` where they have none). Raises Unreadable."""
    lines = [line for line in text.splitlines() if line.startswith(name) and line[len(name) :][:1] in "{ \t"]
    if not lines:
        raise Unreadable(f"there is no metric {name} in its source")
    if len(lines) > MAX_SAMPLES:
        raise Unreadable(f"{len(lines)} samples of {name}; at most {MAX_SAMPLES} are read")
    total, oldest_s = 0.0, math.inf
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                total += sample.value
                oldest_s = min(oldest_s, float(sample.timestamp) if sample.timestamp is not None else wall_s)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise Unreadable(f"its line is not in Prometheus's text format: {str(error)[:100]}") from error
    return Sample(total, oldest_s)


def read_file(path: str) -> tuple[bytes, float]:
    """Return a file's content and when it was written. Raises Unreadable. Reads nothing but files: a pipe or
    a device could keep the reader for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable("its source is not a file")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Unreadable(f"its file cannot be read: {error.strerror}") from error
    return _bounded(data), status.st_mtime


async def _fetch(url: str) -> bytes:
    """Return what an address answers. Raises Unreadable. No redirects: what is configured is what is asked.
    No compression: the bound is on what is read."""
    parts, size = [], 0
    try:
        async with (
            httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=READ_LIMIT_S) as client,
            client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response,
        ):
            if response.is_redirect:
                raise Unreadable(f"its address redirects ({response.status_code}); give the final one")
            if response.status_code != 200:
                raise Unreadable(f"its address answers with status {response.status_code}")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise Unreadable("its address answers with compressed content")
            async for part in response.aiter_raw():
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    break
    except httpx.TimeoutException as error:
        raise Unreadable(f"no answer within {READ_LIMIT_S:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreadable(f"its address cannot be read ({type(error).__name__})") from error
    return _bounded(b"".join(parts))


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise Unreadable(f"its source is larger than {MAX_BYTES >> 20} MiB")
    return data
