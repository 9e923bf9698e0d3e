"""Breaks the machines that gateways are on: lost whole, cut off for a while, or drained and then gone.

Lets those that went come back.

Owns when which machine goes and comes. Must not know what should follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from headrace.sim.gateway_nodes import Node
from headrace.sim.scenario import Fault, FaultKind

if TYPE_CHECKING:
    from headrace.sim.world import World

MAX_NOTICED_S = 30.0
"""A cluster sees the end of a process at once, and takes a machine without power for alive for so long."""


class NodeFaults:
    """Lets gateways' machines go."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_over = False

    def acts(self) -> dict[FaultKind, Callable[[Fault], str]]:
        """Return what each kind of fault does."""
        return {"gateway lost": self._lose, "gateway cut off": self._cut_off, "gateway drained": self._drain}

    def mend(self) -> None:
        """Machines that are gone come back as soon as the cluster knows that they were; others stay."""
        self._is_over = True
        nodes = self._world.nodes
        if nodes is not None:
            for node in nodes.nodes:
                if not node.is_lost:
                    nodes.keep(node)

    def _occupied(self, fault: Fault) -> Node | None:
        """Choose a machine that a gateway is on."""
        nodes = self._world.nodes
        if nodes is None:
            return None
        found = [place.node for place in nodes.placements.values() if not place.node.is_lost]
        return found[int(fault.pick * len(found))] if found else None

    def _lose(self, fault: Fault) -> str:
        node = self._occupied(fault)
        return self._take(node, fault) if node is not None else ""

    def _cut_off(self, fault: Fault) -> str:
        node = self._occupied(fault)
        world = self._world
        if node is None or world.nodes is None or world.nodes.unreachable_s(node.host) > 0:
            return ""
        num_processes = world.cut_off_node(node, fault.duration_s)
        return f"{node.host.name} with {num_processes} processes of {world.nodes.on_node(node)}"

    def _take(self, node: Node, fault: Fault) -> str:
        """Let it go now; it is there again after the fault's duration, or when its end was noticed."""
        world = self._world
        assert world.nodes is not None
        name, gateways = node.host.name, world.nodes.on_node(node)
        noticed_after_s = 0.5 + (MAX_NOTICED_S - 0.5) * fault.amount**3
        num_processes = world.lose_node(node, noticed_after_s)
        world.timeline.after(
            noticed_after_s + 0.1,
            lambda: self._bring_back(node, world.timeline.now_s + fault.duration_s),
            "node",
        )
        return f"{name} with {num_processes} processes of {gateways}, noticed after {noticed_after_s:.1f} s"

    def _bring_back(self, node: Node, when_s: float) -> None:
        """Let it be there again then, or as soon as faults are over."""
        world = self._world
        assert world.nodes is not None
        if self._is_over or world.timeline.now_s >= when_s:
            world.note(f"{node.host.name} is back")
            world.nodes.come_back(node)
        else:
            world.timeline.after(1.0, lambda: self._bring_back(node, when_s), "node")

    def _drain(self, fault: Fault) -> str:
        node = self._occupied(fault)
        world = self._world
        if node is None or node.is_draining:
            return ""
        assert world.nodes is not None
        world.nodes.drain(node, fault.duration_s)
        host = node.host
        world.timeline.after(fault.duration_s, lambda: self._end_drain(node, host, fault), "node")
        return f"{host.name} with {world.nodes.on_node(node)}"

    def _end_drain(self, node: Node, host: object, fault: Fault) -> None:
        """The time is over. It may have been lost before, or stay after all."""
        if node.host is host and node.is_draining and not node.is_lost:
            self._world.note(f"{node.host.name} goes: {self._take(node, fault)}")
