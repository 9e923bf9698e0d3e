"""What the controller knows of the gateways: router, HAProxy and relay of each, and the routers' demand.

Owns the Essentials and each router's last Demand. Gateways know nothing of each other; here their words are
added up. Pure: events and `now_s` come in. Must not know: HAProxy's words, sockets, launchers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from headrace.api.messages import (
    Demand,
    EndpointDemand,
    ProcessState,
    haproxy_name,
    is_same_process,
    relay_name,
    router_name,
)
from headrace.control.essentials import HUNG_AFTER_S, STOOD_STILL_S, Essential
from headrace.control.version_counts import VersionCounts

DEMAND_FRESH_S = 2.0
"""A Demand older than this says nothing about now."""
MAX_SILENCES = 2
"""A HAProxy that kept silent so often in a row hangs. Each takes two limits of a probe: 8 s in all."""


@dataclass(slots=True)
class GatewayPair:
    """One gateway: its processes, and what its router last said."""

    gateway_id: str
    router: Essential
    haproxy: Essential
    relay: Essential
    demand: Demand | None = None
    demand_s: float = field(default=-math.inf)
    has_answered: bool = False
    """HAProxy answered its last probe."""
    node: str = ""
    """Id of the node that it is on, or was on last; empty: this machine."""
    node_address: str = ""
    """As in ProcessState."""
    is_elsewhere: bool = False
    """That is not the controller's node: what it says comes through a tunnel."""
    waiting_for: str = ""
    """Why it has no node, or is not heard on it; empty: it has one, and is."""
    leaving: str = ""
    """Why it leaves its node (`gateway_departure`); empty: it stays."""
    unreached_s: float = -math.inf
    """When nothing at all was heard of it on another node: it may be the way there that was broken."""
    num_silences: int = 0
    """HAProxy's last probes in a row to which it said nothing on any socket."""

    @classmethod
    def of(cls, gateway_id: str) -> GatewayPair:
        names = router_name(gateway_id), haproxy_name(gateway_id), relay_name(gateway_id)
        router, haproxy, relay = (Essential(name) for name in names)
        return cls(gateway_id, router, haproxy, relay)

    def hung(self, now_s: float) -> list[Essential]:
        """Return what must be killed. HAProxy is judged by its silences, not by time without an answer: at
        its limit of connections it answers no probe, and killing it would cut all streams."""
        if now_s - self.unreached_s <= HUNG_AFTER_S:
            return []
        found = [essential for essential in (self.router, self.relay) if essential.is_hung(now_s)]
        if self.num_silences >= MAX_SILENCES and self.haproxy.is_alive and not self.haproxy.is_stopping:
            found.append(self.haproxy)
        return found

    @property
    def pid(self) -> int:
        """Of its router."""
        return self.router.pid

    @property
    def processes(self) -> tuple[Essential, Essential, Essential]:
        return self.router, self.haproxy, self.relay

    @property
    def is_placeless(self) -> bool:
        """It waits for a node: nothing of it runs, and no request is there."""
        return bool(self.waiting_for) and not any(essential.pid for essential in self.processes)

    def is_reached(self, now_s: float) -> bool:
        """Whether any of its processes was heard lately."""
        return (
            self.fresh_demand(now_s) is not None
            or self.has_answered
            or (self.relay.is_alive and now_s - self.relay.heard_s <= DEMAND_FRESH_S)
        )

    def fresh_demand(self, now_s: float) -> Demand | None:
        """What the router said lately; None if it said nothing."""
        return self.demand if now_s - self.demand_s <= DEMAND_FRESH_S else None


