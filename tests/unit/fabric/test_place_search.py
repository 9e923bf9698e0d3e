"""Where a host gets its place while nodes go away, on a cluster that tests play."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from headrace.api.messages import NodeNeeds, NodeState, Place
from headrace.clock import VirtualClock
from headrace.fabric.cluster import Reservation
from headrace.fabric.fake_cluster import FakeCluster
from headrace.fabric.place_search import PlaceSearch, Seeker

ONE_CPU = NodeNeeds({"CPU": 1.0})
HERE = NodeState("here", "10.0.0.1", True, {"CPU": 2.0})
THERE = NodeState("there", "10.0.0.2", True, {"CPU": 2.0})


class Cluster(FakeCluster):
    """Drains a node, or lets time pass, right after its place was asked for."""

    def __init__(self, *nodes: NodeState) -> None:
        super().__init__(lambda group, node, membership: None, list(nodes))
        self.clock = VirtualClock(100.0)
        self.drained_when_had = ""
        self.asked: list[list[str]] = []
        self.when_asked: Callable[[], None] = lambda: None

    async def reserve(self, key: str, needs: NodeNeeds, likes_node: str, avoids: object) -> None:
        assert isinstance(avoids, list)
        self.asked.append(avoids)
        self.when_asked()
        await super().reserve(key, needs, likes_node, avoids)

    async def reservation(self, key: str) -> Reservation:
        found = await super().reservation(key)
        if found.node_id and found.node_id == self.drained_when_had:
            self.drain_node(found.node_id)
        self.clock.advance(0.6)
        return found


def search(
    cluster: Cluster, place: Place, told: list[str] | None = None, same: Counter[str] | None = None
) -> PlaceSearch:
    """same: how many of the family each node has; changed by the test."""
    told, family = [] if told is None else told, Counter[str]() if same is None else same

    def count_same() -> Counter[str]:
        return family.copy()

    seeker = Seeker(
        "chat-1#1", lambda: len(told) < 3, count_same, Counter, lambda: cluster.silent, told.append
    )
    return PlaceSearch(seeker, cluster, cluster.clock, place)


async def run(search: PlaceSearch) -> NodeNeeds | None:
    async with asyncio.timeout(10):
        return await search.run()


async def test_a_place_on_a_node_that_goes_away_meanwhile_is_given_back_for_another() -> None:
    cluster = Cluster(HERE, THERE)
    cluster.drained_when_had = "here"
    searching = search(cluster, Place([ONE_CPU]))
    assert await run(searching) == ONE_CPU
    assert searching.node_id == "there"
    assert cluster.asked == [[], ["here"]]


async def test_a_node_with_a_notice_is_avoided_for_as_long_as_was_said() -> None:
    cluster, told = Cluster(HERE), list[str]()
    searching = search(cluster, Place([ONE_CPU], avoided={"here": 2.0}), told)
    assert await run(searching) == ONE_CPU
    assert (searching.node_id, cluster.asked) == ("here", [["here"], []])
    assert told[0].endswith("Nothing is put on nodes that go away or do not answer: here")
    assert cluster.clock.now_s() >= 102.0


async def test_the_second_choice_is_away_from_such_nodes_as_well() -> None:
    cluster = Cluster(HERE, THERE)
    choices = [NodeNeeds({"CPU": 4.0}, wait_s=1.0), ONE_CPU]
    searching = search(cluster, Place(choices, avoided={"here": 60.0}))
    assert await run(searching) == ONE_CPU
    assert searching.node_id == "there"


async def test_what_nobody_wants_any_more_is_given_back() -> None:
    cluster = Cluster(HERE)
    cluster.drain_node("here")
    assert await run(search(cluster, Place([ONE_CPU]))) is None
    assert await cluster.hosts() == []


async def test_a_node_that_does_not_answer_is_avoided_until_it_does() -> None:
    cluster, told = Cluster(HERE), list[str]()
    cluster.silent.add("here")
    searching = search(cluster, Place([ONE_CPU]), told)
    task = asyncio.create_task(run(searching))
    while not told:  # noqa: ASYNC110, the search waits by itself
        await asyncio.sleep(0.01)
    cluster.silent.clear()
    assert await task == ONE_CPU
    assert cluster.asked == [["here"], []]


async def test_one_that_is_to_be_apart_asks_anew_when_another_of_its_family_took_the_node() -> None:
    cluster = Cluster(HERE, THERE)
    same = Counter[str]()
    cluster.when_asked = lambda: same.update({"here": 1 - same["here"]})
    searching = search(cluster, Place([ONE_CPU], "apart"), same=same)
    found = await run(searching)
    assert found is not None
    assert searching.node_id == "there"


async def test_others_that_wait_for_a_place_count_as_if_they_had_it() -> None:
    cluster = Cluster(HERE, THERE)
    seeker = Seeker("chat-1#1", lambda: True, Counter, lambda: Counter(["here"]), set, [].append)
    searching = PlaceSearch(seeker, cluster, cluster.clock, Place([ONE_CPU]))
    assert await run(searching) == ONE_CPU
    assert searching.liked_node_id == "there"
