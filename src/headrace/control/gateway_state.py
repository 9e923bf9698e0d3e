"""What the controller knows of the gateway: router and HAProxy as processes, and the router's demand.

Owns both Essentials and the last Demand. Pure: events and `now_s` come in.
Must not know: HAProxy's words, sockets, launchers.
"""

from __future__ import annotations

import math

from headrace.api.messages import Demand, EndpointDemand, ProcessState
from headrace.control.essentials import Essential

ROUTER = "router"
HAPROXY = "haproxy"
DEMAND_FRESH_S = 2.0
"""A Demand older than this says nothing about now."""
_NO_DEMAND = EndpointDemand("", 0, 0.0, 0, 0, 0, 0, 0, 0)


class GatewayState:
    """Router, HAProxy, and what the router last said."""

    def __init__(self) -> None:
        self.processes = {name: Essential(name) for name in (ROUTER, HAPROXY)}
        self._demand: Demand | None = None
        self._demand_s = -math.inf
        self._last_request_s: dict[str, float] = {}
        self.has_answered = False
        """HAProxy answered its last probe."""

    def __repr__(self) -> str:
        return f"GatewayState({', '.join(f'{p.name} {p.state}' for p in self.processes.values())})"

    def adopt(self, process: ProcessState, now_s: float) -> None:
        """Take over a process that ran before this controller."""
        self.processes[process.name].on_adopted(process, now_s)

    def on_demand(self, demand: Demand, now_s: float) -> None:
        """Take the router's view. One of an earlier router process is ignored."""
        router = self.processes[ROUTER]
        if router.pid and demand.pid != router.pid:
            return
        self._demand, self._demand_s = demand, now_s
        router.heard_s = now_s
        for endpoint in demand.endpoints:
            # Held requests wake an endpoint; those in flight keep it awake.
            name = endpoint.endpoint
            if endpoint.num_held or (endpoint.num_in_flight and name in self._last_request_s):
                self._last_request_s[name] = now_s

    def on_probe(self, has_answered: bool, now_s: float) -> None:
        """Take the result of asking HAProxy something."""
        self.has_answered = has_answered
        if has_answered:
            self.processes[HAPROXY].heard_s = now_s

    def on_ended(self, name: str, error: str, now_s: float) -> None:
        """The router or HAProxy ended or could not be started."""
        self.processes[name].on_ended(now_s, error)
        if name == ROUTER:
            self._demand = None
        else:
            self.has_answered = False

    def note_requests(self, endpoint: str, now_s: float) -> None:
        """Count `endpoint` as used now: nobody remembers when it last was."""
        self._last_request_s[endpoint] = now_s

    def forget_requests(self, endpoint: str) -> None:
        """Count `endpoint` as never used: the user wants it at zero."""
        self._last_request_s.pop(endpoint, None)

    def demand_of(self, endpoint: str) -> EndpointDemand:
        """The router's last word on `endpoint`; zeros if there is none."""
        if self._demand is not None:
            for entry in self._demand.endpoints:
                if entry.endpoint == endpoint:
                    return entry
        return _NO_DEMAND

    def idle_s(self, endpoint: str, now_s: float) -> float:
        """Seconds since `endpoint` last held or served a request."""
        return now_s - self._last_request_s.get(endpoint, -math.inf)

    def serving_replicas(self, now_s: float) -> frozenset[str] | None:
        """Replicas that the gateway sends requests to. None: the router has not said so lately."""
        if self._demand is None or now_s - self._demand_s > DEMAND_FRESH_S:
            return None
        return frozenset(view.replica_id for view in self._demand.replicas if view.is_serving)
