"""Every request between its arrival and its end: held, bound to a replica, ended; each exactly once.

Owns the conservation of requests: arrived == held + in flight + sum of terminal states, per endpoint, always
(`check_integrity`). No I/O: `now_s` comes in, answers go out through the callback that came with the request.
Must not know SPOE, HAProxy's log or the runtime API.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Set
from dataclasses import dataclass, field
from typing import Protocol

from headrace.api.messages import EndpointDemand, EndpointRule, FinishedRequest, LoadReport, TerminalState
from headrace.gateway.decisions import Decision, DecisionLog, make_placer
from headrace.gateway.replicas import Replica, ReplicaTable
from headrace.policy.admission import AdmissionQueue, FifoQueue, HeldRequest, retry_after_s
from headrace.policy.placement import CacheChanges, Placement, Placer, explain
from headrace.policy.prompt import PromptHead

LOG_GRACE_S = 2.0
"""After a front reported a request's end, its completion line is expected within this time."""
RECONCILE_AFTER_S = 30.0
"""A bound request that its replica does not know of is given up after this time: its completion was lost.
Long enough for a slow upload, during which the front does not count the request yet."""
ORPHAN_LIMIT_S = 600.0
"""The same for a request whose replica is gone: it may live on at another one, as only the log can tell."""
MAX_ENDED_REMEMBERED = 65_536
_RATE_DECAY = 0.8


@dataclass(frozen=True, slots=True)
class Bound:
    """The request goes to this server."""

    server_name: str
    explanation: str = ""
    """The decision's reasons, for `x-headrace-route`; empty unless asked for."""
    replica_id: str = field(default="", compare=False)
    reason: str = field(default="", compare=False)
    """`Placement.reason`, and the part of the prompt that it expects in the replica's prefix cache."""
    cached_ratio: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Refused:
    """The request is not served; the client may come again."""

    message: str
    code: str
    retry_after_s: int
    status: int = 503
    """503: the system's state is the reason; 429: the tenant's limit is."""


Answer = Callable[[Bound | Refused], None]


class RequestListener(Protocol):
    """Who wants to know of each request's end."""

    def ended(self, request_id: str, endpoint: str, state: TerminalState) -> None:
        """A request reached its one terminal state. Called once per request, arrived or not."""
        ...


class NobodyListens:
    """The listener of a dispatcher that stands alone."""

    def ended(self, request_id: str, endpoint: str, state: TerminalState) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request as HAProxy announces it."""

    request_id: str
    endpoint: str
    answer: Answer
    """Called once, at once or later."""
    owner: object
    """The connection it came over; `owner_lost` ends its waiting."""
    client: Hashable = None
    """Whose leaving cancels it (`clients_left`)."""
    tenant: str = ""
    prompt: PromptHead = field(default_factory=PromptHead)
    wants_route: bool = False
    """The client asked for the decision's reasons (`Bound.explanation`)."""


@dataclass(slots=True)
class _InFlight:
    endpoint: EndpointState
    replica: Replica | None
    bound_s: float
    front_state: TerminalState | None = None
    front_reported_s: float = 0.0


@dataclass(slots=True)
class EndpointState:
    """One endpoint's rule, queue and counters."""

    rule: EndpointRule
    queue: AdmissionQueue
    placer: Placer
    arrived: int = 0
    num_in_flight: int = 0
    ended: dict[TerminalState, int] = field(default_factory=lambda: dict.fromkeys(TerminalState, 0))
    served_per_s: float = 0.0
    num_served_in_second: int = 0

    def demand(self, now_s: float) -> EndpointDemand:
        ended = self.ended
        return EndpointDemand(
            endpoint=self.rule.name,
            num_held=len(self.queue),
            oldest_held_s=self.queue.oldest_s(now_s),
            num_in_flight=self.num_in_flight,
            arrived=self.arrived,
            finished=ended[TerminalState.FINISHED],
            aborted=ended[TerminalState.ABORTED],
            refused=ended[TerminalState.REFUSED],
            failed=ended[TerminalState.FAILED],
        )


