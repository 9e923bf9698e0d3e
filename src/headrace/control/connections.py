"""Who is connected to the controller, and what each was told last: fronts of their siblings, routers of specs
and outlooks.

Owns the connections of fronts and routers. Must not know how what is told comes about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from headrace.api.messages import (
    EndpointOutlook,
    GatewaySpec,
    LeaveBy,
    Outlook,
    SetSleep,
    Sibling,
    Siblings,
)
from headrace.control.outlook import is_news
from headrace.control.siblings import LOAD_PERIOD_S, shape_of
from headrace.fabric.channel import Channel

OUTLOOK_PERIOD_S = 1.0
"""While somebody waits for a replica, routers are told this often when it is expected."""


@dataclass(slots=True)
class _Front:
    """The connection that one replica reports on, and the siblings it knows."""

    channel: Channel
    told: list[Sibling] | None = None
    told_s: float = 0.0
    leave_by_s: float = math.inf


class Connections:
    """All fronts and routers that are connected."""

    def __init__(self) -> None:
        self._fronts: dict[str, _Front] = {}
        self._routers: dict[Channel, str] = {}
        """With their gateways' ids."""
        self._outlooks: list[EndpointOutlook] = []
        self._outlooks_s = 0.0

    def __repr__(self) -> str:
        return f"Connections({len(self._fronts)} fronts, {len(self._routers)} routers)"

    def add_front(self, replica_id: str, channel: Channel) -> None:
        """Note that a replica reports on `channel`. On a new one it is told everything anew."""
        known = self._fronts.get(replica_id)
        if known is None or known.channel is not channel:
            self._fronts[replica_id] = _Front(channel)

    def add_router(self, gateway_id: str, channel: Channel) -> bool:
        """Note that a gateway's router speaks on `channel`. True if it is new there."""
        if channel in self._routers:
            return False
        self._routers[channel] = gateway_id
        if self._outlooks:
            channel.send(Outlook(self._outlooks))
        return True

    def remove(self, channel: Channel) -> None:
        """A connection closed."""
        self._routers.pop(channel, None)
        self._fronts = {name: f for name, f in self._fronts.items() if f.channel is not channel}

    def set_sleep(self, replica_id: str, level: Literal[0, 1, 2]) -> bool:
        """Tell a front how deep its engine is to sleep. False if it is not connected."""
        front = self._fronts.get(replica_id)
        if front is None:
            return False
        front.channel.send(SetSleep(level))
        return True

    def send_specs(self, specs: Mapping[str, GatewaySpec]) -> None:
        """Tell each router its gateway's spec."""
        for channel, gateway_id in self._routers.items():
            channel.send(specs[gateway_id])

    def send_siblings(self, siblings: Mapping[str, list[Sibling]], now_s: float) -> None:
        """Tell each front its siblings: changes at once, loads alone once a second."""
        for replica_id, front in self._fronts.items():
            current = siblings.get(replica_id)
            if current is None or current == front.told:
                continue
            is_same_shape = front.told is not None and shape_of(front.told) == shape_of(current)
            if is_same_shape and now_s - front.told_s < LOAD_PERIOD_S:
                continue
            front.channel.send(Siblings(current))
            front.told, front.told_s = current, now_s

    def send_leaving(self, leaving: Mapping[str, float], now_s: float) -> None:
        """Tell fronts by when their machines go, on the clock, once, and again when that changed."""
        for replica_id, leave_by_s in leaving.items():
            front = self._fronts.get(replica_id)
            if front is not None and front.leave_by_s != leave_by_s:
                front.leave_by_s = leave_by_s
                front.channel.send(LeaveBy(leave_by_s - now_s))

    def send_outlooks(self, outlooks: Sequence[EndpointOutlook], now_s: float) -> None:
        """Tell the routers when replicas are expected: changes at once, times once a second."""
        is_due = now_s - self._outlooks_s >= OUTLOOK_PERIOD_S and any(o.eta_s for o in outlooks)
        if not is_due and not is_news(self._outlooks, outlooks):
            return
        self._outlooks, self._outlooks_s = list(outlooks), now_s
        for channel in self._routers:
            channel.send(Outlook(self._outlooks))
