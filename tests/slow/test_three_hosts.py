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
from tests.slow.ray_hosts import EDGE, GATEWAY_PORT, KEY, RayHosts, Status, ray_hosts, serving_hosts

from headrace.fabric.host_link import LOST_AFTER_S

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
FEW_STREAMS = 4
"""Where a host starts again meanwhile, for which Ray has little patience."""
NOTICE_LIMIT_S = 3.0
"""2 s, and what a busy machine adds."""
SETTLE_LIMIT_S = 150.0
EDGE_GATEWAYS = {
    "bind": f"node:{GATEWAY_PORT}",
    "count": 2,
    "placement": {"labels": {"kind": EDGE}, "resources": {"CPU": 0.1}},
}
DRAIN_DEADLINE_S = 120
CLIENT_LIMIT_S = 10.0
"""Of clients of a gateway that will be no more: nobody tells them so."""
GIVEN_UP_AFTER_S = 12.0
"""The launcher may give a host up that is back already: Ray's connections to it come back later."""


@pytest.fixture
def cluster() -> Iterator[RayHosts]:
    """A fresh one for each test: what one does to hosts moves replicas, and Ray remembers it for a minute."""
    with serving_hosts(ENDPOINTS) as cluster:
        yield cluster


@pytest.fixture
def right(cluster: RayHosts) -> list[StreamResult]:
    return ask_all(cluster.url, list(ASKS), NUM_STREAMS, KEY)


@pytest.fixture
def edged() -> Iterator[RayHosts]:
    """A fresh cluster whose two gateways are on the hosts beside the head."""
    with serving_hosts(ENDPOINTS, EDGE_GATEWAYS) as cluster:
        yield cluster


@contextlib.contextmanager
def loaded(cluster: RayHosts, right: list[StreamResult], url: str = "") -> Iterator[SteadyLoad]:
    """Streams at both endpoints, which all have been begun at the start of the block and end by its end.
    url: of a gateway; empty: the one on the head."""
    with SteadyLoad(url or cluster.url, ASKS, right, NUM_STREAMS, KEY) as load:
        wait_until_streams_flow(load, NUM_STREAMS)
        yield load
        num_ended = len(load.results) + NUM_STREAMS
        try:
            wait_for("streams go on", lambda: len(load.results) >= num_ended, 60)
        except AssertionError as error:
            still = [f"{r.ask.model} {r.replica_id} {r.status} {len(r.pieces)}" for r in list(load.open)]
            num_ended -= NUM_STREAMS
            raise AssertionError(
                f"{error}: {num_ended} had ended, now {len(load.results)}; open {still}\n"
                f"{cluster.explain(cluster.status())}"
            ) from None


def wait_until_streams_flow(load: SteadyLoad, num_streams: int) -> None:
    wait_for("streams flow", lambda: sum(len(r.pieces) > 3 for r in list(load.open)) >= num_streams - 2, 30)


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
        wait_for_streams(load, replicas)
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


def wait_for_streams(load: SteadyLoad, replicas: list[str]) -> None:
    """Until one that one of these replicas serves has begun."""
    wait_for("its streams flow", lambda: any(r.replica_id in replicas and r.pieces for r in list(load.open)))


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
        before = cluster.status()
        replicas = cluster.names_on(before, victim)
        wait_for_streams(load, replicas)
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
    if outage_s < LOST_AFTER_S:
        assert pids(status) == pids(before), "it was back in time, and nothing of it was given up"


def pids(status: Status) -> dict[str, int]:
    return {r["replica_id"]: r["pid"] for r in status["replicas"]}


def test_a_host_that_is_drained_for_maintenance_is_left_under_load_without_a_lost_request(
    cluster: RayHosts, right: list[StreamResult]
) -> None:
    victim = other_host(cluster)
    with loaded(cluster, right) as load:
        before = cluster.status()
        was = {r["replica_id"]: r["pid"] for r in before["replicas"] if cluster.host_of(before, r) is victim}
        drained_s = time.monotonic()
        cluster.drain(victim, before, DRAIN_DEADLINE_S)
        fewest_ready = dict.fromkeys(ENDPOINTS, math.inf)
        said = ""

        def is_empty(status: Status) -> bool:
            nonlocal said
            said = said or next((n["leaving"] for n in status["nodes"] if n["address"] == victim.address), "")
            for endpoint in status["endpoints"]:
                fewest_ready[endpoint["name"]] = min(fewest_ready[endpoint["name"]], endpoint["ready"])
            here = {
                r["replica_id"]: r["pid"] for r in status["replicas"] if cluster.host_of(status, r) is victim
            }
            assert here.items() <= was.items(), f"{here} is on a host that is drained and had {was}"
            return not here and not fronts_on(victim)

        cluster.wait("it is empty", is_empty, DRAIN_DEADLINE_S)
        left_s = time.monotonic() - drained_s
        cluster.wait("Ray lets it go", lambda status: victim.address not in alive_addresses(status))
        gone_s = time.monotonic() - drained_s
        status = wait_settled(cluster)
        assert not cluster.names_on(status, victim)
    check(load, right, set())
    print(f"drained: {', '.join(was)} had left after {left_s:.1f} s, the node after {gone_s:.1f} s; {said!r}")
    assert said.startswith("draining for ")
    assert fewest_ready == {"chat": 3, "safe": 2}


