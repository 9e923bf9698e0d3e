"""The machines that gateways may be on: one on each; lost whole, cut off, drained, and there again.

Owns the machines and which gateway is where. Stands for a cluster's view of its nodes and for its places that
are apart. Must not know what gateways do, or who starts their processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.api.messages import Nodes, NodeState
from headrace.sim.machine import Host
from headrace.sim.network import Weather
from headrace.sim.timeline import Timeline

MAX_LATE_S = 8.0
"""So long after a machine is gone others may still take their connections to it for open."""


@dataclass(slots=True)
class Node:
    """One machine. When it comes back it is a node of another id, with a clock that began anew."""

    host: Host
    skew: float
    num_lives: int = 1
    is_lost: bool = False
    is_draining: bool = False
    deadline_s: float = 0.0
    """When a drained one goes, in seconds since 1970 on the controller's clock."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a gateway is, from its first process there to its last."""

    number: int
    """No two have the same: what was written there for another one is out of date."""
    node: Node

    @property
    def host(self) -> Host:
        return self.node.host


class GatewayNodes:
    """All machines for gateways of one world."""

    def __init__(
        self, timeline: Timeline, weather: Weather, skews: Sequence[float], others: Sequence[Host]
    ) -> None:
        """skews: one per machine. others: the controller's machine, then those of replicas."""
        self._timeline = timeline
        self._weather = weather
        self._others = tuple(others)
        self._num_placements = 0
        self.nodes = [
            Node(Host(timeline, f"gateway-node-{number}", skew), skew) for number, skew in enumerate(skews)
        ]
        self.placements: dict[str, Placement] = {}
        """By gateway."""
        self.lost_s: dict[str, float] = {}
        """When each gateway's machine was lost last, in true time."""
        self.cut_off: set[str] = set()
        """Gateways whose machine was cut off from all others at some time."""
        self.deadlines_s: dict[str, float] = {}
        """When the last drained node of each gateway was to go, on the controller's wall clock."""
        self.on_change: Callable[[], None] = lambda: None
        """Hears of every change that the cluster tells of."""

    def __repr__(self) -> str:
        return f"<GatewayNodes { ({name: place.host.name for name, place in self.placements.items()}) }>"

    # ---- places

    def place(self, gateway: str) -> bool:
        """Find a place for a gateway that has none. False: no machine is free."""
        assert gateway not in self.placements
        taken = {id(place.node) for place in self.placements.values()}
        for node in self.nodes:
            is_silent = self.unreachable_s(node.host) > 0
            if not (node.is_lost or node.is_draining or is_silent or id(node) in taken):
                self._num_placements += 1
                self.placements[gateway] = Placement(self._num_placements, node)
                return True
        return False

    def give_back(self, gateway: str) -> None:
        """Nothing of a gateway is where it was any more."""
        self.placements.pop(gateway, None)

    def unreachable_s(self, host: Host) -> float:
        """Return how long the controller's machine and `host` will not reach each other."""
        return self._weather.unreachable_s(self._others[0], host, self._timeline.now_s)

    def on_node(self, node: Node) -> list[str]:
        """Return the gateways on a machine: one, or none."""
        return [gateway for gateway, place in self.placements.items() if place.node is node]

    # ---- what happens to machines

    def lose(self, node: Node) -> None:
        """It is gone with all that is on it, which its holder kills. The cluster does not know yet."""
        node.is_lost = True
        for gateway in self.on_node(node):
            self.lost_s[gateway] = self._timeline.now_s

    def cut(self, node: Node, duration_s: float) -> None:
        """All on it lives, and reaches no other machine for a while. The cluster waits that long for it."""
        self._weather.cut_off(node.host, self._timeline.now_s + duration_s)
        self.cut_off.update(self.on_node(node))

    def drain(self, node: Node, left_s: float) -> None:
        """The cluster wants it empty, and takes it away in left_s."""
        node.is_draining, node.deadline_s = True, self._others[0].wall_s() + left_s
        for gateway in self.on_node(node):
            self.deadlines_s[gateway] = node.deadline_s
        self.on_change()

    def keep(self, node: Node) -> None:
        """It does not go away after all."""
        node.is_draining, node.deadline_s = False, 0.0
        self.on_change()

    def come_back(self, node: Node) -> None:
        """It is there again, empty, and the cluster knows."""
        node.num_lives += 1
        name = node.host.name.partition(" ")[0]
        node.host = Host(self._timeline, f"{name} {node.num_lives}", node.skew)
        node.is_lost = False
        self.keep(node)

    def told(self) -> Nodes:
        """Return what the cluster says of its nodes."""
        states = [NodeState(host.name, "") for host in self._others]
        states += [
            NodeState(
                node.host.name,
                "",
                is_alive=not node.is_lost,
                is_draining=node.is_draining,
                drain_deadline_s=node.deadline_s,
            )
            for node in self.nodes
        ]
        return Nodes(states, self._others[0].name)
