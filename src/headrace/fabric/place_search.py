"""Getting a place for a host: choices in their order, away from nodes that go away or are silent.

Says meanwhile what is waited for.

Must not know: what the place is for, or how a cluster gives it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from headrace.api.messages import NodeNeeds, NodeState, Place
from headrace.clock import Clock
from headrace.fabric.cluster import Cluster, HostLost
from headrace.fabric.node_choice import choose_node, explain_wait, kept_apart

WAITING_PERIOD_S = 1.0
"""How often it is said what a place is waited for."""
_PLACE_POLL_S = 0.05
_MAX_PLACE_POLL_S = 0.5
_Outcome = Literal["had", "over", "unwanted", "anew"]


@dataclass(frozen=True, slots=True)
class Seeker:
    """Who looks for a place."""

    key: str
    """Of the host."""
    is_wanted: Callable[[], bool]
    count_same: Callable[[], Counter[str]]
    """Processes of the same family, by node id."""
    count_asked: Callable[[], Counter[str]]
    """Others of the family that wait for a place which was asked on each node."""
    silent_nodes: Callable[[], Collection[str]]
    """Those that do not answer: a cluster may take a dead one for alive for most of a minute."""
    tell: Callable[[str], None]
    """Hears why it takes long."""


class PlaceSearch:
    """One search. `node_id` is where the place is, once it was had; `liked_node_id` where it was asked for,
    if not anywhere."""

    def __init__(self, seeker: Seeker, cluster: Cluster, clock: Clock, place: Place) -> None:
        self.node_id = self.liked_node_id = ""
        self._seeker = seeker
        self._cluster = cluster
        self._clock = clock
        self._place = place
        self._began_s = clock.now_s()
        self._told_s = clock.now_s()

    def __repr__(self) -> str:
        return f"PlaceSearch({self._seeker.key}, {self.node_id or 'waiting'})"

    async def run(self) -> NodeNeeds | None:
        """Try the choices in their order, the last one without a limit. Return the one that was had; None:
        nobody wants it any more. Raises HostLost and ClusterUnavailable."""
        choices = self._place.choices
        for index, needs in enumerate(choices):
            limit_s = 0.0 if index == len(choices) - 1 else needs.wait_s
            outcome = await self._try_choice(needs, limit_s)
            if outcome != "over":
                return needs if outcome == "had" else None
        return None

    async def _try_choice(self, choice: NodeNeeds, limit_s: float) -> _Outcome:
        """limit_s: 0 is none."""
        began_s = self._clock.now_s()
        while True:
            needs = self._apart(choice)
            nodes = await self._cluster.nodes()
            avoided = self._avoided(nodes)
            staying = [node for node in nodes if node.node_id not in avoided]
            num_same = self._seeker.count_same() + self._seeker.count_asked()
            self.liked_node_id = choose_node(staying, needs, self._place.strategy, num_same)
            await self._cluster.reserve(self._seeker.key, needs, self.liked_node_id, avoided)
            end_s = began_s + limit_s if limit_s else None
            outcome = await self._await_place(needs, end_s, avoided)
            if outcome == "had":
                return outcome
            await self._cluster.release(self._seeker.key)
            if outcome != "anew":
                return outcome

    async def _await_place(self, needs: NodeNeeds, end_s: float | None, avoided: Sequence[str]) -> _Outcome:
        """anew: the place is on a node that goes away, or one that was avoided does not, or others of the
        family that it must be apart from have moved."""
        pause_s = _PLACE_POLL_S
        while self._seeker.is_wanted():
            if self._apart(needs) != needs:
                return "anew"
            reservation = await self._cluster.reservation(self._seeker.key)
            if reservation.is_gone:
                raise HostLost("its place was taken away before it was used")
            if reservation.node_id:
                now_avoided = self._avoided(await self._cluster.nodes())
                if reservation.node_id in now_avoided and reservation.node_id not in avoided:
                    return "anew"
                if self._apart(needs) != needs:
                    return "anew"
                self.node_id = reservation.node_id
                return "had"
            now_s = self._clock.now_s()
            if end_s is not None and now_s >= end_s:
                return "over"
            if now_s - self._told_s >= WAITING_PERIOD_S:
                self._told_s = now_s
                nodes = await self._cluster.nodes()
                now_avoided = self._avoided(nodes)
                self._seeker.tell(explain_wait(nodes, needs, now_avoided))
                if set(avoided) - set(now_avoided):
                    return "anew"
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PLACE_POLL_S)
        return "unwanted"

    def _apart(self, needs: NodeNeeds) -> NodeNeeds:
        """What is asked for as the others of the family are placed now."""
        return kept_apart(self._place, needs, self._seeker.count_same())

    def _avoided(self, nodes: Sequence[NodeState]) -> list[str]:
        """Live nodes that go away, because the cluster drains them or they have notices, or do not answer."""
        spent_s = self._clock.now_s() - self._began_s
        left, silent = self._place.avoided, self._seeker.silent_nodes()
        return [
            node.node_id
            for node in nodes
            if node.is_alive
            and (node.is_draining or left.get(node.node_id, 0.0) > spent_s or node.node_id in silent)
        ]
