"""A system on three hosts with addresses, disks and processes of their own: loaded, and its hosts taken away.

`sh tests/cluster/in_namespaces.sh pytest tests/slow/test_three_hosts.py` (part of `make test-slow`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from benchmarks.watched_streams import Ask, SteadyLoad, StreamResult, ask_all
from tests.cluster.hosts_rig import Host, wait_for
from tests.slow.ray_hosts import KEY, RayHosts, Status, ray_hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NUM_TOKENS = 150
SIMULATED = {"model": "smollm2-135m-instruct", "engine": "simulated", "simulated": {"step_ms": 20}}
ENDPOINTS = {
    "chat": {**SIMULATED, "replicas": 3},
    "safe": {**SIMULATED, "replicas": 2, "streams": {"durable": True}},
}
ASKS = [
    Ask(number, 5 + number, NUM_TOKENS, is_seeded=True, model=model)
    for number in range(6)
    for model in ENDPOINTS
]
"""Even positions ask chat, odd ones safe."""
NUM_STREAMS = 12
NOTICE_LIMIT_S = 3.0
"""2 s, and what a busy machine adds."""
SETTLE_LIMIT_S = 150.0
GIVEN_UP_AFTER_S = 12.0
"""The launcher may give a host up that is back already: Ray's connections to it come back later."""


@pytest.fixture
def cluster() -> Iterator[RayHosts]:
    """A fresh one for each test: what one does to hosts moves replicas, and Ray remembers it for a minute."""
    with ray_hosts(3) as cluster:
        cluster.up(ENDPOINTS)
        yield cluster
        cluster.down()
        for host in cluster.hosts:  # at one that is dead nothing is
            wait_for(f"nothing is left on {host}", lambda host=host: not host.titles("headrace"))


@pytest.fixture
def right(cluster: RayHosts) -> list[StreamResult]:
    return ask_all(cluster.url, list(ASKS), NUM_STREAMS, KEY)


@contextlib.contextmanager
def loaded(cluster: RayHosts, right: list[StreamResult]) -> Iterator[SteadyLoad]:
    """Streams at both endpoints, which all have been begun at the start of the block and end by its end."""
    with SteadyLoad(cluster.url, ASKS, right, NUM_STREAMS, KEY) as load:
        wait_for(
            "streams flow", lambda: sum(len(r.pieces) > 3 for r in list(load.open)) >= NUM_STREAMS - 2, 30
        )
        yield load
        num_ended = len(load.results) + NUM_STREAMS
        wait_for("streams go on", lambda: len(load.results) >= num_ended, 60)


def settled(cluster: RayHosts, status: Status) -> bool:
    """Whether all replicas are there, and no process on any host that the controller does not have there."""
    states = Counter((r["endpoint"], r["state"], r["phase"]) for r in status["replicas"])
    if not status["is_ready"] or states != {("chat", "ready", ""): 3, ("safe", "ready", ""): 2}:
        return False
    return all(fronts_on(host) == cluster.names_on(status, host) for host in cluster.hosts)


def wait_settled(cluster: RayHosts, stays_s: float = 0.0) -> Status:
    """Wait until all is settled, and has been so for a while."""
    deadline_s, since_s = time.monotonic() + SETTLE_LIMIT_S, math.inf
    while True:
        now_s, status = time.monotonic(), cluster.status()
        since_s = min(since_s, now_s) if status and settled(cluster, status) else math.inf
        if now_s - since_s >= stays_s:
            return status
        assert now_s < deadline_s, f"not settled within {SETTLE_LIMIT_S} s: {cluster.explain(status)}"
        time.sleep(0.1)


def fronts_on(host: Host) -> list[str]:
    """The replicas whose fronts run on a host."""
    names = [title.split()[2] for title in host.titles("headrace: front ")]
    return [name for name in names if ":" not in name]


def other_host(cluster: RayHosts) -> Host:
    """One without the gateway that has replicas of both endpoints."""
    status = wait_settled(cluster)
    for host in cluster.hosts[1:]:
        if {name.rpartition("-")[0] for name in cluster.names_on(status, host)} == {"chat", "safe"}:
            return host
    raise AssertionError(f"replicas are not spread: {cluster.explain(status)}")


