"""The end of a system: gateways take no more, replicas finish what is open, what is still held is refused.

Owns the order and its limits. Must not know: how processes are stopped, or what they do meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from headrace.clock import Clock
from headrace.control.essentials import GATEWAY_GRACE_S, Essential
from headrace.control.fleet import Slot
from headrace.control.system_state import SystemState
from headrace.fabric.launcher import Launcher

MARGIN_S = 15.0
"""A front ends itself when its grace is over; this much later what is left is killed."""
HEARTBEAT_S = 0.5
"""The supervisor takes a controller that says nothing for 5 s while stopping for hung."""


async def drain(launcher: Launcher, state: SystemState, wake: asyncio.Event, clock: Clock) -> None:
    """Stop everything that the launcher runs for us. `wake` is set whenever an event was taken.

    The HAProxies first stop listening and go on relaying what is open; they go last. Relays pass on what
    HAProxy sends them until then. The routers stay while fronts leave, because they wait for their word; what
    they hold is refused when they end.
    """
    slots = state.slots
    longest_s = max((slot.drain_grace_s for slot in slots), default=0.0) + MARGIN_S
    pairs = state.gateway.pairs.values()

    def stop(essentials: Iterable[Essential], grace_s: float) -> None:
        for essential in essentials:
            if essential.is_alive:
                essential.is_stopping = True
                launcher.stop(essential.name, grace_s)

    def has_replicas() -> bool:
        return any(slot.is_alive for slot in state.slots)

    def has_gateway() -> bool:
        return any(essential.is_alive for essential in state.gateway.processes.values())

    stop((pair.haproxy for pair in pairs), longest_s)
    for slot in slots:
        if slot.is_alive:
            slot.is_stopping, slot.keeps_slot = True, False
            launcher.stop(slot.replica_id, slot.drain_grace_s + MARGIN_S if _may_serve(slot) else 1.0)
    await _wait_while(has_replicas, longest_s + 1.0, launcher, wake, clock)
    stop((pair.router for pair in pairs), GATEWAY_GRACE_S)
    stop((pair.relay for pair in pairs), GATEWAY_GRACE_S)
    stop((pair.haproxy for pair in pairs), GATEWAY_GRACE_S)
    await _wait_while(has_gateway, GATEWAY_GRACE_S + MARGIN_S, launcher, wake, clock)


def _may_serve(slot: Slot) -> bool:
    """Whether it may have streams. One that an earlier controller started, and that has not been heard of
    yet, may have served for days."""
    has_streams = slot.is_adopted if slot.report is None else slot.report.num_open > 0
    return has_streams or slot.phase in ("ready", "draining")


async def _wait_while(
    condition: Callable[[], bool], limit_s: float, launcher: Launcher, wake: asyncio.Event, clock: Clock
) -> None:
    deadline_s = clock.now_s() + limit_s
    while condition() and clock.now_s() < deadline_s:
        launcher.list_processes()
        wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S):
                await wake.wait()
