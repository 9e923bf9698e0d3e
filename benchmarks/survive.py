"""Streams through kills, drains and rollouts: the gap that a client sees, and whether anything is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import headrace
from benchmarks.kill_gaps import Kill, gap_tables, measure_kills
from benchmarks.report import Aim, Report, Table
from benchmarks.system import MODEL, free_port
from benchmarks.watched_replicas import replicas_of, wait_for
from benchmarks.watched_streams import Ask, Outcome, SteadyLoad, StreamResult, ask_all
from headrace.api.messages import ReplicaStatus
from headrace.bench.statistics import percentile
from headrace.control.serve import System

GAP_AIM_S = 0.3
EVENTS_AIM = 1000
ROUNDS = 9
"""Of kills, one for each length of context; in a third of them before the first text."""
STORM_S = 120.0


@dataclass
class Storm:
    """What was done to the system, and what its clients saw."""

    events: Counter[str] = field(default_factory=Counter)
    streams_hit: int = 0
    """Streams that had begun on what was taken away, summed over all events."""
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """The longest one of each stream."""
    kills_s: list[tuple[float, str]] = field(default_factory=list)
    """When whose engine was killed."""
    kill_gaps_s: list[float] = field(default_factory=list)
    """From a kill to the next text of each stream that its front served."""
    duration_s: float = 0.0


def run(*, is_quick: bool) -> Report:
    """Kill engines under single streams of several lengths, then a storm of events under load."""
    report = Report(
        "survive",
        "Streams that survive",
        f"{MODEL}, native engine, two replicas on this machine, through the gateway. First one stream at a "
        "time: the engine that serves it is killed (SIGKILL), in the middle of its answer or before its "
        "first text; the gap is the time from the kill to the next text that the client sees. Then two "
        "storms, one with this engine and one with three replicas of the simulated one (whose tokens are a "
        "function of prompt and seed): streams all the time, greedy and seeded, while engines are killed, "
        "one or all, replicas drained (scaled down and up), and versions rolled out, by turns. Every "
        "stream's text and usage is compared with that of an undisturbed run.",
    )
    kills = {num_threads: measure_rounds(num_threads, 2 if is_quick else ROUNDS) for num_threads in (1, 2)}
    for num_threads, those in kills.items():
        at_500_s = sorted(kill.gap_s for kill in those if kill.context == 500 and kill.is_begun)
        middle_s = percentile(at_500_s, 0.5)
        aim = Aim(
            f"gap at 500 tokens of context, engines of {num_threads} thread(s), p50",
            f"at most {GAP_AIM_S * 1000:.0f} ms",
            f"{middle_s * 1000:.0f} ms of {len(at_500_s)} kills",
            middle_s <= GAP_AIM_S,
        )
        report.aims.append(aim)
        report.tables += gap_tables(those, f"engines of {num_threads} thread(s)")
    storms = {
        "native": measure_storm(config_of(2), 12, 20.0 if is_quick else STORM_S),
        "simulated": measure_storm(simulated_config(), 60, 20.0 if is_quick else STORM_S),
    }
    hit = sum(storm.streams_hit for storm in storms.values())
    lost = sum(sum(storm.outcomes.values()) - storm.outcomes["same"] for storm in storms.values())
    figure = f"streams lost, cut or different, of {hit} that were hit"
    is_met = lost == 0 and (is_quick or hit >= EVENTS_AIM)
    report.aims.append(Aim(figure, f"0 of at least {EVENTS_AIM}", str(lost), is_met))
    report.tables += [_storm_table(engine, storm) for engine, storm in storms.items()]
    report.data = {
        "kills": {count: [asdict(kill) for kill in those] for count, those in kills.items()},
        "storms": {
            engine: vars(storm) | {"events": dict(storm.events), "outcomes": dict(storm.outcomes)}
            for engine, storm in storms.items()
        },
    }
    for engine, storm in storms.items():
        report.caveats += [f"not the same, {engine}: {line}" for line in storm.wrong[:20]]
    return report


def measure_rounds(num_threads: int, count: int) -> list[Kill]:
    """Kill engines of so many threads each; one of three rounds before the first text."""
    kills = []
    for number in range(count):
        # A system of its own for each round: an engine that dies again and again is started later each time.
        with headrace.serve(config_of(2, num_threads=num_threads)) as system:
            kills += measure_kills(system, number, is_begun=number % 3 != 1)
    return kills


def config_of(num_replicas: int, **native: Any) -> dict[str, Any]:
    """Return the config of the system under test."""
    return {
        "endpoints": {
            "chat": {
                "model": MODEL,
                "replicas": num_replicas,
                "native": {"num_threads": 1, "kv_cache_mb": 128, **native},
                "streams": {"handover_after_s": 0.2},
                "rollout": {"traffic": [1.0], "min_requests": 0, "stage_s": 0},
                "drain_grace_s": 60,
            }
        },
        "gateway": {"bind": f"127.0.0.1:{free_port()}"},
    }


def simulated_config() -> dict[str, Any]:
    """Return the config of a fleet whose engines start at once, and whose steps take a pretended time."""
    config = config_of(3, max_running=24)
    config["endpoints"]["chat"] |= {
        "engine": "simulated",
        "simulated": {"step_ms": 25.0, "start_s": 0.2},
        "max_open": 64,
    }
    return config


# ---- the storm


def measure_storm(config: dict[str, Any], num_streams: int, duration_s: float) -> Storm:
    """Run events against a fleet of this config under so many streams at a time, for so long."""
    storm = Storm()
    num_replicas = config["endpoints"]["chat"]["replicas"]
    chance = random.Random(5)
    is_simulated = config["endpoints"]["chat"].get("engine") == "simulated"  # it draws by seed alone
    asks = [
        Ask(k, chance.choice((20, 60, 150)), chance.choice((40, 80)), is_simulated or k % 2 == 1)
        for k in range(24)
    ]
    with headrace.serve(config) as system:
        right = ask_all(system.url, asks)
        _check(right)
        began_s = time.monotonic()
        with SteadyLoad(system.url, asks, right, num_streams) as load:
            events: list[Callable[[System, Storm], None]] = [kill_engine, drain, kill_all, roll_out]
            for number in range(10**6):
                if time.monotonic() - began_s > duration_s:
                    break
                wait_for(system, lambda replicas: sum(r.state == "ready" for r in replicas) >= num_replicas)
                time.sleep(1.0)  # streams flow again
                events[number % len(events)](system, storm)
        storm.duration_s = time.monotonic() - began_s
        storm.outcomes, storm.wrong = load.outcomes(), load.wrong()
        storm.gaps_s = sorted(result.longest_gap_s for result in load.results)
        storm.kill_gaps_s = sorted(_kill_gaps_s(storm, load.results))
        if storm.wrong:
            _keep_logs(system, storm)
    return storm


def _keep_logs(system: System, storm: Storm) -> None:
    """Copy what the processes said out of the run directory: it goes with the system."""
    kept = tempfile.mkdtemp(prefix="headrace-survive-")
    shutil.copytree(system.run_directory / "logs", kept, dirs_exist_ok=True)
    print("\n".join([*storm.wrong, f"the system's logs are kept in {kept}"]), file=sys.stderr)


def kill_engine(system: System, storm: Storm) -> None:
    """Kill the engine with the most streams."""
    _kill(system, storm, [max(replicas_of(system), key=lambda replica: replica.num_running)])


def kill_all(system: System, storm: Storm) -> None:
    """Kill all engines: streams wait for the first one that is back."""
    _kill(system, storm, replicas_of(system))


def _kill(system: System, storm: Storm, victims: list[ReplicaStatus]) -> None:
    pids = {victim.engine_pid for victim in victims if victim.engine_pid}
    for victim in victims:
        if victim.engine_pid:
            storm.events["engine killed"] += 1
            storm.streams_hit += victim.num_running + victim.num_waiting
            storm.kills_s.append((time.monotonic(), victim.replica_id))
            os.kill(victim.engine_pid, signal.SIGKILL)
    wait_for(system, lambda replicas: not pids & {r.engine_pid for r in replicas if r.state == "ready"})


def drain(system: System, storm: Storm) -> None:
    """One more replica, and one fewer when it is ready: the fleet chooses who leaves."""
    count = len(replicas_of(system))
    resize(system, count + 1)
    wait_for(system, lambda replicas: sum(r.state == "ready" for r in replicas) == count + 1)
    before = {
        replica.replica_id: replica.num_running + replica.num_waiting for replica in replicas_of(system)
    }
    resize(system, count)
    wait_for(system, lambda replicas: sum(r.state in ("ready", "starting") for r in replicas) == count)
    left = [r.replica_id for r in replicas_of(system) if r.state in ("ready", "starting")]
    storm.events["replica drained"] += 1
    storm.streams_hit += sum(count for name, count in before.items() if name not in left)


def resize(system: System, num_replicas: int) -> None:
    """Have so many replicas, whatever the load asks for."""
    config = system.config.model_dump()
    config["endpoints"]["chat"]["replicas"].update(min=num_replicas, max=num_replicas)
    system.apply(config)


def roll_out(system: System, storm: Storm) -> None:
    """Change a setting that needs new engines: every replica is replaced."""
    storm.events["rolled out"] += 1
    before = {r.replica_id: r.generation for r in replicas_of(system) if r.state == "ready"}
    storm.streams_hit += sum(r.num_running + r.num_waiting for r in replicas_of(system))
    config = system.config.model_dump()
    native = config["endpoints"]["chat"]["native"]
    native["token_budget"] = 512 if native["token_budget"] != 512 else 448
    system.apply(config)

    def is_done(replicas: list[ReplicaStatus]) -> bool:
        ready = [replica for replica in replicas if replica.state == "ready"]
        return len(ready) == len(before) and not {r.generation for r in ready} & set(before.values())

    wait_for(system, is_done)


def _kill_gaps_s(storm: Storm, results: list[StreamResult]) -> Iterator[float]:
    for killed_s, replica_id in storm.kills_s:
        for result in results:
            if result.replica_id == replica_id and result.begin_s < killed_s < result.end_s:
                gap_s = result.gap_after_s(killed_s)
                if gap_s is not None:
                    yield gap_s


def _check(right: list[StreamResult]) -> None:
    broken = [result for result in right if not result.is_done or result.error]
    if broken:
        raise RuntimeError(f"undisturbed streams failed: {broken[0].status} {broken[0].error}")


# ---- tables


def _storm_table(engine: str, storm: Storm) -> Table:
    rows = [[name, str(count)] for name, count in storm.events.items()]
    rows += [["streams on what was taken away", str(storm.streams_hit)]]
    rows += [[f"streams: {name}", str(count)] for name, count in storm.outcomes.most_common()]
    for rank in (0.5, 0.9, 0.99, 1.0):
        for name, gaps_s in (("longest gap of a stream", storm.gaps_s), ("kill to text", storm.kill_gaps_s)):
            if gaps_s:
                rows.append([f"{name}, p{rank * 100:.0f}", f"{percentile(gaps_s, rank) * 1000:.0f} ms"])
    return Table(f"The storm, {engine} engine, {storm.duration_s:.0f} s", ("what", "how many"), rows)
