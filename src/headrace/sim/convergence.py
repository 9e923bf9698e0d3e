"""Whether a world without faults has come to rest as it should: everything ended, everything as wanted.

Must not know how long that may take.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.policy.placement import load_of
from headrace.sim.cluster_supervisor import gateway_of_process

if TYPE_CHECKING:
    from headrace.sim.world import World


@dataclass(frozen=True, slots=True)
class Problem:
    """What is not as it should be, and which invariant that is about."""

    number: int
    name: str
    message: str


def unsettled(world: World) -> Problem | None:
    """Return the first thing that is not at rest, or None."""
    return (
        _open_requests(world)
        or _open_fronts(world)
        or _open_routers(world)
        or _fleet(world)
        or _durable_fronts(world)
        or _gateways(world)
        or _told_loads(world)
        or _counts(world)
    )


def miscounted(world: World) -> Problem | None:
    """Return the first request whose log lines, of all routers that ever were, say something else than its
    client got: finished more than once, or with other tokens. Lines may be missing where a router was."""
    for state in world.crowd.states.values():
        if state.outcome != "done":
            continue
        lines = [
            router.told_tokens[state.request_id]
            for router in world.all_routers
            if state.request_id in router.told_tokens
        ]
        if len(lines) > 1 or any(count not in (None, len(state.received)) for count in lines):
            return Problem(
                27,
                "usage is told once",
                f"{state.request_id}: its client got {len(state.received)} tokens, its lines say {lines}",
            )
    return None


def _open_requests(world: World) -> Problem | None:
    crowd = world.crowd
    if crowd.num_open:
        numbers = [number for number, state in crowd.states.items() if state.outcome is None]
        return Problem(1, "every request ends", f"clients {numbers[:10]} wait for ever")
    return None


def _open_fronts(world: World) -> Problem | None:
    for durable in world.durable.values():
        if durable.is_alive and (durable.ledger.num_open or durable.peers.num_streams):
            return Problem(
                1,
                "nothing is left open at a front",
                f"{durable.name}: {durable.ledger.num_open} open, {durable.peers.num_streams} at replicas",
            )
    for front in world.fronts.values():
        if front.is_alive and (front.ledger.num_open or front.engine.num_requests or front.guests.num_guests):
            return Problem(
                1,
                "nothing is left open at a front",
                f"{front.name}: {front.ledger.num_open} open, {front.engine.num_requests} in its engine, "
                f"{front.guests.num_guests} guests",
            )
    return None


def _open_routers(world: World) -> Problem | None:
    for router in world.routers.values():
        dispatcher = router.dispatcher
        in_flight = sum(endpoint.num_in_flight for endpoint in dispatcher.endpoints.values())
        if router.is_alive and (dispatcher.num_held or in_flight or len(router.waiting)):
            return Problem(
                29,
                "slots come free",
                f"{router.name}: {dispatcher.num_held} held, {in_flight} in flight, {router.waiting!r}",
            )
    return None


def _fleet(world: World) -> Problem | None:
    controller = world.controller
    state = controller.state if controller is not None and controller.is_alive else None
    if controller is None or state is None:
        return Problem(13, "a controller is there", "none is")
    now_s = controller.host.now_s()
    if not state.is_ready(now_s):
        return Problem(11, "the fleet is as wanted", f"not ready: {state}")
    for desired in state.desired(now_s):
        fronts = [
            front
            for name, front in world.supervisor.children.items()
            if name in world.fronts and world.fronts[name].spec.endpoint == desired.name
        ]
        # Of each version its own; together more than the count where a paused rollout keeps both, as its
        # user said.
        wanted = Counter({version.generation: version.count for version in desired.versions})
        wanted[desired.standby_generation] += desired.num_standby
        if Counter(world.fronts[front.name].spec.generation for front in fronts) != +wanted:
            return Problem(
                11,
                "the fleet is as wanted",
                f"{desired.name}: {[front.name for front in fronts]} run, {desired.versions} and "
                f"{desired.num_standby} on standby are wanted",
            )
        asleep = [front.name for front in fronts if world.fronts[front.name].view.state() == "standby"]
        if len(asleep) != desired.num_standby:
            return Problem(11, "standby is as wanted", f"{asleep} sleep, {desired.num_standby} are to")
    return None


def _durable_fronts(world: World) -> Problem | None:
    """As many of each endpoint and text at each gateway as are wanted. Those before may still be leaving."""
    assert world.controller is not None
    state = world.controller.state
    assert state is not None
    for slot in state.durable.fleet.slots.values():
        if slot.replica_id not in world.supervisor.children:
            return Problem(11, "durable fronts are as wanted", f"{slot.replica_id} does not run")
    running = [name for name in world.supervisor.children if name in world.durable]
    if len(running) != state.durable.num_wanted:
        wanted = state.durable.num_wanted
        return Problem(11, "durable fronts are as wanted", f"{running} run, {wanted} are wanted")
    return None


def _gateways(world: World) -> Problem | None:
    """All of each runs, each on a machine of its own where they have some."""
    assert world.controller is not None
    state = world.controller.state
    assert state is not None
    missing = [name for name in state.gateway.processes if name not in world.supervisor.children]
    if missing:
        return Problem(11, "gateways are as wanted", f"{missing} do not run")
    if world.nodes is None:
        return None
    hosts = {
        name: {
            child.host.name
            for child in world.supervisor.children.values()
            if gateway_of_process(child.name) == name
        }
        for name in state.gateway.pairs
    }
    if any(len(names) != 1 for names in hosts.values()) or len(set().union(*hosts.values())) != len(hosts):
        return Problem(73, "a node is one gateway's", f"they are on {hosts}")
    return None


def _told_loads(world: World) -> Problem | None:
    """A router counts nothing against a replica: no slots, and nothing that it says of others' requests."""
    for router in world.routers.values():
        for replica in router.replicas.replicas.values() if router.is_alive else ():
            if load_of(replica):
                return Problem(
                    29, "slots come free", f"{router.name} counts {load_of(replica)} at {replica.replica_id}"
                )
    return None


def _counts(world: World) -> Problem | None:
    """Without requests as many replicas are wanted as custom metrics ask for, within the bounds."""
    assert world.controller is not None
    state = world.controller.state
    assert state is not None
    for desired in state.desired(world.controller.host.now_s()):
        endpoint = state.config.endpoints[desired.name]
        asked = world.metrics.count_of(endpoint.scaling.metrics)
        count = min(endpoint.replicas.max, max(endpoint.replicas.min, asked))
        if endpoint.scaling.metrics and desired.count != count:
            return Problem(
                11, "metrics are followed", f"{desired.name}: {desired.count} wanted, {asked} are asked for"
            )
    return None
