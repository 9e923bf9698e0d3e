"""The fleets' report: tables with ratios per round, what limited each path, aims.

Must not measure.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, field

from benchmarks.fleet_load import ELSEWHERE, GENERATOR, IDLE, Fleet, Stage, Window
from benchmarks.report import Aim, Report, Table

BARE, GATEWAY = "eight bare fronts", "gateway"
LOCAL, RAY, PEER = "local launcher", "Ray launcher", "Ray Serve"
KINDS = ("proxy", "router", "front", "engine", "beside")
ON_PATH = ("proxy", "router", "front", "engine")
AIM_OF_BARE, AIM_OF_PEER = 0.97, 3.0
FULL_RATIO = 0.93
"""Busy part of a core, or of all, from which on it is what limits."""


@dataclass
class Path:
    """One way to a fleet, and what it gave by stage, one window per round."""

    fleet: Fleet
    name: str
    urls: list[str]
    windows: dict[str, list[Window]] = field(default_factory=dict)
    answer_s: float = 0.0
    """What an answer took under the load before."""

    @property
    def title(self) -> str:
        return PEER if self.fleet.name == PEER else f"{self.name}, {self.fleet.name}"

    def rates(self, stage: Stage) -> list[float]:
        """Tokens per second of each round."""
        return [window.tokens_per_s for window in self.windows[stage.title]]

    def total(self, stage: Stage) -> Window:
        """All rounds as one window."""
        total = Window()
        for window in self.windows[stage.title]:
            total.add(window)
        return total

    def ratios(self, other: Path, stage: Stage) -> list[float]:
        """Its tokens per second relative to the other's, round by round."""
        return [own / of for own, of in zip(self.rates(stage), other.rates(stage), strict=True)]


def write_report(report: Report, paths: list[Path], stages: list[Stage], aimed: dict[str, Stage]) -> None:
    """Fill the report. aimed: the stages that aims are of, by the words for them."""
    by_title = {path.title: path for path in paths}
    for stage in stages:
        report.tables.append(_rates(paths, by_title, stage))
        report.tables.append(_cpu(paths, stage))
    for words, stage in aimed.items():
        report.aims += _aims(by_title, stage, words)
    failed = sum(len(path.total(stage).failures) for path in paths if path.title != PEER for stage in stages)
    report.aims.append(Aim("failed requests, headrace", "none", str(failed), not failed))
    report.data["windows"] = {
        path.title: {
            title: [
                {
                    "tokens_per_s": window.tokens_per_s,
                    "requests_per_s": window.requests_per_s,
                    "cpu_s": window.cpu_s,
                    "seconds": window.seconds,
                    "failed": len(window.failures),
                }
                for window in windows
            ]
            for title, windows in path.windows.items()
        }
        for path in paths
    }
    for path in paths:
        for stage in stages:
            if failures := path.total(stage).failures:
                line = (
                    f"{path.title}, {stage.title}: {len(failures)} requests failed, the first: {failures[0]}"
                )
                report.caveats.append(line)
    report.caveats += _CAVEATS


_CAVEATS = [
    "Generator and fleet share the machine's cores. What a proxy takes is missing elsewhere, which it would "
    "not be with a core for each; CPU seconds per 1,000 tokens do not depend on that.",
    "On cores of their own, replicas have one half of the cores and everything else the other: with two "
    "cores the gateway shares its one with the generator.",
    "The bare fronts need nobody who chooses between them: an eighth of the streams each is as even as can "
    "be, which is their best case.",
    "Ray Serve's application tokenizes nothing, and its bytes are made ahead: its best case. Front and "
    "engine are one process there; its `front` is both.",
    "`beside` is the rest of a fleet: controller, relay, keepers; on Ray also its daemons and host actors. "
    "`elsewhere` is everything else on the machine: whoever else computes, and the kernel by itself.",
    "The kernel's share of loopback TCP is counted to whoever makes the system call. CPU times have a "
    "resolution of 10 ms per process.",
]


