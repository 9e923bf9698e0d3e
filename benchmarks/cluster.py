"""A Ray cluster under a system: a replica more, on nodes that are there and that join; what is lost and how
fast that is noticed; the controller killed. With phases, under load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.ray_rig import RayCluster

from benchmarks.cluster_events import (
    Phases,
    add_replica,
    have_replicas,
    kill_controller,
    lose_host,
    lose_node,
    poll,
)
from benchmarks.cluster_rig import ClusterSystem, cluster_system, started_cluster
from benchmarks.ray_groups import GroupWatch
from benchmarks.report import Aim, Report, Table
from benchmarks.system import simulated
from benchmarks.watched_streams import Ask, SteadyLoad, ask_all
from headrace.bench.statistics import percentile

STEP_MS = 5.0
STREAMS, ANSWER_TOKENS = 8, 40
NOTICE_AIM_S = 2.0
FAST_LOSSES = 4
"""One more within a minute, and a replica counts as one that cannot be started."""
ADD, HOST, NODE = "a replica more", "host actor killed", "node killed, another joins"
PROCESS, ACTOR = "controller killed", "controller's host actor killed"
NODE_OPTIONS = ("--num-cpus=1", "--labels=kind=worker")


@dataclass
class Event:
    """One kind of event: the phases of each time, and how the streams that ran meanwhile ended."""

    title: str
    times: list[Phases] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def seconds(self, phase: str) -> list[float]:
        """Return one phase of all times, in rising order; empty: of all phases together."""
        return sorted(sum(one.values()) if not phase else one[phase] for one in self.times)

    @property
    def num_lost(self) -> int:
        return sum(self.outcomes.values()) - self.outcomes["same"]


def run(*, is_quick: bool) -> Report:
    """Let everything happen so many times."""
    count, restarts = (1, 1) if is_quick else (8, 6)
    report = Report(
        "cluster",
        "On a Ray cluster: added, lost, restarted",
        f"A real Ray cluster of this machine, with a token, in namespaces of its own; simulated engine, "
        f"{STEP_MS:g} ms per step; {STREAMS} streams of {ANSWER_TOKENS} tokens at any time, each compared "
        f"with an undisturbed one. Each event {count} times, the controller's ends {restarts} times. "
        "Processes begin when the kernel says so, places are had when Ray's table does (asked every 10 ms), "
        "the rest is when the status says so (every 10 ms).",
    )
    with started_cluster("--num-cpus=4") as cluster:
        events = [*_on_existing_nodes(cluster, count, restarts), *_on_joining_nodes(cluster, count)]
    _write(report, events)
    return report


def _on_existing_nodes(cluster: RayCluster, count: int, restarts: int) -> list[Event]:
    events = add, host, process, actor = [Event(title) for title in (ADD, HOST, PROCESS, ACTOR)]
    with cluster_system(cluster, _endpoint({"resources": {"CPU": 1}})) as system:
        streams = Streams(system)
        with GroupWatch(cluster) as watch:
            for number in range(count + 1):
                with streams.during(add) as load:
                    phases = add_replica(system, watch, load, 2)
                if number:  # the first host of a machine reads Ray and headrace from a cold disk
                    add.times.append(phases)
                have_replicas(system, 1)
        for _ in range(restarts):
            # In turns: what the keeper restarts comes later each time, unless its host is a new one.
            for event, number in ((process, 2), (actor, 1)):
                with streams.during(event):
                    event.times.append(kill_controller(system, number, whole_host=event is actor))
        for _ in range(count):
            have_replicas(system, 1)  # one that is lost again and again is started later each time
            have_replicas(system, 2)
            with streams.during(host):
                host.times.append(lose_host(system, 2))
    return events


def _on_joining_nodes(cluster: RayCluster, count: int) -> list[Event]:
    event = Event(NODE)
    node = cluster.add_node(*NODE_OPTIONS)
    while len(event.times) < count:  # a system of its own for a few: its replica is started later each time
        with cluster_system(cluster, _endpoint({"labels": {"kind": "worker"}})) as system:
            streams = Streams(system)
            for _ in range(min(FAST_LOSSES, count - len(event.times))):
                with streams.during(event):
                    phases, node = lose_node(system, node, lambda: cluster.add_node(*NODE_OPTIONS))
                event.times.append(phases)
    node.stop()
    return [event]


class Streams:
    """The load on a system, and what is right."""

    def __init__(self, system: ClusterSystem) -> None:
        self._url = system.url
        self._asks = [Ask(number, 5, ANSWER_TOKENS, is_seeded=True) for number in range(STREAMS)]
        self._right = ask_all(self._url, self._asks)

    @contextmanager
    def during(self, event: Event) -> Iterator[SteadyLoad]:
        """Stream for the length of the block, and count how the streams ended."""
        with SteadyLoad(self._url, self._asks, self._right, STREAMS) as load:
            poll(lambda: len(load.results) >= STREAMS or None, "streams flow")
            yield load
        event.outcomes.update(load.outcomes())
        event.wrong += load.wrong()


def _endpoint(nodes: dict[str, Any]) -> dict[str, Any]:
    return {**simulated(STEP_MS, max_open=64), "nodes": nodes, "drain_grace_s": 5}


# ---- the report


def _write(report: Report, events: list[Event]) -> None:
    for event in events:
        report.tables.append(_phases(event))
        report.data[event.title] = {"seconds": event.times, "streams": dict(event.outcomes)}
    by_title = {event.title: event for event in events}
    for title in (HOST, NODE):
        seconds = by_title[title].seconds("noticed")
        measured = f"{percentile(seconds, 0.5):.2f} s, at most {seconds[-1]:.2f} s of {len(seconds)}"
        report.aims.append(
            Aim(f"noticed: {title}", f"within {NOTICE_AIM_S:g} s", measured, seconds[-1] <= NOTICE_AIM_S)
        )
    for title in (PROCESS, ACTOR):
        event = by_title[title]
        figure = f"requests lost of {sum(event.outcomes.values())}: {title}"
        report.aims.append(Aim(figure, "0", str(event.num_lost), not event.num_lost))
    report.tables.append(_outcomes(events))
    for event in events:
        if event.title in (ADD, PROCESS, ACTOR):
            report.caveats += [f"{event.title}: {line}" for line in event.wrong[:5]]
    report.caveats += _CAVEATS


_CAVEATS = [
    "Nodes, clients and the system share the machine's cores: whatever starts competes with the streams. A "
    "node of Ray's that starts takes several seconds of CPU time.",
    "All nodes have one machine's address: what is lost is seen by closed connections. A machine that is cut "
    "off without a word is another thing, and takes longer.",
    "`host actor` lasts until Ray has a worker process for it, which imports headrace and starts the keeper; "
    "`front` until it starts its engine; `engine` until the status says ready; `first token` waits for a "
    "stream that is sent there.",
    "Streams on what is killed are cut: the endpoint is not durable. The controller's end may cost none.",
    "`status answers` is the first answer of the next controller, `commands again` when the status first "
    "shows what it was told to do, asked again until it took it.",
]


def _phases(event: Event) -> Table:
    rows = []
    for phase in [*event.times[0], ""]:
        seconds = event.seconds(phase)
        values = [seconds[0], *(percentile(seconds, rank) for rank in (0.25, 0.5, 0.75, 0.9, 1.0))]
        rows.append([phase or "**all**", *(f"{value:.2f}" for value in values)])
    headers = ("phase, s", "least", "p25", "p50", "p75", "p90", "most")
    return Table(f"{event.title}: {len(event.times)} times", headers, rows)


def _outcomes(events: list[Event]) -> Table:
    kinds = ("same", "different", "cut", "error", "refused")
    rows = [
        [event.title, str(sum(event.outcomes.values())), *(str(event.outcomes[kind]) for kind in kinds)]
        for event in events
    ]
    return Table("How streams ended meanwhile", ("event", "streams", *kinds), rows)
