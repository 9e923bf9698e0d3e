"""What the benchmarks `fleet` and `cluster` say of what they measured."""

from __future__ import annotations

import os
from collections import Counter

import psutil
import pytest
from benchmarks.cluster_events import _spans
from benchmarks.fleet_load import ELSEWHERE, GENERATOR, Fleet, Stage, Window, cores_apart
from benchmarks.fleet_page import BARE, GATEWAY, LOCAL, PEER, RAY, Path, limit_of, write_report
from benchmarks.report import Report

STAGE = Stage("saturation", 512, 64)


def window(tokens: int, **cpu_s: float) -> Window:
    return Window(2.0, tokens, tokens // 64, {GENERATOR: 0.8, ELSEWHERE: 0.1, **cpu_s})


def path(fleet: str, name: str, tokens: list[int], **cpu_s: float) -> Path:
    made = Path(Fleet(fleet, [], lambda process: ""), name, [])
    made.windows[STAGE.title] = [window(one, **cpu_s) for one in tokens]
    return made


@pytest.fixture
def paths() -> list[Path]:
    return [
        path(LOCAL, BARE, [100_000, 80_000], front=2.0),
        path(LOCAL, GATEWAY, [98_000, 80_000], front=1.5, proxy=0.5, router=0.1),
        path(RAY, BARE, [100_000, 100_000], front=2.0),
        path(RAY, GATEWAY, [90_000, 90_000], front=1.5, proxy=0.5),
        path(PEER, PEER, [25_000, 20_000], front=1.5, proxy=0.5, router=1.0),
    ]


def test_a_full_core_of_the_generator_is_what_limits() -> None:
    assert limit_of(window(1), 2, (GENERATOR,)) == "no CPU: 0.45 of 2 cores (generator 0.40, elsewhere 0.05)"
    full = Window(2.0, 1, 1, {GENERATOR: 1.9, ELSEWHERE: 0.0, "front": 0.4})
    assert limit_of(full, 8, (GENERATOR,)) == "a core of the generator (generator 0.95, front 0.20)"


def test_full_cores_together_are_named_with_their_shares() -> None:
    full = window(1, front=2.0, engine=1.0, proxy=0.06)
    assert (
        limit_of(full, 2, (GENERATOR, "proxy"))
        == "all 2 cores (front 1.00, engine 0.50, generator 0.40, elsewhere 0.05)"
    )


def test_ratios_compare_windows_of_one_round(paths: list[Path]) -> None:
    report = Report("fleet", "", "")
    write_report(report, paths, [STAGE], {"all share": STAGE})
    aims = [(aim.measured, aim.is_met) for aim in report.aims]
    assert aims[0] == ("0.990", True)
    assert aims[1][0].startswith("3.96; limited by ")
    assert aims[1][0].endswith("Ray Serve takes 5.65 times the CPU per token")
    assert aims[2] == ("0.900", False)
    assert aims[4] == ("0", True)


def test_failed_requests_are_counted_and_the_first_is_shown(paths: list[Path]) -> None:
    paths[1].windows[STAGE.title][0].failures = ["http_503: full", "cut: "]
    report = Report("fleet", "", "")
    write_report(report, paths, [STAGE], {"all share": STAGE})
    assert report.aims[4].measured == "2"
    assert (
        "gateway, local launcher, saturation: 2 requests failed, the first: http_503: full" in report.caveats
    )


def test_a_fleets_members_are_the_processes_below_its_roots() -> None:
    own = psutil.Process()
    fleet = Fleet("x", [own.pid], lambda process: "front" if process.pid == own.pid else "")
    assert fleet.members() == [("front", own)]


def test_a_moment_before_its_turn_makes_a_phase_of_nothing() -> None:
    assert _spans(("a", "b", "c"), [1.0, 3.0, 2.5, 4.0]) == {"a": 2.0, "b": 0.0, "c": 1.0}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_replicas_are_kept_apart_from_the_rest_and_let_go_again() -> None:
    own = psutil.Process()
    before = os.sched_getaffinity(0)
    with cores_apart([Fleet("x", [own.pid], lambda process: "")]):
        assert os.sched_getaffinity(0) == set(sorted(before)[: len(before) // 2])
    assert os.sched_getaffinity(0) == before


def test_windows_of_one_path_add_up() -> None:
    total = Window()
    total.add(window(10, front=1.0))
    total.add(window(30, front=0.5))
    assert (total.tokens, total.seconds, total.cores("front")) == (40, 4.0, 0.375)
    assert Counter(total.cpu_s)[GENERATOR] == 1.6
    assert total.per_thousand("front") == 37.5