def limit_of(window: Window, num_cores: int, single: tuple[str, ...]) -> str:
    """Say what limits: a core of one of those that have one thread only, or all cores together."""
    named = [role for role in single if window.cores(role) >= FULL_RATIO]
    shares = sorted(((window.cores(role), role) for role in window.cpu_s), reverse=True)
    busy = ", ".join(f"{role} {cores:.2f}" for cores, role in shares if cores >= 0.05)
    if named:
        return f"a core of the {' and of the '.join(named)} ({busy})"
    if window.cores() >= FULL_RATIO * num_cores:
        return f"all {num_cores} cores ({busy})"
    return f"no CPU: {window.cores():.2f} of {num_cores} cores ({busy})"


def _limit(path: Path, total: Window) -> str:
    # Ray Serve's HAProxy has a thread per core.
    single = (GENERATOR, "router") if path.fleet.name == PEER else (GENERATOR, "proxy", "router")
    return limit_of(total, os.cpu_count() or 1, single)


def _rates(paths: list[Path], by_title: dict[str, Path], stage: Stage) -> Table:
    rows = []
    for path in paths:
        total, rates = path.total(stage), path.rates(stage)
        bare = by_title[f"{BARE}, {RAY if path.fleet.name == RAY else LOCAL}"]
        ratios = path.ratios(bare, stage)
        rows.append(
            [
                path.title,
                f"**{statistics.median(rates):,.0f}**",
                f"{min(rates):,.0f} to {max(rates):,.0f}",
                f"{total.requests_per_s:,.0f}",
                "" if path is bare else f"**{statistics.median(ratios):.3f}**",
                "" if path is bare else f"{min(ratios):.3f} to {max(ratios):.3f}",
                _limit(path, total),
                str(len(total.failures)),
            ]
        )
    headers = ("path", "tokens/s", "rounds", "requests/s", "of bare", "rounds", "what limits: cores busy")
    return Table(f"{stage.title}: {stage.streams} streams", (*headers, "failed"), rows)


def _cpu(paths: list[Path], stage: Stage) -> Table:
    rows = []
    for path in paths:
        total = path.total(stage)
        cells = [f"{1e3 * total.per_thousand(role):.2f}" for role in (*KINDS, GENERATOR)]
        rows.append(
            [
                path.title,
                *cells,
                f"**{1e3 * total.per_thousand(*ON_PATH):.2f}**",
                f"{total.cores(GENERATOR):.2f}",
                f"{total.cores(IDLE):.2f}",
                f"{total.cores(ELSEWHERE):.2f}",
            ]
        )
    cores = ("cores: generator", IDLE, ELSEWHERE)
    headers = ("path", *KINDS, GENERATOR, "proxy to engine", *cores)
    return Table(f"{stage.title}: CPU ms per 1,000 tokens", headers, rows)


def _aims(by_title: dict[str, Path], stage: Stage, words: str) -> list[Aim]:
    aims = []
    for launcher in (LOCAL, RAY):
        own, bare = by_title[f"{GATEWAY}, {launcher}"], by_title[f"{BARE}, {launcher}"]
        ratio = statistics.median(own.ratios(bare, stage))
        figure = f"tokens/s of the bare fronts', {launcher}, {words}"
        aims.append(Aim(figure, f"at least {AIM_OF_BARE:g}", f"{ratio:.3f}", ratio >= AIM_OF_BARE))
        if PEER not in by_title:
            continue
        peer = by_title[PEER]
        ratio = statistics.median(own.ratios(peer, stage))
        limit = _limit(own, own.total(stage))
        cost = peer.total(stage).per_thousand(*ON_PATH) / own.total(stage).per_thousand(*ON_PATH)
        aims.append(
            Aim(
                f"tokens/s of Ray Serve's, {launcher}, {words}",
                f"at least {AIM_OF_PEER:g}, or the CPU that limits it named",
                f"{ratio:.2f}; limited by {limit}; Ray Serve takes {cost:.2f} times the CPU per token",
                ratio >= AIM_OF_PEER or not limit.startswith("no CPU"),
            )
        )
    return aims
