"""Eight replicas behind one gateway: beside eight bare fronts, on both launchers, and beside Ray Serve."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psutil

from benchmarks.cluster_rig import cluster_system, head_pid_of, started_cluster
from benchmarks.fleet_load import CpuMeter, Fleet, Stage, measure
from benchmarks.fleet_page import BARE, GATEWAY, LOCAL, PEER, RAY, Path, write_report
from benchmarks.peers.catalogue import ray_fleet, ray_role
from benchmarks.peers.running import PeerFailed, running
from benchmarks.processes import role_of
from benchmarks.report import Report
from benchmarks.system import serve, simulated

REPLICAS = 8
STEP_MS = 5.0
DEMAND = Stage("64 tokens, 25,600 tokens/s asked for", 128, 64)
SATURATION = Stage("64 tokens, saturation", 512, 64)
START_LIMIT_S = 180.0
"""Of Ray Serve: eight replicas begin at once."""
SHORT = Stage("4 tokens, saturation", 512, 4)
_KINDS = {"haproxy": "proxy", "router": "router", "front": "front", "engine": "engine"}
_PEER_KINDS = {"proxy": "proxy", "route": "router", "replica": "front"}


@dataclass(frozen=True)
class Plan:
    """How long is measured."""

    rounds: int
    ramp_s: float
    window_s: float


FULL, QUICK = Plan(5, 0.8, 1.5), Plan(1, 0.6, 0.8)


def run(*, is_quick: bool) -> Report:
    """Measure every path in turns, stage by stage."""
    plan = QUICK if is_quick else FULL
    report = Report(
        "fleet",
        "Eight replicas behind one gateway",
        f"{REPLICAS} replicas with the simulated engine, {STEP_MS:g} ms per step, on this machine: held by "
        "the local launcher, and by hosts on a real Ray cluster. Each fleet is asked through its gateway, "
        f"and its {REPLICAS} bare fronts straight, an eighth of the streams each. Ray Serve (HAProxy, direct "
        f"streaming, throughput-optimised) serves {REPLICAS} replicas of an application that streams the "
        "same chunks in the same steps. All fleets run all the time; one is asked at a time, by the same "
        f"generator, in closed loops: {plan.rounds} rounds, each beginning with another path; in each a "
        f"window of {plan.window_s:g} s after {plan.ramp_s:g} s of the same load. Ratios compare windows of "
        "one round.",
    )
    with ExitStack() as life:
        paths = [*life.enter_context(_local()), *life.enter_context(_on_ray())]
        paths += _beside_ray_serve(life, report)
        for stage in (DEMAND, SATURATION, SHORT):
            print(f"-- {stage.title}", file=sys.stderr, flush=True)
            for number in range(plan.rounds):
                for position in range(len(paths)):
                    path = paths[(position + number) % len(paths)]
                    others = {one.fleet.name: one.fleet for one in paths if one.fleet is not path.fleet}
                    meter = CpuMeter(path.fleet, list(others.values()))
                    window = measure(meter, path.urls, stage, plan.ramp_s, plan.window_s)
                    path.windows.setdefault(stage.title, []).append(window)
    write_report(report, paths, [DEMAND, SATURATION, SHORT], SATURATION)
    return report


@contextmanager
def _local() -> Iterator[list[Path]]:
    with serve({**simulated(STEP_MS), "replicas": REPLICAS}) as system:
        roots = [child.pid for child in psutil.Process().children() if role_of(child)]
        fleet = Fleet(LOCAL, roots, _kind)
        yield [Path(fleet, BARE, system.front_urls), Path(fleet, GATEWAY, [system.url])]


@contextmanager
def _on_ray() -> Iterator[list[Path]]:
    with started_cluster(f"--num-cpus={REPLICAS}") as cluster:
        fleet = Fleet(RAY, [head_pid_of(cluster)], _kind)
        with cluster_system(cluster, {**simulated(STEP_MS), "replicas": REPLICAS}) as system:
            status = system.wait_ready(REPLICAS)
            fronts = [f"http://{replica.address}/v1" for replica in status.replicas]
            yield [Path(fleet, BARE, fronts), Path(fleet, GATEWAY, [system.url])]


def _beside_ray_serve(life: ExitStack, report: Report) -> list[Path]:
    peer = ray_fleet(REPLICAS, STEP_MS)
    if not peer.is_installed:
        report.caveats.append('Ray Serve was not installed; `make peers PEERS="ray-serve"` installs it.')
        return []
    try:
        up = life.enter_context(running(peer, "", START_LIMIT_S))
    except PeerFailed as error:
        report.caveats.append(f"{peer.title}: {error}")
        return []
    report.data["ray_serve"] = [*(f"{name}={value}" for name, value in up.variables.items()), *up.command]
    return [Path(Fleet(PEER, [up.process.pid], _peer_kind), PEER, [up.url])]


def _kind(process: psutil.Process) -> str:
    return _KINDS.get(role_of(process), "beside")


def _peer_kind(process: psutil.Process) -> str:
    return _PEER_KINDS.get(ray_role(process), "beside")