class GatewayState:
    """All gateways of one system."""

    def __init__(self, gateway_ids: Iterable[str]) -> None:
        self.pairs = {gateway_id: GatewayPair.of(gateway_id) for gateway_id in gateway_ids}
        self.processes = {
            essential.name: essential for pair in self.pairs.values() for essential in pair.processes
        }
        self.version_counts = VersionCounts()
        self._ticked_s = math.inf

    def __repr__(self) -> str:
        return f"GatewayState({', '.join(f'{p.name} {p.state}' for p in self.processes.values())})"

    @property
    def has_answered(self) -> bool:
        """Every HAProxy answered its last probe."""
        return all(pair.has_answered for pair in self.pairs.values())

    def adopt(self, process: ProcessState, own_node_id: str, now_s: float) -> None:
        """Take over a process that ran before this controller."""
        self.processes[process.name].on_adopted(process, now_s)
        self._note_node(process, own_node_id)

    def on_started(self, process: ProcessState, own_node_id: str) -> None:
        """A process runs, on some node. own_node_id: the controller's."""
        self.processes[process.name].pid = process.pid
        self._note_node(process, own_node_id)

    def on_waiting(self, name: str, reason: str, now_s: float) -> None:
        """A process waits for a node, or its node is silent: then it is not judged by its own silence."""
        self.processes[name].heard_s = now_s
        self._pair_of(name).waiting_for = reason

    def _note_node(self, process: ProcessState, own_node_id: str) -> None:
        pair = self._pair_of(process.name)
        pair.node, pair.node_address, pair.waiting_for = process.node, process.node_address, ""
        pair.is_elsewhere = process.node not in ("", own_node_id)

    def _pair_of(self, name: str) -> GatewayPair:
        return next(pair for pair in self.pairs.values() if self.processes[name] in pair.processes)

    def on_demand(self, demand: Demand, now_s: float) -> None:
        """Take a router's view. One of an unknown or an earlier router process is ignored."""
        pair = self.pairs.get(demand.router_id)
        if pair is None or not is_same_process(demand, pair):
            return
        pair.demand, pair.demand_s, pair.waiting_for = demand, now_s, ""
        pair.router.heard_s = now_s
        self.version_counts.observe(demand)

    def on_tick(self, now_s: float) -> None:
        """A tick begins. After one that came late everybody has the time again to be heard: it was the
        controller that stood still. So has a gateway of which nothing was heard."""
        for pair in self.pairs.values():
            if pair.is_elsewhere and not pair.is_reached(now_s):
                pair.unreached_s, pair.num_silences = now_s, 0
        late_s = now_s - self._ticked_s
        self._ticked_s = now_s
        if late_s > STOOD_STILL_S:
            for essential in self.processes.values():
                essential.heard_s = min(now_s, essential.heard_s + late_s)

    def due(self, now_s: float) -> list[Essential]:
        """Return the processes that are to be started now."""
        staying = [pair for pair in self.pairs.values() if not pair.leaving]
        return [each for pair in staying for each in pair.processes if each.is_due(now_s)]

    def hung(self, now_s: float) -> list[Essential]:
        """Return the processes that live and say nothing: to be killed, and started again when they ended."""
        return [essential for pair in self.pairs.values() for essential in pair.hung(now_s)]

    def on_probe(self, gateway_id: str, has_answered: bool, now_s: float, *, is_silent: bool = False) -> None:
        """Take the result of asking a HAProxy something. is_silent: it said nothing on any of its sockets."""
        pair = self.pairs[gateway_id]
        pair.has_answered = has_answered
        pair.num_silences = pair.num_silences + 1 if is_silent else 0
        if has_answered:
            pair.haproxy.heard_s = now_s

    def on_ended(self, name: str, error: str, now_s: float) -> None:
        """A router, HAProxy or relay ended or could not be started."""
        self.processes[name].on_ended(now_s, error)
        if not any(essential.pid for essential in self._pair_of(name).processes):
            self._pair_of(name).waiting_for = ""
        for pair in self.pairs.values():
            if name == pair.router.name:
                pair.demand = None
            elif name == pair.haproxy.name:
                pair.has_answered = False
                pair.num_silences = 0

    def left(self) -> set[str]:
        """Return the gateways that leave their nodes and have no connections any more."""
        return {name for name, pair in self.pairs.items() if pair.leaving and not pair.haproxy.is_alive}

    def demands(self) -> Iterator[Demand]:
        """Yield each router's last word."""
        for pair in self.pairs.values():
            if pair.demand is not None:
                yield pair.demand

    def demand_of(self, endpoint: str) -> EndpointDemand:
        """The routers' last words on `endpoint`, added up; zeros if there are none."""
        entries = [
            entry for demand in self.demands() for entry in demand.endpoints if entry.endpoint == endpoint
        ]
        return EndpointDemand(
            endpoint=endpoint,
            num_held=sum(entry.num_held for entry in entries),
            oldest_held_s=max((entry.oldest_held_s for entry in entries), default=0.0),
            num_in_flight=sum(entry.num_in_flight for entry in entries),
            arrived=sum(entry.arrived for entry in entries),
            finished=sum(entry.finished for entry in entries),
            aborted=sum(entry.aborted for entry in entries),
            refused=sum(entry.refused for entry in entries),
            failed=sum(entry.failed for entry in entries),
        )

    def demands_by_router(self) -> dict[str, dict[str, EndpointDemand]]:
        """Return each endpoint's last words, by the router process that said them."""
        words: dict[str, dict[str, EndpointDemand]] = {}
        for demand in self.demands():
            for entry in demand.endpoints:
                words.setdefault(entry.endpoint, {})[
                    f"{demand.router_id}/{demand.pid}/{demand.node_address}"
                ] = entry
        return words

    def is_heard(self, now_s: float) -> bool:
        """Whether every router that has a node said something lately."""
        placed = [pair for pair in self.pairs.values() if not pair.is_placeless]
        return bool(placed) and all(pair.fresh_demand(now_s) is not None for pair in placed)

    def serving_replicas(self, now_s: float) -> frozenset[str] | None:
        """Replicas that every gateway sends requests to. None: some router has not said so lately."""
        serving = self.serving_by_gateway(now_s)
        return frozenset.intersection(*serving.values()) if len(serving) == len(self.pairs) else None

    def serving_by_gateway(self, now_s: float) -> dict[str, frozenset[str]]:
        """Replicas and durable fronts that each gateway sends requests to, of those that said so lately."""
        return {
            pair.gateway_id: frozenset(view.replica_id for view in demand.replicas if view.is_serving)
            for pair in self.pairs.values()
            if (demand := pair.fresh_demand(now_s)) is not None
        }