def check(load: SteadyLoad, right: list[StreamResult], excused: set[int]) -> None:
    """No stream is wrong, but those of chat whose front was where something happened. excused: their ids."""
    answers = {result.ask: result for result in right}
    outcomes: Counter[str] = Counter()
    wrong = []
    for result in load.results:
        outcome = result.outcome(answers[result.ask])
        is_excused = id(result) in excused and result.ask.model == "chat" and outcome in ("cut", "error")
        outcomes[f"{result.ask.model} {outcome}{' on the lost host' * is_excused}"] += 1
        if outcome != "same" and not is_excused:
            wrong.append(
                f"{result.ask.model} by {result.replica_id}: {outcome} {result.status} {result.error}"
            )
    print(dict(outcomes))
    assert not wrong, wrong


def open_at(load: SteadyLoad, replicas: list[str]) -> set[int]:
    """Streams of these replicas' fronts that are open now, by identity."""
    return {id(result) for result in list(load.open) if result.replica_id in replicas}


def test_replicas_are_spread_over_the_hosts_and_serve(cluster: RayHosts, right: list[StreamResult]) -> None:
    status = wait_settled(cluster)
    where = {r["replica_id"]: cluster.host_of(status, r) for r in status["replicas"]}
    assert len({where[f"chat-{number}"] for number in (1, 2, 3)}) == 3, where
    assert where["safe-1"] is not where["safe-2"], where
    for answer in right:
        assert (answer.status, answer.error, answer.is_done) == (200, "", True), answer
        assert answer.text.startswith("[simulated] ")
        assert (len(answer.text), answer.usage[1]) == (NUM_TOKENS, NUM_TOKENS)
    texts = {(answer.ask.number, answer.text) for answer in right}
    assert len(texts) == len(ASKS) / 2, "the answers of an endpoint are not those of the other"
    with loaded(cluster, right) as load:
        pass
    check(load, right, set())
    print(Counter(result.replica_id for result in load.results))
    assert {result.replica_id for result in load.results} == {"chat-1", "chat-2", "chat-3", "safe:g1-1"}


def test_a_host_that_loses_its_power_takes_its_own_streams_with_it_and_no_others(
    cluster: RayHosts, right: list[StreamResult]
) -> None:
    victim = other_host(cluster)
    with loaded(cluster, right) as load:
        before = cluster.status()
        replicas = cluster.names_on(before, victim)
        wait_for(
            "its streams flow", lambda: any(r.replica_id in replicas and r.pieces for r in list(load.open))
        )
        killed_s = time.monotonic()
        excused = open_at(load, replicas)
        victim.kill()
        cluster.wait("it is noticed", lambda status: is_missed(status, before, replicas), 15)
        noticed_s = time.monotonic() - killed_s
        status = wait_settled(cluster)
        assert not cluster.names_on(status, victim)
        print(
            f"a host without power: noticed after {noticed_s:.2f} s, "
            f"{', '.join(replicas)} replaced after {time.monotonic() - killed_s:.1f} s"
        )
    check(load, right, excused)
    assert noticed_s < NOTICE_LIMIT_S


def is_missed(status: Status, before: Status, replicas: list[str]) -> bool:
    """Whether each of these replicas is known not to be where it was, or not to be heard of."""
    was = {r["replica_id"]: r for r in before["replicas"]}
    now = {r["replica_id"]: r for r in status["replicas"]}
    return all(
        name not in now or now[name]["pid"] != was[name]["pid"] or "has not answered" in now[name]["phase"]
        for name in replicas
    )


@pytest.mark.parametrize("outage_s", [8.0, 20.0])
def test_a_host_that_is_cut_off_and_comes_back_loses_no_stream_of_others_and_has_nothing_twice(
    cluster: RayHosts, right: list[StreamResult], outage_s: float
) -> None:
    victim = other_host(cluster)
    with loaded(cluster, right) as load:
        replicas = cluster.names_on(cluster.status(), victim)
        wait_for(
            "its streams flow", lambda: any(r.replica_id in replicas and r.pieces for r in list(load.open))
        )
        excused = open_at(load, replicas)
        victim.cut()
        time.sleep(outage_s)  # so long it is away
        victim.heal()
        healed_s = time.monotonic()
        status = wait_settled(cluster, GIVEN_UP_AFTER_S)
        took_s = time.monotonic() - healed_s - GIVEN_UP_AFTER_S
        print(
            f"cut off for {outage_s} s: settled {took_s:.1f} s after, "
            f"had {replicas}, has {cluster.names_on(status, victim)}"
        )
    check(load, right, excused)