class Dispatcher:
    """Decides for each request, and remembers it until its end."""

    def __init__(
        self,
        rules: Iterable[EndpointRule],
        replicas: ReplicaTable,
        listener: RequestListener | None = None,
    ) -> None:
        self._replicas = replicas
        self._listener = listener or NobodyListens()
        self.endpoints: dict[str, EndpointState] = {}
        self._held: dict[str, Arrival] = {}
        self._in_flight: dict[str, _InFlight] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._retired: set[str] = set()
        self._second_started_s = 0.0
        self.decisions = DecisionLog()
        """Where the last requests went, and why."""
        self.num_lost_completions = 0
        self.num_unseen_completions = 0
        """Requests that HAProxy served without asking: the router was away."""
        self.set_rules(rules)

    def __repr__(self) -> str:
        return f"<Dispatcher held={len(self._held)} in_flight={len(self._in_flight)}>"

    def set_rules(self, rules: Iterable[EndpointRule]) -> None:
        """Take new rules. Held requests of an endpoint that is gone are refused; its counters end with it."""
        wanted = {rule.name: rule for rule in rules}
        for name in [name for name in self.endpoints if name not in wanted]:
            endpoint = self.endpoints[name]
            while (request := endpoint.queue.take()) is not None:
                self._refuse_held(request, f"The model `{name}` was removed.", "model_not_found", 1)
            self._retired.add(name)
        self._retired -= wanted.keys()
        self._forget_retired()
        for name, rule in wanted.items():
            known = self.endpoints.get(name)
            if known is None:
                self.endpoints[name] = EndpointState(
                    rule, FifoQueue(rule.max_queue), make_placer(rule.placement)
                )
            else:
                if known.rule.placement != rule.placement:
                    known.placer = make_placer(rule.placement)
                known.rule = rule
                known.queue.max_requests = rule.max_queue

    def arrive(self, arrival: Arrival, now_s: float) -> bool:
        """Take one request: bind it, hold it or refuse it. True if it is held."""
        request_id = arrival.request_id
        endpoint = self.endpoints.get(arrival.endpoint)
        if endpoint is None or arrival.endpoint in self._retired or self._is_known(request_id):
            # The endpoint is not ours yet, or the client left before its announcement was read.
            arrival.answer(Refused("The router does not know this request's model yet.", "overloaded", 1))
            return False
        endpoint.arrived += 1
        if len(endpoint.queue) == 0 and self._bind(arrival, endpoint, now_s):
            return False
        if not endpoint.queue.offer(HeldRequest(request_id, now_s)):
            seconds = retry_after_s(len(endpoint.queue), endpoint.served_per_s)
            message = (
                f"{len(endpoint.queue)} requests wait for `{arrival.endpoint}`, the limit "
                f"(queue.max_requests). Try again in {seconds} s."
            )
            self._end(request_id, endpoint, TerminalState.REFUSED)
            arrival.answer(Refused(message, "queue_full", seconds))
            return False
        self._held[request_id] = arrival
        return True

    def complete(self, request_id: str, endpoint_name: str, state: TerminalState) -> None:
        """Take a request's end from HAProxy's log: whatever it was, its slot or place is free now."""
        bound = self._in_flight.get(request_id)
        if bound is not None:
            front = bound.front_state
            self._end_in_flight(request_id, bound, front if front is TerminalState.FAILED else state)
            return
        if request_id in self._held:
            # HAProxy went on without our answer: its client left (whatever the line says of what came then).
            self._cancel(request_id)
            return
        endpoint = self.endpoints.get(endpoint_name)
        if endpoint is not None and request_id not in self._ended:
            endpoint.arrived += 1
            self.num_unseen_completions += 1
            self._end(request_id, endpoint, state)

    def front_finished(self, finished: FinishedRequest, now_s: float) -> None:
        """Take a request's end from its front: the slot is free; the state is settled by the log."""
        bound = self._in_flight.get(finished.request_id)
        if bound is not None and bound.front_state is None:
            bound.front_state = finished.state
            bound.front_reported_s = now_s
            self._free_slot(bound)

    def replica_reported(self, replica: Replica, report: LoadReport, now_s: float) -> None:
        """Tell the endpoint's placer what changed in a replica's prefix cache, and how long prompts were."""
        endpoint = self.endpoints.get(replica.endpoint)
        if endpoint is None:
            return
        placer = endpoint.placer
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

    def clients_left(self, clients: Set[Hashable]) -> None:
        """Cancel the requests held for clients that closed their connections."""
        for request_id in [key for key, held in self._held.items() if held.client in clients]:
            answer = self._held[request_id].answer
            self._cancel(request_id)
            answer(Refused("The client left.", "cancelled", 1))

    def owner_lost(self, owner: object, now_s: float) -> None:
        """Forget the requests held for a connection that is gone: HAProxy goes on without us, or died."""
        for request_id in [key for key, held in self._held.items() if held.owner is owner]:
            endpoint = self.endpoints[self._held.pop(request_id).endpoint]
            endpoint.queue.cancel(request_id)
            # Not ended yet for HAProxy: the completion line tells how it ended, ORPHAN_LIMIT_S bounds it.
            endpoint.num_in_flight += 1
            self._in_flight[request_id] = _InFlight(endpoint, None, now_s)

    def pump(self, endpoint_name: str, now_s: float) -> None:
        """Bind held requests of an endpoint while a replica has room."""
        endpoint = self.endpoints.get(endpoint_name)
        if endpoint is None:
            return
        while (request := endpoint.queue.peek(now_s)) is not None:
            if not self._bind(self._held[request.request_id], endpoint, now_s):
                return
            endpoint.queue.take()
            del self._held[request.request_id]

    def tick(self, now_s: float) -> None:
        """Refuse what was held too long, give up lost completions, update the measured rates."""
        for endpoint in self.endpoints.values():
            for request in endpoint.queue.expire(now_s, endpoint.rule.max_wait_s):
                seconds = retry_after_s(len(endpoint.queue), endpoint.served_per_s)
                self._refuse_held(
                    request,
                    f"No replica of `{endpoint.rule.name}` had room for {endpoint.rule.max_wait_s:g} s "
                    f"(queue.max_wait_s). Try again in {seconds} s.",
                    "overloaded",
                    seconds,
                )
        if now_s - self._second_started_s >= 1.0:
            self._reconcile(now_s)
            self._update_rates(now_s)
            self._forget_retired()

    def refuse_all(self, message: str) -> None:
        """Refuse every held request: the router stops."""
        for endpoint in self.endpoints.values():
            while (request := endpoint.queue.take()) is not None:
                self._refuse_held(request, message, "overloaded", 1)

    def demand(self, now_s: float) -> list[EndpointDemand]:
        return [endpoint.demand(now_s) for endpoint in self.endpoints.values()]

    def check_integrity(self) -> None:
        """Raise AssertionError, showing the sum, if a request was lost or counted twice."""
        for name, endpoint in self.endpoints.items():
            held, ended = len(endpoint.queue), sum(endpoint.ended.values())
            total = held + endpoint.num_in_flight + ended
            assert endpoint.arrived == total, (
                f"{name}: arrived {endpoint.arrived} != held {held} + in flight {endpoint.num_in_flight} "
                f"+ ended {ended}"
            )
        in_flight = sum(endpoint.num_in_flight for endpoint in self.endpoints.values())
        assert in_flight == len(self._in_flight), (
            f"in flight {in_flight} != {len(self._in_flight)} remembered"
        )
        held = sum(len(endpoint.queue) for endpoint in self.endpoints.values())
        assert held == len(self._held), f"held {held} != {len(self._held)} remembered"

    @property
    def num_held(self) -> int:
        """Requests held now, of all endpoints."""
        return len(self._held)

    def _is_known(self, request_id: str) -> bool:
        return request_id in self._ended or request_id in self._held or request_id in self._in_flight

    def _bind(self, arrival: Arrival, endpoint: EndpointState, now_s: float) -> bool:
        candidates = self._replicas.choosable(endpoint.rule.name)
        placement = endpoint.placer.place(candidates, arrival.prompt, now_s)
        if placement.replica_id is None:
            return False
        self._assign(arrival, endpoint, placement, placement.replica_id, now_s)
        return True

    def _assign(
        self, arrival: Arrival, endpoint: EndpointState, placement: Placement, replica_id: str, now_s: float
    ) -> None:
        replica = self._replicas.replicas[replica_id]
        replica.num_in_flight += 1
        replica.num_assigned += 1
        endpoint.num_in_flight += 1
        self._in_flight[arrival.request_id] = _InFlight(endpoint, replica, now_s)
        endpoint.placer.bound(placement, arrival.prompt, now_s)
        self.decisions.add(arrival.request_id, Decision(placement, arrival.prompt.num_bytes, now_s))
        explanation = explain(placement) if arrival.wants_route else ""
        ratio = placement.cached_ratio
        arrival.answer(Bound(replica.server_name, explanation, replica_id, placement.reason, ratio))

    def _cancel(self, request_id: str) -> None:
        endpoint = self.endpoints[self._held.pop(request_id).endpoint]
        endpoint.queue.cancel(request_id)
        self._end(request_id, endpoint, TerminalState.ABORTED)

    def _refuse_held(self, request: HeldRequest, message: str, code: str, seconds: int) -> None:
        arrival = self._held.pop(request.request_id)
        self._end(request.request_id, self.endpoints[arrival.endpoint], TerminalState.REFUSED)
        arrival.answer(Refused(message, code, seconds))

    def _free_slot(self, bound: _InFlight) -> None:
        if bound.replica is not None:
            bound.replica.num_in_flight -= 1
            bound.replica = None

    def _end_in_flight(self, request_id: str, bound: _InFlight, state: TerminalState) -> None:
        del self._in_flight[request_id]
        self._free_slot(bound)
        bound.endpoint.num_in_flight -= 1
        self._end(request_id, bound.endpoint, state)

    def _end(self, request_id: str, endpoint: EndpointState, state: TerminalState) -> None:
        endpoint.ended[state] += 1
        if state is TerminalState.FINISHED:
            endpoint.num_served_in_second += 1
        self._ended[request_id] = None
        if len(self._ended) > MAX_ENDED_REMEMBERED:
            self._ended.popitem(last=False)
        self._listener.ended(request_id, endpoint.rule.name, state)

    def _reconcile(self, now_s: float) -> None:
        """End requests whose completion line was lost: by what their fronts said, or because a replica
        reports fewer open requests than we bound to it long ago (it knows all of those that live)."""
        old: dict[str, list[tuple[str, _InFlight]]] = {}
        for request_id, bound in list(self._in_flight.items()):
            if bound.front_state is not None:
                if now_s - bound.front_reported_s >= LOG_GRACE_S:
                    self._give_up(request_id, bound, bound.front_state)
            elif bound.replica is None or bound.replica.is_gone:
                if now_s - bound.bound_s >= ORPHAN_LIMIT_S:
                    self._give_up(request_id, bound, TerminalState.FAILED)
            elif now_s - bound.bound_s >= RECONCILE_AFTER_S:
                old.setdefault(bound.replica.replica_id, []).append((request_id, bound))
        for replica_id, members in old.items():
            num_open = self._replicas.replicas[replica_id].num_open
            for request_id, bound in members[: max(0, len(members) - num_open)]:
                self._give_up(request_id, bound, TerminalState.FAILED)

    def _forget_retired(self) -> None:
        """Forget removed endpoints whose last request has ended."""
        for name in [name for name in self._retired if self.endpoints[name].num_in_flight == 0]:
            self._retired.discard(name)
            del self.endpoints[name]

    def _give_up(self, request_id: str, bound: _InFlight, state: TerminalState) -> None:
        self.num_lost_completions += 1
        self._end_in_flight(request_id, bound, state)

    def _update_rates(self, now_s: float) -> None:
        elapsed_s = now_s - self._second_started_s
        for endpoint in self.endpoints.values():
            rate = endpoint.num_served_in_second / elapsed_s
            endpoint.served_per_s = rate + (endpoint.served_per_s - rate) * _RATE_DECAY
            endpoint.num_served_in_second = 0
        self._second_started_s = now_s
