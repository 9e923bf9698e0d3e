"""The launcher of a simulated cluster: a gateway's processes are a group that gets a machine, or waits.

Stands for `fabric.ray_launcher` with its links and searches: what it says of groups that wait, of machines
that are silent and of those that are given up. Replicas are placed by the world. Must not know why anything
is started.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from headrace.api.messages import (
    LauncherError,
    LauncherEvent,
    ProcessEnded,
    ProcessSpec,
    ProcessStarted,
    ProcessState,
    ProcessWaiting,
)
from headrace.fabric.host_link import LOST_AFTER_S, SILENT_AFTER_S
from headrace.fabric.place_search import WAITING_PERIOD_S
from headrace.sim.gateway_nodes import MAX_LATE_S, GatewayNodes, Node
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.network import Connection, End
from headrace.sim.supervisor import Spawn, SupervisorProcess

_KINDS = frozenset({"router", "haproxy", "relay"})


def gateway_of_process(name: str) -> str:
    """Return the gateway that a process belongs to, by its name; empty: it belongs to none."""
    if ":" in name:
        return name.rpartition(":")[2].rpartition("-")[0]
    kind, _, gateway = name.partition("-")
    return gateway if kind in _KINDS else ""


class ClusterSupervisor(SupervisorProcess):
    """Holds all processes, those of gateways on machines of their own."""

    def __init__(self, registry: Registry, host: Host, spawn: Spawn, nodes: GatewayNodes) -> None:
        super().__init__(registry, host, spawn)
        self._nodes = nodes
        self._waiting: dict[str, ProcessSpec] = {}
        """Told to start, and without a place or on their way to it."""
        self._beginning: set[str] = set()
        """Gateways whose waiting processes are about to be looked at."""
        nodes.on_change = lambda: self._tell(nodes.told())

    def accept(self, address: str, connection: object) -> None:
        super().accept(address, connection)
        assert isinstance(connection, End)
        connection.send(self._nodes.told())

    def _on_closed(self, end: End) -> None:
        super()._on_closed(end)
        self._waiting.clear()  # the searches are the controller's, and end with it

    def _tell(self, event: LauncherEvent) -> None:
        for end in self._ends:
            end.send(event)

    # ---- starts and stops

    def _on_start(self, end: End, spec: ProcessSpec) -> None:
        gateway = gateway_of_process(spec.name)
        if not gateway or spec.name in self.children or self.refusals_left > 0 or self.is_stopping:
            super()._on_start(end, spec)
        elif spec.name in self._waiting:
            end.send(LauncherError(spec.name, "a process of this name is running"))
        else:
            self._waiting[spec.name] = spec
            if gateway not in self._beginning:
                self._beginning.add(gateway)
                self._seek(gateway)

    def _stop_all(self, *, is_alone: bool = True) -> None:
        super()._stop_all(is_alone=is_alone)
        self._waiting.clear()

    def _seek(self, gateway: str) -> None:
        """Start what waits as soon as its gateway has a machine, and say meanwhile that it waits."""
        waiting = self._waiting_of(gateway)
        has_place = gateway in self._nodes.placements
        if not waiting:
            self._beginning.discard(gateway)
        elif has_place or self._nodes.place(gateway):
            delay_s = 0.01 if has_place else self.random.uniform(0.3, 1.5)
            self.after(delay_s, lambda: self._begin_waiting(gateway), "cluster start")
        else:
            for name in waiting:
                self._tell(ProcessWaiting(name, "no node is free that no other gateway is on"))
            self.after(WAITING_PERIOD_S, lambda: self._seek(gateway), "cluster waits")

    def _begin_waiting(self, gateway: str) -> None:
        self._beginning.discard(gateway)
        placement = self._nodes.placements.get(gateway)
        if placement is None or placement.node.is_lost:
            return  # it was lost meanwhile: whoever notices that says so of all that wait
        if (left_s := self._nodes.unreachable_s(placement.host)) > 0:
            self._beginning.add(gateway)
            self.after(left_s, lambda: self._begin_waiting(gateway), "cluster start")
            return
        for name in self._waiting_of(gateway):
            self._tell(ProcessStarted(self._state(self._start(self._waiting.pop(name)))))
        self._give_back_if_empty(gateway)

    def _waiting_of(self, gateway: str) -> list[str]:
        return [name for name in self._waiting if gateway_of_process(name) == gateway]

    def _stop_child(self, name: str, grace_s: float) -> bool:
        if self._waiting.pop(name, None) is not None:
            self._tell(
                ProcessEnded(ProcessState(name, 0, is_alive=False, last_output="it never had a place"))
            )
            return True
        child = self.children.get(name)
        stop = super()._stop_child
        if child is None:
            return False
        self._when_reached(child, lambda: self.children.get(name) is child and stop(name, grace_s))
        return True

    def _on_exit(self, child: Process, code: int) -> None:
        notice = super()._on_exit
        self._when_reached(child, lambda: notice(child, code))

    def _when_reached(self, child: Process, call: Callable[[], object]) -> None:
        """Do it now, or as soon as what passes between a process's machine and this one arrives."""
        left_s = self._nodes.unreachable_s(child.host)
        if left_s > 0:
            self.after(left_s, call, "cluster reached")
        else:
            call()

    def _reap(self, child: Process, code: int | None, last_output: str = "") -> None:
        super()._reap(child, code, last_output)
        self._give_back_if_empty(gateway_of_process(child.name))

    def _state(self, child: Process) -> ProcessState:
        state = super()._state(child)
        return msgspec.structs.replace(
            state, node_address=state.node if gateway_of_process(child.name) else ""
        )

    def _give_back_if_empty(self, gateway: str) -> None:
        """What starts after the last process of a group has ended gets a place of its own."""
        names = (*self.children, *self._waiting)
        if gateway and all(gateway_of_process(name) != gateway for name in names):
            self._nodes.give_back(gateway)

    # ---- machines

    def lose_node(self, node: Node, noticed_after_s: float) -> int:
        """A machine is gone: at once for what is on it, late for others. Return how many processes were."""
        victims = self._on_node(node)
        self._nodes.lose(node)
        for child in victims:
            child.on_exit = None
            for connection in _far_connections(child):
                late_s = self.random.uniform(0.05, MAX_LATE_S)
                connection.cut((late_s, late_s))
            child.kill()
        self._say_silent(victims, self.timeline.now_s + noticed_after_s)
        self.after(noticed_after_s, lambda: self._give_up(node, victims), "cluster notices")
        return len(victims)

    def cut_off_node(self, node: Node, duration_s: float) -> int:
        """A machine reaches no other one for a while, but its clients. duration_s: shorter than what would
        have it given up. Return how many processes are on it."""
        assert duration_s < LOST_AFTER_S
        self._nodes.cut(node, duration_s)
        there = self._on_node(node)
        for child in there:
            for connection in _far_connections(child):
                if not any(end.process.is_outside for end in connection.ends):
                    connection.stall(duration_s)
        self._say_silent(there, self.timeline.now_s + duration_s)
        return len(there)

    def _on_node(self, node: Node) -> list[Process]:
        return [child for child in self.children.values() if child.host is node.host]

    def _say_silent(self, victims: list[Process], until_s: float) -> None:
        if self.timeline.now_s + SILENT_AFTER_S < until_s:
            self.after(SILENT_AFTER_S, lambda: self._say_silent(victims, until_s), "cluster waits")
            for child in victims:
                self._tell(ProcessWaiting(child.name, "its host has not answered"))

    def _give_up(self, node: Node, victims: list[Process]) -> None:
        """The cluster knows: the processes ended, and what was to start there cannot."""
        reason = f"its host on {node.host.name} is gone"
        gateways = self._nodes.on_node(node)
        for gateway in gateways:
            for name in self._waiting_of(gateway):
                del self._waiting[name]
                self._tell(LauncherError(name, reason))
        for child in victims:
            self._reap(child, None, reason)
        for gateway in gateways:
            self._nodes.give_back(gateway)
        self._nodes.on_change()


def _far_connections(process: Process) -> list[Connection]:
    """Return those to other machines."""
    connections = [thing for thing in process.held if isinstance(thing, Connection)]
    return [each for each in connections if any(end.process.host is not process.host for end in each.ends)]
