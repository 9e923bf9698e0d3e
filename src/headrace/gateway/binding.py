"""Late binding: the held requests, and the moment at which each is bound to a replica, or passed over.

Owns which requests are held, and whose turn may come (`FairQueue` says whose it is, `TenantLimits` who has
room, the `Placer` where). Must not know how requests arrive or end.
"""

from __future__ import annotations

import math

import msgspec

from headrace.gateway.arrivals import Arrival, Bound
from headrace.gateway.decisions import Decision, DecisionLog
from headrace.gateway.dispatch_tenants import Charge, TenantBook
from headrace.gateway.endpoint_state import EndpointState
from headrace.gateway.flights import Flights, InFlight
from headrace.gateway.replicas import ReplicaTable
from headrace.policy.admission import HeldRequest
from headrace.policy.limits import Refusal, TenantLimits
from headrace.policy.placement import Placement, explain
from headrace.policy.traffic import choose_version, own_wait_s


class Held(msgspec.Struct, gc=False):
    """A request that waits, and what it is expected to cost."""

    arrival: Arrival
    charge: Charge
    arrived_s: float
    is_again: bool = False
    """It was bound before, and refused by fronts."""


class Binder:
    """Binds the requests of all endpoints."""

    def __init__(self, replicas: ReplicaTable, tenants: TenantBook, flights: Flights) -> None:
        self._replicas = replicas
        self._tenants = tenants
        self._flights = flights
        self.endpoints: dict[str, EndpointState] = {}
        self.held: dict[str, Held] = {}
        self.decisions = DecisionLog()
        """Where the last requests went, and why."""
        self._to_pump: set[str] = set()

    def __repr__(self) -> str:
        return f"<Binder held={len(self.held)} in_flight={len(self._flights)}>"

    def bind_at_once(self, held: Held, endpoint: EndpointState, now_s: float) -> bool:
        """Bind a request that need not wait: nobody's turn is before it, and there is room."""
        arrival = held.arrival
        if endpoint.queue.has_turn or not self._tenants.limits[arrival.tenant].has_room():
            return False
        placement = self._place(arrival, endpoint, 0.0, now_s)
        if placement.replica_id is None:
            return False
        self._bind(held, endpoint, placement, "", now_s)
        work = self._tenants.charge_bound(endpoint, held.charge, placement.cached_ratio)
        endpoint.queue.serve(arrival.tenant, work)
        return True

    def hold(
        self, held: Held, endpoint: EndpointState, now_s: float
    ) -> tuple[HeldRequest | None, Refusal | None]:
        """Put a request into its endpoint's queue, or say why not. A full queue keeps a place for those who
        hold little: the first of the two is the request that must go for it, if one must."""
        arrival, queue = held.arrival, endpoint.queue
        limits = self._tenants.limits[arrival.tenant]
        max_queued = limits.rule.max_queued
        if endpoint.rule.traffic and (
            len(queue) >= queue.max_requests or 0 < max_queued <= queue.num_held(arrival.tenant)
        ):
            self._pump(endpoint, now_s, is_hurried=True)  # no request is refused for versions' parts
        num_held = queue.num_held(arrival.tenant)
        if max_queued and num_held >= max_queued:
            seconds = endpoint.retry_after_s(queue.num_tenants_waiting)
            return None, limits.too_many_held(arrival.endpoint, num_held, seconds)
        request, shed = HeldRequest(arrival.request_id, now_s, arrival.tenant), None
        if not queue.offer(request):
            full = endpoint.full()
            shed = queue.shed(arrival.tenant) if len(queue) == queue.max_requests else None
            if shed is None:
                return None, full
            queue.offer(request)
        self.held[arrival.request_id] = held
        endpoint.held_prompt_tokens += held.charge.num_prompt_tokens
        if not limits.has_room():
            self._pass_over(endpoint, limits)
        return shed, None

    def hold_again(self, held: Held, endpoint: EndpointState) -> None:
        """Put a request back that was bound before: ahead of its tenant's others, whatever the bounds say."""
        arrival = held.arrival
        endpoint.queue.put_back(HeldRequest(arrival.request_id, held.arrived_s, arrival.tenant))
        self.held[arrival.request_id] = held
        endpoint.held_prompt_tokens += held.charge.num_prompt_tokens
        limits = self._tenants.limits[arrival.tenant]
        if not limits.has_room():
            self._pass_over(endpoint, limits)

    def still_waits(self, held: Held, endpoint: EndpointState, now_s: float) -> bool:
        """Whether a request that was just held still is, once turns were looked at again: while versions have
        parts it may come before one that waits for another version, and its own may have room."""
        if endpoint.rule.traffic:
            self._pump(endpoint, now_s)
        return held.arrival.request_id in self.held

    def let_go(self, request_id: str) -> Held:
        """A held request is held no more, whatever becomes of it. The caller takes it out of the queue."""
        held = self.held.pop(request_id)
        self.endpoints[held.arrival.endpoint].held_prompt_tokens -= held.charge.num_prompt_tokens
        return held

    def pump(self, endpoint_name: str, now_s: float) -> None:
        """Bind held requests of an endpoint while a replica has room."""
        endpoint = self.endpoints.get(endpoint_name)
        if endpoint is not None and endpoint.queue.has_turn:
            self._to_pump.add(endpoint_name)
        while self._to_pump:  # a slot that came free may let a tenant go on at another endpoint, too
            endpoint = self.endpoints.get(self._to_pump.pop())
            if endpoint is not None:
                self._pump(endpoint, now_s)

    def pump_all(self, now_s: float) -> None:
        """Bind held requests of every endpoint while replicas have room."""
        for name, endpoint in self.endpoints.items():
            if endpoint.queue.has_turn:
                self.pump(name, now_s)

    def slot_freed(self, flight: InFlight) -> None:
        """A bound request gave its slot back: the next `pump` looks at its endpoint, too, whichever it is
        for, and wherever its tenant was passed over."""
        self.bring_back(flight.charge.limits)
        if flight.endpoint.queue.has_turn:
            self._to_pump.add(flight.endpoint.rule.name)

    def bring_back(self, limits: TenantLimits | None) -> None:
        """Let a tenant's turn come again wherever it was passed over, if it has room: at the next `pump`."""
        if limits is not None and limits.is_passed_over and limits.has_room():
            limits.is_passed_over = False
            for name, endpoint in self.endpoints.items():
                if endpoint.queue.bring_back(limits.rule.name):
                    self._to_pump.add(name)

    def _pump(self, endpoint: EndpointState, now_s: float, *, is_hurried: bool = False) -> None:
        """is_hurried: no request waits for its own version any more."""
        queue = endpoint.queue
        while (request := queue.peek(now_s)) is not None:
            held = self.held[request.request_id]
            limits = self._tenants.limits[request.tenant]
            if not limits.has_room():
                self._pass_over(endpoint, limits)
                continue
            waited_s = math.inf if is_hurried else now_s - request.arrived_s
            placement = self._place(held.arrival, endpoint, waited_s, now_s)
            if placement.replica_id is None:
                return
            turn = f"; queue={queue.explain()}" if held.arrival.wants_route else ""
            queue.take(self._tenants.charge_bound(endpoint, held.charge, placement.cached_ratio))
            self.let_go(request.request_id)
            self._bind(held, endpoint, placement, turn, now_s)

    def _place(self, arrival: Arrival, endpoint: EndpointState, waited_s: float, now_s: float) -> Placement:
        rule = endpoint.rule
        if rule.traffic:
            version = choose_version(arrival.request_id, rule.traffic)
            if candidates := self._replicas.choosable(rule.name, version):
                placement = endpoint.placer.place(candidates, arrival.prompt, now_s)
                if placement.replica_id is not None or waited_s < own_wait_s(rule.ttft_s):
                    return placement
            # Its version has no replica, or has had no room for as long as parts are worth: any will do.
        return endpoint.placer.place(self._replicas.choosable(rule.name), arrival.prompt, now_s)

    def _bind(
        self, held: Held, endpoint: EndpointState, placement: Placement, turn: str, now_s: float
    ) -> None:
        arrival, replica_id = held.arrival, placement.replica_id
        assert replica_id is not None
        replica = self._replicas.replicas[replica_id]
        # The answer first: HAProxy goes on with the request while the rest is noted here.
        explanation = explain(placement) + turn if arrival.wants_route else ""
        ratio = placement.cached_ratio
        front = self._replicas.durable_front(replica) if endpoint.rule.is_durable else None
        server, front_id = (replica, "") if front is None else (front, front.replica_id)
        arrival.answer(Bound(server.server_name, explanation, replica_id, placement.reason, ratio, front_id))
        if front is not None:
            held.charge.generation = replica.generation
        flight = InFlight(endpoint, replica, now_s, held.charge, front=front, arrived_s=held.arrived_s)
        flight.pass_name, flight.is_again = arrival.pass_name, held.is_again
        self._flights.enter(arrival.request_id, flight)
        endpoint.placer.bound(placement, arrival.prompt, now_s)
        self.decisions.add(arrival.request_id, Decision(placement, arrival.prompt.num_bytes, now_s))

    def _pass_over(self, endpoint: EndpointState, limits: TenantLimits) -> None:
        endpoint.queue.pass_over(limits.rule.name)
        limits.is_passed_over = True
