"""Numbers of users' own that ask for replicas: what their sources say and when, and how they are read.

Owns the sources, which change, vanish, hang and lie, and what each asks for by rules of its own. The reading
of Prometheus's text, its age and the judgement are the product's. Must not know how anything is scaled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from headrace.api.config import Config
from headrace.api.endpoint_config import CustomMetric
from headrace.clock import Clock
from headrace.control.custom_metrics import CustomMetrics, Sample, Unreadable, read_sample
from headrace.sim.machine import Host
from headrace.sim.scenario import Fault

Saying = Literal[
    "count",
    "labels",
    "many",
    "zero",
    "nan",
    "infinite",
    "negative",
    "huge",
    "missing",
    "malformed",
    "unreadable",
    "silent",
    "late",
    "ahead",
]
SAYINGS: tuple[Saying, ...] = ("count", "count", *get_args(Saying))
SHARE = 0.6
"""Of its last replica a count asks for: far enough from whole numbers that no margin makes it another one."""
MANY = 900.0
"""Replicas, more than any maximum, and believed."""
FAR_S = 4000.0
"""A sample so late or so far ahead is never right."""


@dataclass(slots=True)
class Source:
    """One source of one metric. It says nothing before it was told what."""

    metric: CustomMetric
    saying: Saying = "missing"
    count: int = 0
    said_s: float = 0.0
    """On the wall clock of the machine that it is read on."""

    @property
    def is_file(self) -> bool:
        """A file's content is as old as the file; an address tells what is true now."""
        return not self.metric.source.startswith("http")

    def asks(self, wall_s: float) -> float:
        """Return the replicas that it asks for then, not rounded; 0: it is not to be believed."""
        if self.is_file and wall_s - self.said_s > self.metric.max_age_s:
            return 0.0
        match self.saying:
            case "count" | "labels":
                return self.count - 1 + SHARE
            case "many":
                return MANY
            case _:
                return 0.0

    def read(self, wall_s: float) -> tuple[str, float]:
        """Return its text, and when that was true. Raises Unreadable."""
        if self.saying == "unreadable":
            raise Unreadable("its file cannot be read: no such file")
        if self.saying == "silent":
            raise Unreadable("no answer within 2 s")
        return self._text(wall_s), self.said_s if self.is_file else wall_s

    def _text(self, wall_s: float) -> str:
        name, value = self.metric.name, (self.count - 1 + SHARE) * self.metric.per_replica
        texts: dict[Saying, str] = {
            "count": f"{name} {value}",
            "labels": f'{name}{{queue="a"}} {value / 4}\n{name}{{queue="b"}} {value * 3 / 4}',
            "many": f"{name} {MANY * self.metric.per_replica}",
            "zero": f"{name} 0",
            "nan": f"{name} NaN",
            "infinite": f"{name} +Inf",
            "negative": f"{name} {-value}",
            "huge": f"{name} 1e300",
            "missing": "another_metric 7",
            "malformed": f"{name}{{queue= {value}",
            "late": f"{name} {value} {round((wall_s - FAR_S) * 1000)}",
            "ahead": f"{name} {value} {round((wall_s + FAR_S) * 1000)}",
        }
        return texts[self.saying] + "\n"


class MetricSources:
    """All sources of one world."""

    def __init__(self, config: Config, host: Host) -> None:
        self._host = host
        self.sources = {
            metric.source: Source(metric)
            for endpoint in config.endpoints.values()
            for metric in endpoint.scaling.metrics
        }

    def say(self, fault: Fault) -> str:
        """Let one say something from now on."""
        names = list(self.sources)
        if not names:
            return ""
        name = names[int(fault.pick * len(names))]
        source, place = self.sources[name], fault.amount * len(SAYINGS)
        source.saying = SAYINGS[int(place)]
        source.count = 1 + int(6 * (place % 1.0))
        source.said_s = self._host.wall_s()
        return f"{name}: {source.saying} {source.count}"

    def count_of(self, metrics: list[CustomMetric]) -> int:
        """Return how many replicas these ask for now, the largest of them."""
        wall_s = self._host.wall_s()
        return math.ceil(max((self.sources[metric.source].asks(wall_s) for metric in metrics), default=0.0))


class MetricsReader(CustomMetrics):
    """The product's readings, of these sources: each reading takes no time."""

    def __init__(self, clock: Clock, sources: MetricSources) -> None:
        super().__init__(clock)
        self._there = sources.sources

    def read_now(self) -> None:
        """Read all once."""
        wall_s = self._clock.wall_s()
        for name, known in self._sources.items():
            there = self._there[name]
            try:
                text, read_s = there.read(wall_s)
            except Unreadable as error:
                known.error = str(error)
                continue
            known.error = ""
            sample: Sample | Unreadable
            try:
                sample = read_sample(text, there.metric.name, read_s)
            except Unreadable as error:
                sample = error
            known.samples = {there.metric.name: sample}
