"""Which streams may have been cut: whose machines, processes and links were broken, and nobody else's.

Owns the rule. Must not know how anything is broken, or what a stream says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.control.node_drains import LEAVING_MARGIN_S
from headrace.sim.clients import ClientState
from headrace.sim.gateway_nodes import MAX_LATE_S
from headrace.sim.invariants import Violation
from headrace.sim.scenario import FaultKind

if TYPE_CHECKING:
    from headrace.sim.world import World

CUTTING: frozenset[FaultKind] = frozenset(
    {"haproxy killed", "relay killed", "durable front killed", "durable front paused", "link cut"}
)
"""What may cut a stream that a durable front has begun: it breaks what the stream goes through."""
CUTTING_NOTHING: frozenset[FaultKind] = frozenset(
    {
        "gateway lost",
        "gateway cut off",
        "gateway drained",
        "router killed",
        "router paused",
        "controller killed",
        "controller paused",
        "engine killed",
        "scaled",
        "reports doubled",
        "starts refused",
        "network slow",
        "system ended",
        "metric said",
    }
)
"""What cuts no stream of any front. A gateway that is lost or cut off cuts those of its own clients."""
HURRY_S = 1.0
"""Before a drained node's deadline, beside the margin: the stops of what is left are on their way."""


def cut_without_cause(world: World, client: ClientState) -> Violation | None:
    """Return what is wrong with it that a client's stream was cut; None: it may have been."""
    if world.ending.began_s >= 0:
        return None  # judged when all is over
    if _has_lost_gateway(world, client.gateway) or client.front_id in world.stopped_fronts:
        return None
    if _was_cut_off(world, client):
        return None
    counts = world.breaker.counts
    if client.front_id in world.durable:
        if any(counts[kind] for kind in CUTTING):
            return None
        number, name, otherwise = 64, "a durable stream outlives replicas", "only replicas or other gateways"
    elif set(counts) - CUTTING_NOTHING:
        return None
    else:
        number, name, otherwise = 26, "gateways share nothing", "no front, and not its gateway"
    stream = f"client {client.plan.number}: its stream from {client.front_id} through {client.gateway}"
    return Violation(number, name, f"{stream} was cut, and {otherwise} were lost")


def _was_cut_off(world: World, client: ClientState) -> bool:
    """Whether its gateway was cut off, and something else went wrong. That alone is a pause: connections
    outlive it. A durable front resumes elsewhere meanwhile, for as long as it may."""
    if world.nodes is None or client.gateway not in world.nodes.cut_off:
        return False
    return client.front_id in world.durable or set(world.breaker.counts) != {"gateway cut off"}


def _has_lost_gateway(world: World, gateway: str) -> bool:
    """Whether a gateway lost its machine a moment ago, or could not stay on it any longer."""
    nodes = world.nodes
    if nodes is None:
        return False
    if world.timeline.now_s - nodes.lost_s.get(gateway, -2 * MAX_LATE_S) <= MAX_LATE_S:
        return True
    deadline_s = nodes.deadlines_s.get(gateway)
    return deadline_s is not None and world.hosts[0].wall_s() >= deadline_s - LEAVING_MARGIN_S - HURRY_S
