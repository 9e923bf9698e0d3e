"""Eight replicas behind one gateway: beside eight bare fronts, on both launchers, and beside Ray Serve."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import psutil

from benchmarks.cluster_rig import cluster_system, head_pid_of, started_cluster
from benchmarks.fleet_load import CpuMeter, Fleet, Stage, cores_apart, measure
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
APART = Stage("64 tokens, saturation, replicas on a core of their own", 512, 64, is_apart=True)
SHORT = Stage("4 tokens, saturation", 512, 4)
STAGES = [DEMAND, SATURATION, APART, SHORT]
START_LIMIT_S = 180.0
"""Of Ray Serve: eight replicas begin at once."""
ANSWERS_IN_RAMP, MAX_RAMP_S = 1.25, 8.0
"""All requests begin at once: it is measured when most answers were followed by a second one."""
_KINDS = {"haproxy": "proxy", "router": "router", "front": "front", "engine": "engine"}
_PEER_KINDS = {"proxy": "proxy", "route": "router", "replica": "front"}


@dataclass(frozen=True)
class Plan:
    """How long is measured."""

    rounds: int
    ramp_s: float
    window_s: float


FULL, QUICK = Plan(3, 0.7, 1.5), Plan(1, 0.5, 0.8)


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
        f"window of {plan.window_s:g} s after the first answers, so that requests no longer begin together. "
        "Ratios compare windows of one round.",
    )
    with ExitStack() as life:
        paths = [*life.enter_context(_local()), *life.enter_context(_on_ray())]
        paths += _beside_ray_serve(life, report)
        fleets = list({path.fleet.name: path.fleet for path in paths}.values())
        for stage in STAGES:
            print(f"-- {stage.title}", file=sys.stderr, flush=True)
            with cores_apart(fleets) if stage.is_apart else nullcontext():
                for path in paths:  # opens connections, and says how long an answer takes
                    path.answer_s = measure(CpuMeter(path.fleet, []), path.urls, stage, 0.1, 0.1).answer_s
                for number in range(plan.rounds):
                    _round(paths[number % len(paths) :] + paths[: number % len(paths)], stage, plan)
    write_report(report, paths, STAGES, {"all share the cores": SATURATION, "replicas on their own": APART})
    return report


def _round(paths: list[Path], stage: Stage, plan: Plan) -> None:
    """Measure each path once, in this order."""
    for path in paths:
        others = {one.fleet.name: one.fleet for one in paths if one.fleet is not path.fleet}
        meter = CpuMeter(path.fleet, list(others.values()))
        ramp_s = min(max(plan.ramp_s, ANSWERS_IN_RAMP * path.answer_s), MAX_RAMP_S)
        window = measure(meter, path.urls, stage, ramp_s, plan.window_s)
        path.windows.setdefault(stage.title, []).append(window)
        path.answer_s = window.answer_s


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