def alive_addresses(status: Status) -> list[str]:
    return [node["address"] for node in status["nodes"] if node["is_alive"]]


def test_a_gateway_that_is_lost_with_its_host_takes_no_stream_of_the_other_and_comes_again(
    edged: RayHosts,
) -> None:
    status = wait_settled(edged)
    kept, lost = edged.gateways(status)
    assert edged.head not in (kept, lost)
    gateways = edged.gateways(status)
    kept_url, lost_url, lost_id = gateways[kept]["url"], gateways[lost]["url"], gateways[lost]["gateway_id"]
    right = ask_all(kept_url, list(ASKS), NUM_STREAMS, KEY)
    with (
        loaded(edged, right, kept_url) as load,
        SteadyLoad(lost_url, ASKS, right, NUM_STREAMS, KEY, CLIENT_LIMIT_S) as lost_load,
    ):
        wait_until_streams_flow(lost_load, NUM_STREAMS)
        before = edged.status()
        replicas = edged.names_on(before, lost)
        excused = open_at(load, replicas)
        lost.kill()
        killed_s = time.monotonic()
        lost_load.end()
        status = edged.wait("it waits for a node", lambda status: waits(status, lost_id), 60)
        waits_s = time.monotonic() - killed_s
        said = gateway_of(status, lost_id)["waiting_for"]
        assert not status["is_ready"]
        host = edged.add_host()
        added_s = time.monotonic()
        edged.wait("it is there again", lambda status: host in edged.gateways(status), 60)
        status = wait_settled(edged)
        again_s = time.monotonic() - added_s
        gateways = edged.gateways(status)
        assert gateways[host]["gateway_id"] == lost_id
        assert gateways[kept]["url"] == kept_url
        again = ask_all(gateways[host]["url"], list(ASKS), NUM_STREAMS, KEY)
    check(load, right, excused)
    assert [answer.outcome(each) for answer, each in zip(again, right, strict=True)] == ["same"] * len(ASKS)
    print(f"a gateway's host without power, with {replicas}: told after {waits_s:.1f} s, {said!r}")
    print(f"it was there again {again_s:.1f} s after another host had joined")
    print(f"longest gaps: {longest_gaps(load)}; streams of the lost one: {dict(lost_load.outcomes())}")
    assert lost_load.outcomes()["different"] == 0


def test_a_head_that_is_lost_with_its_host_and_comes_back_with_its_store_finds_all_that_serves() -> None:
    with ray_hosts(3, has_store=True) as cluster:
        cluster.up(ENDPOINTS, EDGE_GATEWAYS, is_detached=True)
        before = wait_settled(cluster)
        url = before["gateways"][0]["url"]
        on_head = cluster.names_on(before, cluster.head)
        right = ask_all(url, list(ASKS), NUM_STREAMS, KEY)
        with SteadyLoad(url, ASKS, right, FEW_STREAMS, KEY) as load:
            wait_until_streams_flow(load, FEW_STREAMS)
            excused = open_at(load, on_head)
            cluster.head.kill()
            killed_s = time.monotonic()
            wait_ended(load, NUM_STREAMS)
            cluster.revive_head()
            back_s = time.monotonic()
            cluster.wait("there is a controller again", bool, SETTLE_LIMIT_S)
            answers_s = time.monotonic()
            status = wait_settled(cluster)
            settled_s = time.monotonic()
            wait_ended(load, NUM_STREAMS)
        print(
            f"the head was away for {back_s - killed_s:.1f} s, with {on_head}; the controller answered "
            f"{answers_s - back_s:.1f} s after, and all was there after {settled_s - back_s:.1f} s"
        )
        check(load, right, excused)
        was, now = pids(before), pids(status)
        untouched = {name: pid for name, pid in was.items() if name not in on_head}
        assert {name: now[name] for name in untouched} == untouched
        cluster.down()


def wait_ended(load: SteadyLoad, num_more: int) -> None:
    """Until so many more streams have ended."""
    num_ended = len(load.results) + num_more
    wait_for("streams go on", lambda: len(load.results) >= num_ended, 60)


def longest_gaps(load: SteadyLoad) -> str:
    """The longest pause between two texts of any stream that ended well, by endpoint."""
    gaps_s = dict.fromkeys(ENDPOINTS, 0.0)
    for result in load.results:
        if result.is_done:
            gaps_s[result.ask.model] = max(gaps_s[result.ask.model], result.longest_gap_s)
    return ", ".join(f"{name} {gap_s:.1f} s" for name, gap_s in gaps_s.items())


def gateway_of(status: Status, gateway_id: str) -> Status:
    return next(each for each in status["gateways"] if each["gateway_id"] == gateway_id)


def waits(status: Status, gateway_id: str) -> bool:
    """Whether a gateway has no node, and says why."""
    gateway = gateway_of(status, gateway_id)
    return not gateway["url"] and "nodes that would do has one already" in gateway["waiting_for"]
