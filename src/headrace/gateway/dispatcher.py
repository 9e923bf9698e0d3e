"""Every request between its arrival and its end: held, bound to a replica, ended; each exactly once.

Owns the conservation of requests: arrived == held + in flight + sum of terminal states, per endpoint, always
(`check_integrity`). No I/O: `now_s` comes in. Must not know SPOE, HAProxy's log or the runtime API.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Set

from headrace.api.messages import (
    EndpointDemand,
    EndpointRule,
    FinishedRequest,
    LoadReport,
    TenantDemand,
    TenantRule,
    TerminalState,
    VersionDemand,
)
from headrace.gateway.arrivals import Arrival, Bound, NobodyListens, Refused, RequestListener
from headrace.gateway.binding import Binder, Held
from headrace.gateway.conservation import check_conservation
from headrace.gateway.decisions import make_placer
from headrace.gateway.dispatch_tenants import Charge, TenantBook
from headrace.gateway.endpoint_state import EndpointState
from headrace.gateway.flights import Flights, InFlight
from headrace.gateway.later_passes import LaterPasses
from headrace.gateway.replicas import Replica, ReplicaTable
from headrace.policy.admission import HeldRequest
from headrace.policy.fairness import FairQueue
from headrace.policy.limits import Refusal
from headrace.policy.placement import CacheChanges

__all__ = [
    "Arrival",
    "Bound",
    "Dispatcher",
    "Refused",
    "RequestListener",
]

OVER_LIMITS = 429
"""What a request is refused with because of its tenant's limits."""
MAX_TENANT_DEMANDS = 1024
"""Most tenants per endpoint in one Demand."""


