"""A cluster without Ray, for tests: nodes that tests add and take away, hosts that they make.

Must not know: what hosts hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from headrace.api.messages import NodeNeeds, NodeState
from headrace.fabric.cluster import ClusterUnavailable, HostLost, HostSilent, HostUnavailable, Reservation
from headrace.fabric.host_keys import further_keys, group_of, reservation_of
from headrace.fabric.host_messages import Membership


class FakeCluster:
    """Places are given out at once where a node has room. `make_host` returns what has a host's methods."""

    def __init__(
        self, make_host: Callable[[str, NodeState, Membership], Any], nodes: list[NodeState]
    ) -> None:
        """make_host: group, node and membership -> host. The first node is ours."""
        self._make_host = make_host
        self._nodes = {node.node_id: node for node in nodes}
        self._reserved: dict[str, tuple[NodeNeeds, list[str]]] = {}
        """What is needed, and the node of each part once all have one."""
        self._avoids: dict[str, Sequence[str]] = {}
        self.running: dict[str, tuple[Any, str]] = {}
        """Hosts with their nodes."""
        self.silent: set[str] = set()
        """Nodes, and keys of single hosts, that do not answer."""
        self.unavailable: set[str] = set()
        """Hosts to which the connection broke."""
        self.liked: list[str] = []
        """Nodes that places were asked on."""
        self.failure = ""
        """Why the cluster does not answer at all."""
        self.own_node_id = nodes[0].node_id
        self.own_address = nodes[0].address

    def __repr__(self) -> str:
        return f"FakeCluster({len(self._nodes)} nodes, {len(self.running)} hosts)"

    # ---- what tests do ----------------

    def add_node(self, node: NodeState) -> None:
        self._nodes[node.node_id] = node

    def lose_node(self, node_id: str) -> None:
        """It is gone with everything on it."""
        self._nodes[node_id] = msgspec.structs.replace(self._nodes[node_id], is_alive=False, available={})
        self.running = {key: entry for key, entry in self.running.items() if entry[1] != node_id}

    def drain_node(self, node_id: str, deadline_s: float = 0.0) -> None:
        """It is to go away. deadline_s: when, in seconds since 1970; 0: nobody says."""
        self._nodes[node_id] = msgspec.structs.replace(
            self._nodes[node_id], is_draining=True, drain_deadline_s=deadline_s
        )

    # ---- the seam ----------------

    async def nodes(self) -> list[NodeState]:
        self._check()
        return [msgspec.structs.replace(node, available=self._free(node)) for node in self._nodes.values()]

    async def reserve(self, key: str, needs: NodeNeeds, likes_node: str, avoids: Sequence[str]) -> None:
        self._check()
        self.liked.append(likes_node)
        self._avoids[key] = avoids
        self._reserved[key] = (needs, [])

    async def reservation(self, key: str) -> Reservation:
        self._check()
        if key not in self._reserved:
            return Reservation(is_gone=True)
        needs, nodes = self._reserved[key]
        if not nodes:
            while len(nodes) < needs.num_parts and (node_id := self._find_part(key, needs)):
                nodes.append(node_id)
            if len(nodes) < needs.num_parts:
                nodes.clear()
        return Reservation(nodes[0] if nodes else "")

    async def start_host(self, key: str, needs: NodeNeeds | None, membership: Membership) -> None:
        self._check()
        place, index = reservation_of(key)
        node_id = self.own_node_id
        if needs is not None:
            nodes = self._reserved[place][1]
            node_id = nodes[index if needs.num_parts > 1 else 0]
        host = self._make_host(group_of(key), self._nodes[node_id], membership)
        self.running[key] = (host, node_id)

    async def call(self, key: str, method: str, *arguments: object, limit_s: float) -> bytes:
        if key not in self.running:
            raise HostLost("its node is gone")
        host, node_id = self.running[key]
        if key in self.unavailable and method != "end":
            raise HostUnavailable("its connection broke")
        if node_id in self.silent or key in self.silent:
            await asyncio.sleep(limit_s)
            raise HostSilent(f"no answer within {limit_s:.1f} s")
        try:
            answer: bytes = await asyncio.to_thread(getattr(host, method), *arguments)
        except RuntimeError as error:
            raise HostLost(str(error) if key in self.running else "its node is gone") from None
        if key not in self.running:
            raise HostLost("its node is gone")
        return answer

    async def release(self, key: str) -> None:
        self._check()
        self._reserved.pop(key, None)
        self._avoids.pop(key, None)
        for each in (key, *further_keys(key)):
            host, _ = self.running.pop(each, (None, ""))
            if host is not None:
                await asyncio.shield(asyncio.to_thread(host.end))  # also when whoever asked is cancelled

    async def hosts(self) -> list[str]:
        self._check()
        return sorted({*map(_reservation, self.running), *self._reserved})

    def _find_part(self, key: str, needs: NodeNeeds) -> str:
        """The first node that has room for one part; empty: none."""
        for node in self._nodes.values():
            free = self._free(node)
            is_right = node.node_id not in needs.other_than and all(
                node.labels.get(name) == value for name, value in needs.labels.items()
            )
            has_room = all(
                free.get(n, 0.0) >= amount / needs.num_parts for n, amount in needs.resources.items()
            )
            if is_right and has_room and self._takes(key, node):
                return node.node_id
        return ""

    def _takes(self, key: str, node: NodeState) -> bool:
        return node.is_alive and not node.is_draining and node.node_id not in self._avoids[key]

    def _check(self) -> None:
        if self.failure:
            raise ClusterUnavailable(self.failure)

    def _free(self, node: NodeState) -> dict[str, float]:
        taken = [
            (needs, nodes.count(node.node_id) / needs.num_parts) for needs, nodes in self._reserved.values()
        ]
        return {
            name: total - sum(part * needs.resources.get(name, 0.0) for needs, part in taken)
            for name, total in (node.total if node.is_alive else {}).items()
        }


def _reservation(key: str) -> str:
    return reservation_of(key)[0]
