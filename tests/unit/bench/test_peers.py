"""The comparison with peers: who they are, whose CPU counts, and how a table is made of what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
from benchmarks.peers import page
from benchmarks.peers.catalogue import ROOT, Peer, Rig, UnknownPeer, catalogue, on_request, ray_role
from benchmarks.peers.comparison import FULL, QUICK, Turns, choose
from benchmarks.peers.measure import BESIDE, Cost, FirstTokens
from benchmarks.processes import ForeignTree, find_processes
from benchmarks.report import Report

from headrace.bench.load import LoadSpec

EVERYBODY = [*catalogue(), *on_request()]


class FakeProcess:
    """What a role is told by."""

    def __init__(self, name: str, *command: str) -> None:
        self._name, self._command = name, command

    def name(self) -> str:
        return self._name

    def cmdline(self) -> list[str]:
        return list(self._command)


@pytest.mark.parametrize(
    ("process", "role"),
    [
        (FakeProcess("haproxy", "/x/haproxy", "-db"), "proxy"),
        (FakeProcess("ray::ProxyActor", "ray::ProxyActor"), "proxy"),
        (FakeProcess("ray::ServeRepli", "ray::ServeReplica:peer:Replica"), "replica"),
        (FakeProcess("ray::ServeRepli", "ray::ServeReplica:peer:LLMRouter"), "route"),
        (FakeProcess("raylet", "/x/raylet", "--a"), "other"),
    ],
)
def test_rays_processes_have_the_roles_that_their_titles_say(process: FakeProcess, role: str) -> None:
    assert ray_role(process) == role  # type: ignore[arg-type]


def test_a_foreign_process_never_counts_as_ours() -> None:
    own = psutil.Process().pid
    found = find_processes(foreign=ForeignTree(own, lambda _: "proxy"))
    assert found[own][0] == "peer proxy"
    assert {role for role, _ in found.values()} == {"peer proxy"}


@pytest.mark.parametrize("peer", EVERYBODY, ids=lambda peer: peer.name)
def test_every_peer_listens_on_loopback_where_it_is_told_to(peer: Peer, tmp_path: Path) -> None:
    rig = Rig("http://127.0.0.1:7001", 7002, (7003, 7004), tmp_path)
    config = tmp_path / "haproxy.cfg"
    words = " ".join(peer.command(rig)) + (config.read_text() if config.exists() else "")
    assert "7002" in words
    assert "0.0.0.0" not in words
    assert peer.has_own_backend or "127.0.0.1:7001" in words


@pytest.mark.parametrize("environment", sorted({peer.environment for peer in EVERYBODY} - {""}))
def test_every_package_of_a_peer_is_pinned_and_none_is_ours(environment: str) -> None:
    path = ROOT / "benchmarks" / "peers" / f"requirements-{environment}.txt"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in lines)
    assert ".peers/%" in (ROOT / "Makefile").read_text()
    assert environment in (ROOT / "Makefile").read_text()


def test_an_unknown_peer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownPeer, match="no peer envoy; there are: haproxy, vllm-router, smg"):
        choose(["envoy"])


def test_the_plans_fit_the_loads() -> None:
    for plan in (FULL, QUICK):
        for streams in plan.cost_streams:
            assert LoadSpec(concurrency=streams, duration_s=plan.window_s).concurrency == streams


def turns(name: str, us: float, first_ms: float) -> Turns:
    """Return a peer's turns in which it spends `us` per token beside a front of 10 and headrace with 20."""
    peer = next(peer for peer in EVERYBODY if peer.name == name)
    by_path = {
        "front alone": Cost(1.0, 1000, {"front": 10e-3, BESIDE: 1.0}),
        "headrace": Cost(1.0, 1000, {"front": 10e-3, "haproxy": 9e-3, "router": 1e-3}),
        name: Cost(0.5, 1000, {"front": 10e-3, "peer proxy": (us - 10) * 1e-3}),
    }
    times = {
        "front alone": FirstTokens([0.006] * 3),
        "headrace": FirstTokens([0.0062] * 3),
        name: FirstTokens([0.006 + first_ms / 1e3] * 3, ["http_500: x"]),
    }
    return Turns(peer, cost={64: by_path}, first_tokens={1: times}, saturation=by_path)


def test_ratios_compare_within_the_same_turns_and_a_peer_that_wins_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page, "_version", lambda _: "1")  # they ask installed peers, if there are any
    monkeypatch.setattr(page, "_size", lambda _: "1 MB")
    report = Report("peers", "Title", "")
    broken = Turns(next(peer for peer in EVERYBODY if peer.name == "ray-python"), error="did not start")
    page.write_report(report, [turns("haproxy", 15.0, 0.1), turns("smg", 40.0, 0.9), broken], [], QUICK)
    aims = {aim.figure: aim for aim in report.aims}
    assert aims["CPU per token, 64 streams"].measured == "20.0 µs"
    cheapest = aims["the same, cheapest peer's relative to headrace's, 64 streams"]
    assert (cheapest.measured, cheapest.is_met) == ("0.75", False)
    # The plain proxy is no full router: headrace need not be faster than it.
    beside = aims["the same beside the best full router, 1 streams"]
    assert (beside.measured, beside.is_met) == ("0.70 ms (smg)", True)
    readme = next(table for table in report.tables if "README" in table.title)
    assert [row[1] for row in readme.rows] == ["20.0", "15.0", "40.0"]
    assert [row[3] for row in readme.rows] == ["0.20", "0.10", "0.90"]
    assert aims["failed requests, headrace"].is_met
    assert not any("too busy" in caveat for caveat in report.caveats)
    assert any("did not start" in caveat for caveat in report.caveats)
    assert any("1 requests failed" in caveat for caveat in report.caveats)


def test_a_busy_machine_and_our_own_failures_are_said_aloud() -> None:
    slow = turns("haproxy", 15.0, 0.1)
    slow.first_tokens[1]["front alone"] = FirstTokens([0.1] * 3)
    slow.first_tokens[1]["headrace"].failures.append("cut: x")
    report = Report("peers", "Title", "")
    page.write_report(report, [slow], [], QUICK)
    assert any("own p50 was 100 ms at 1 streams" in caveat for caveat in report.caveats)
    failed = next(aim for aim in report.aims if aim.figure == "failed requests, headrace")
    assert (failed.measured, failed.is_met) == ("1", False)