class Dispatcher:
    """Decides for each request, and remembers it until its end."""

    def __init__(
        self,
        rules: Iterable[EndpointRule],
        replicas: ReplicaTable,
        listener: RequestListener | None = None,
        tenants: Iterable[TenantRule] = (),
    ) -> None:
        self._replicas = replicas
        self._listener = listener or NobodyListens()
        self._tenants = TenantBook(tenants)
        self._flights = Flights()
        self._binder = Binder(replicas, self._tenants, self._flights)
        self.endpoints = self._binder.endpoints
        self._held = self._binder.held
        self._retired: set[str] = set()
        self.passes = LaterPasses(
            self._binder, self._tenants, self._flights, self._retired, self._end_in_flight
        )
        """What the relay sends again."""
        self._second_started_s = 0.0
        self.decisions = self._binder.decisions
        """Where the last requests went, and why."""
        self.num_lost_completions = 0
        self.num_unseen_completions = 0
        """Requests that HAProxy served without asking: the router was away."""
        self.set_rules(rules)

    def __repr__(self) -> str:
        return f"<Dispatcher held={len(self._held)} in_flight={len(self._flights)}>"

    # ---- rules

    def set_rules(self, rules: Iterable[EndpointRule]) -> None:
        """Take new rules. Held requests of an endpoint that is gone are refused; its counters end with it."""
        wanted = {rule.name: rule for rule in rules}
        for name in [name for name in self.endpoints if name not in wanted]:
            for request in self.endpoints[name].queue.clear():
                self._refuse_held(
                    request, Refusal.unavailable(f"The model `{name}` was removed.", "model_not_found")
                )
            self._retired.add(name)
        self._retired.difference_update(wanted)
        self._forget_retired()
        for name, rule in wanted.items():
            if (known := self.endpoints.get(name)) is None:
                queue = FairQueue(rule.max_queue, self._tenants.shares)
                self.endpoints[name] = EndpointState(rule, queue, make_placer(rule.placement))
            else:
                if known.rule.placement != rule.placement:
                    known.placer = make_placer(rule.placement)
                known.rule = rule
                known.queue.max_requests = rule.max_queue

    def set_tenants(self, rules: Iterable[TenantRule], now_s: float) -> None:
        """Take new tenants, shares and limits. Held requests keep their place; those of a tenant that is gone
        are refused, since its keys are not valid any more; those that run are finished."""
        gone = self._tenants.set_rules(rules, now_s)
        for endpoint in self.endpoints.values():
            for tenant in gone:
                for request_id in endpoint.queue.held_by(tenant):
                    message = f"The tenant `{tenant}` was removed; its keys are not valid any more."
                    request = endpoint.queue.cancel(request_id)
                    assert request is not None
                    self._refuse_held(request, Refusal.unavailable(message, "tenant_removed"))
                endpoint.queue.bring_back(tenant)
            endpoint.queue.set_shares(self._tenants.shares)
        for limits in self._tenants.limits.values():
            self._binder.bring_back(limits)
        self._binder.pump_all(now_s)

    # ---- requests come

    def arrive(self, arrival: Arrival, now_s: float) -> bool:
        """Take one request: bind it, hold it or refuse it. True if it is held."""
        request_id = arrival.request_id
        endpoint = self.endpoints.get(arrival.endpoint)
        limits = self._tenants.limits.get(arrival.tenant)
        is_known = request_id in self._held or request_id in self._flights
        if is_known and arrival.pass_name:
            return self.passes.take(arrival, now_s)
        if endpoint is None or limits is None or is_known or arrival.endpoint in self._retired:
            # Endpoint or tenant are not ours yet, or the client left before its announcement was read.
            arrival.answer(Refused("The router does not know this request's model yet.", "overloaded", 1))
            return False
        charge = self._tenants.expect(endpoint, arrival.prompt, limits)
        endpoint.arrived += 1
        endpoint.account(arrival.tenant).arrived += 1
        refusal, is_held = limits.refusal(charge.num_tokens, now_s), False
        if refusal is None:
            held = Held(arrival, charge, now_s)
            is_held = not self._binder.bind_at_once(held, endpoint, now_s)
            shed, refusal = self._binder.hold(held, endpoint, now_s) if is_held else (None, None)
            if shed is not None:
                self._refuse_held(shed, endpoint.full())
        if refusal is not None and refusal.status == OVER_LIMITS:
            endpoint.over_limits += 1
        else:
            endpoint.arrived_prompt_tokens += charge.num_prompt_tokens
        if refusal is None:
            limits.take(1, charge.num_tokens, now_s)
            return is_held and self._binder.still_waits(held, endpoint, now_s)
        self._end(request_id, endpoint, TerminalState.REFUSED, charge)
        arrival.answer(_refused(refusal))
        return False

    # ---- requests end

    def complete(self, request_id: str, endpoint_name: str, state: TerminalState) -> None:
        """Take a request's end from HAProxy's log: whatever it was, its slot or place is free now."""
        bound = self._flights.open.get(request_id)
        if bound is not None:
            front = bound.front_state
            self._end_in_flight(request_id, front if front is TerminalState.FAILED else state)
            return
        if request_id in self._held:
            # HAProxy went on without our answer: its client left (whatever the line says of what came then).
            self._cancel(request_id)
            return
        endpoint = self.endpoints.get(endpoint_name)
        if endpoint is not None and not self._flights.has_ended(request_id):
            endpoint.arrived += 1
            self.num_unseen_completions += 1
            self._end(request_id, endpoint, state, Charge("", None, None))

    def front_finished(
        self,
        finished: FinishedRequest,
        now_s: float,
        endpoint_name: str = "",
        generation: str = "",
        reporter: str = "",
    ) -> None:
        """Take a request's end from its front (`reporter`), of a replica of `generation`: the slot is free,
        the charge is corrected; the state is settled by the log. The request may be another gateway's: it is
        charged all the same."""
        request_id = finished.request_id
        bound = self._flights.open.get(request_id)
        if bound is not None:
            if bound.is_late(finished, reporter):
                return
            self._tenants.settle(bound.endpoint, bound.charge, finished, now_s)
            bound.charge.judge(bound.endpoint, finished, generation)
            if bound.hear(finished, now_s):
                self._binder.slot_freed(bound)
            return
        endpoint = self.endpoints.get(endpoint_name)
        if endpoint is None or request_id in self._held:
            return
        if not self._flights.has_ended(request_id):
            self._tenants.charge_elsewhere(endpoint, finished, now_s)
        elif (charge := self._flights.unsettled(request_id)) is not None:
            self._tenants.settle(endpoint, charge, finished, now_s)
            charge.judge(endpoint, finished, generation)
            if charge.is_settled:
                self._flights.settled(request_id)

    def take_report(self, report: LoadReport, replica: Replica | None, now_s: float) -> None:
        """Take from a replica's report what ended, what it costs, and what others have open there. `replica`
        is None when the report is late: then only the ends count."""
        endpoint, load = self.endpoints.get(report.endpoint), report.engine
        # Costs first: what ended is charged in seconds as soon as there are any.
        if endpoint is not None and replica is not None and load is not None:
            endpoint.observe_costs(load.prefill_token_s, load.decode_token_s, now_s)
        generation = "" if report.gateway_id else report.generation  # a durable front's is no version
        for finished in report.finished:
            self.front_finished(finished, now_s, report.endpoint, generation, report.replica_id)
        if replica is None or endpoint is None:
            return
        for flight in self._flights.move(report.moved, replica, self._replicas):
            self._binder.slot_freed(flight)
        counts = report.open_by_tenant
        is_sane = sum(counts.values()) == report.num_open and min(counts.values(), default=0) >= 0
        for limits in self._tenants.observe_open(report.replica_id, counts if is_sane else {}):
            self._binder.bring_back(limits)

    def replica_reported(self, replica: Replica, report: LoadReport, now_s: float) -> None:
        """Tell the endpoint's placer what changed in a replica's prefix cache, and how long prompts were."""
        endpoint = self.endpoints.get(replica.endpoint)
        if endpoint is None:
            return
        placer = endpoint.placer
        if not replica.gateway_id:
            epoch = (replica.num_connections, report.prefix_epoch)
            changes = CacheChanges(epoch, report.prefixes_added, report.prefixes_removed)
            placer.report(replica, changes, now_s)
        for finished in report.finished:
            decision = self.decisions.get(finished.request_id)
            if decision is not None:
                placer.finished(decision.num_prompt_bytes, finished.num_prompt_tokens)

    def replica_gone(self, replica: Replica) -> None:
        """Forget what a replica had cached."""
        endpoint = self.endpoints.get(replica.endpoint)
        if endpoint is not None:
            endpoint.placer.forget(replica.replica_id)

    def clients_left(self, clients: Set[Hashable], now_s: float) -> None:
        """Cancel the requests held for clients that closed their connections."""
        for request_id in [key for key, held in self._held.items() if held.arrival.client in clients]:
            self.client_left(request_id, now_s)

    def knows(self, request_id: str) -> bool:
        """Whether the request was announced, and is open or ended not long ago."""
        return request_id in self._held or request_id in self._flights or self._flights.has_ended(request_id)

    def client_left(self, request_id: str, now_s: float) -> None:
        """Cancel one request if it is held: its client closed the connection."""
        held = self._held.get(request_id)
        if held is not None:
            self._cancel(request_id)
            held.arrival.answer(Refused("The client left.", "cancelled", 1))
            self._binder.pump(held.arrival.endpoint, now_s)  # whose turn it is now may have room

    def is_open(self, request_id: str) -> bool:
        return request_id in self._held or request_id in self._flights.open

    def is_held(self, request_id: str) -> bool:
        return request_id in self._held

    def owner_lost(self, owner: object, now_s: float) -> None:
        """Forget the requests held for a connection that is gone: HAProxy goes on without us, or died."""
        for request_id in [key for key, held in self._held.items() if held.arrival.owner is owner]:
            held = self._binder.let_go(request_id)
            endpoint = self.endpoints[held.arrival.endpoint]
            endpoint.queue.cancel(request_id)
            # Not ended yet for HAProxy: the completion line tells how it ended, ORPHAN_LIMIT_S bounds it.
            flight = InFlight(endpoint, None, now_s, held.charge, arrived_s=held.arrived_s)
            flight.pass_name = held.arrival.pass_name
            self._flights.enter(request_id, flight)
        self._binder.pump_all(now_s)  # others' requests may come before theirs

    def pump(self, endpoint_name: str, now_s: float) -> None:
        """Bind held requests of an endpoint while a replica has room."""
        self._binder.pump(endpoint_name, now_s)

    # ---- time passes

    def tick(self, now_s: float) -> None:
        """Refuse what was held too long, give up lost completions, update the measured rates."""
        for endpoint in self.endpoints.values():
            for request in endpoint.queue.expire(now_s, endpoint.rule.max_wait_s):
                self._refuse_held(request, endpoint.waited_too_long(request))
        elapsed_s = now_s - self._second_started_s
        if elapsed_s >= 1.0:
            for request_id, state in list(self._flights.lost(self._replicas, now_s)):
                self.num_lost_completions += 1
                self._end_in_flight(request_id, state)
            for endpoint in self.endpoints.values():
                endpoint.update_rates(elapsed_s)
            self._forget_retired()
            for limits in self._tenants.forget_replicas(self._replicas.replicas):
                self._binder.bring_back(limits)
        if elapsed_s >= 1.0 or elapsed_s < 0:  # the clock may jump back
            self._second_started_s = now_s
        self._binder.pump_all(now_s)

    def refuse_all(self, message: str) -> None:
        """Refuse every held request: the router stops."""
        for endpoint in self.endpoints.values():
            for request in endpoint.queue.clear():
                self._refuse_held(request, Refusal.unavailable(message, "overloaded"))

    def demand(self, now_s: float) -> list[EndpointDemand]:
        return [endpoint.demand(now_s) for endpoint in self.endpoints.values()]

    def tenant_demands(self, now_s: float) -> list[TenantDemand]:
        """Return each tenant's part at each endpoint, of those that asked for anything since the start."""
        return [
            demand
            for endpoint in self.endpoints.values()
            for demand in endpoint.tenant_demands(now_s, MAX_TENANT_DEMANDS)
        ]

    def version_demands(self) -> list[VersionDemand]:
        """Return how each generation of each endpoint's replicas fares."""
        return [demand for endpoint in self.endpoints.values() for demand in endpoint.version_demands()]

    @property
    def num_held(self) -> int:
        """Requests held now, of all endpoints."""
        return len(self._held)

    @property
    def num_ignored_finishes(self) -> int:
        """Reports of a request's end with impossible numbers."""
        return self._tenants.num_ignored

    def check_integrity(self) -> None:
        """Raise AssertionError, showing the sum, if a request was lost or counted twice, or a slot leaked."""
        check_conservation(self._binder, self._flights)
        self._tenants.check_integrity(
            bound.charge.limits for bound in self._flights.open.values() if bound.replica
        )

    # ---- inside

    def _cancel(self, request_id: str) -> None:
        held = self._binder.let_go(request_id)
        endpoint = self.endpoints[held.arrival.endpoint]
        endpoint.queue.cancel(request_id)
        self._tenants.give_back(held.charge)
        self._end(request_id, endpoint, TerminalState.ABORTED, held.charge)

    def _refuse_held(self, request: HeldRequest, refusal: Refusal) -> None:
        held = self._binder.let_go(request.request_id)
        self._tenants.give_back(held.charge)
        endpoint = self.endpoints[held.arrival.endpoint]
        self._end(request.request_id, endpoint, TerminalState.REFUSED, held.charge)
        held.arrival.answer(_refused(refusal))

    def _end_in_flight(self, request_id: str, state: TerminalState) -> None:
        open_at = self._flights.open[request_id].replica
        bound = self._flights.leave(request_id)
        if state is TerminalState.FAILED and open_at is not None and bound.front is None:
            bound.charge.judge_failed(bound.endpoint, open_at.generation)
        self._binder.slot_freed(bound)
        self._end(request_id, bound.endpoint, state, bound.charge)

    def _end(self, request_id: str, endpoint: EndpointState, state: TerminalState, charge: Charge) -> None:
        endpoint.ended[state] += 1
        if state is TerminalState.FINISHED:
            endpoint.num_served_in_second += 1
        if charge.account is not None:
            charge.account.end(state)
        self._flights.remember(request_id, None if charge.is_settled else charge)
        self._listener.ended(request_id, endpoint.rule.name, state)

    def _forget_retired(self) -> None:
        """Forget removed endpoints whose last request has ended."""
        for name in [name for name in self._retired if self.endpoints[name].num_in_flight == 0]:
            self._retired.discard(name)
            del self.endpoints[name]


def _refused(refusal: Refusal) -> Refused:
    return Refused(refusal.message, refusal.code, refusal.retry_after_s, refusal.status)
