"""Gateways leave drained nodes: what of one is stopped now, and when it may start again elsewhere. Pure.

A gateway's id, its place and its files are one, so it cannot be in two places: it leaves while another one
serves, or, if it is the only one, as late as its streams allow. HAProxy goes first: it takes no more
connections and ends when its streams have, and clients' idle connections have been closed or used up their
time: what comes over them until then is served. Then go its durable fronts, whom nobody asks any more, then
router and relay. When nothing of it is left its place is given back, and all of it starts anew.
Must not know: how processes are stopped, or where they are started again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from headrace.control.essentials import GATEWAY_GRACE_S, Essential
from headrace.control.gateway_state import GatewayPair
from headrace.control.node_drains import LEAVING_MARGIN_S, NO_DEADLINE_S, NodeDrains

Stop = tuple[Essential, float]
"""What is to be stopped, and within how many seconds."""


def depart(
    pairs: Iterable[GatewayPair],
    drains: NodeDrains,
    with_fronts: Collection[str],
    drain_grace_s: float,
    now_s: float,
) -> list[Stop]:
    """Decide who leaves, note it in `pairs`, and return what is stopped now.

    with_fronts: ids of gateways that still have durable fronts. drain_grace_s: what streams are left at
    least, if nobody else serves; with another gateway they have all the time that the node has.
    """
    pairs = list(pairs)
    stops: list[Stop] = []
    for pair in sorted(pairs, key=lambda pair: (drains.leave_by_s(pair.node), pair.gateway_id)):
        if not pair.leaving:
            pair.leaving = _why_now(pair, pairs, drains, drain_grace_s, now_s)
        if pair.leaving:
            stops += _next_stops(pair, drains, with_fronts, now_s)
    return stops


def _why_now(
    pair: GatewayPair, pairs: list[GatewayPair], drains: NodeDrains, drain_grace_s: float, now_s: float
) -> str:
    """Why it leaves now; empty: it stays, or waits until another one serves."""
    if pair.node not in drains or not _is_alive(pair):
        return ""
    if any(other.has_answered and not other.leaving for other in pairs if other is not pair):
        return "its node goes away, and another gateway serves"
    if now_s >= drains.patience_ends_s(pair.node, drain_grace_s):
        return "its node goes away, and its streams need the time that is left"
    return ""


def _next_stops(
    pair: GatewayPair, drains: NodeDrains, with_fronts: Collection[str], now_s: float
) -> list[Stop]:
    if pair.haproxy.is_alive:
        left_s = min(drains.leave_by_s(pair.node) - now_s, NO_DEADLINE_S) - LEAVING_MARGIN_S
        return [] if pair.haproxy.is_stopping else [(pair.haproxy, max(0.0, left_s))]
    if pair.gateway_id in with_fronts:
        return []
    if not _is_alive(pair):
        pair.leaving = pair.node = pair.node_address = ""  # what starts next is elsewhere
        for essential in pair.processes:
            essential.forgive()
        return []
    rest = (pair.router, pair.relay)
    return [(each, GATEWAY_GRACE_S) for each in rest if each.is_alive and not each.is_stopping]


def _is_alive(pair: GatewayPair) -> bool:
    return any(essential.is_alive for essential in pair.processes)
