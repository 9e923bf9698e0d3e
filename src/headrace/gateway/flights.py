"""The requests that are bound, and those that ended lately: slots, duplicates, completions that never come.

Owns a bound request's slot at its replica and at its tenant: both come free together, once. Must not know
queues or answers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import msgspec

from headrace.api.messages import FinishedRequest, TerminalState
from headrace.gateway.dispatch_tenants import Charge
from headrace.gateway.endpoint_state import EndpointState
from headrace.gateway.replicas import Replica, ReplicaTable

LOG_GRACE_S = 2.0
"""After a front reported a request's end, its completion line is expected within this time."""
RECONCILE_AFTER_S = 30.0
"""A bound request that its replica does not know of is given up after this time: its completion was lost.
Long enough for a slow upload, during which the front does not count the request yet."""
ORPHAN_LIMIT_S = 600.0
"""The same for a request whose replica is gone: it may live on at another one, as only the log can tell."""
MAX_ENDED_REMEMBERED = 65_536


class InFlight(msgspec.Struct, gc=False):
    """A request that is bound, or that HAProxy went on with alone (then without a replica)."""

    endpoint: EndpointState
    replica: Replica | None
    bound_s: float
    charge: Charge
    front_state: TerminalState | None = None
    front_reported_s: float = 0.0
    may_live_on: bool = False
    """Its front refused it, or failed before its first token: HAProxy sends it to another one."""
    front: Replica | None = None
    """The durable front that has its stream; None: the replica's own."""
    arrived_s: float = 0.0
    pass_name: str = ""
    """The pass that it is bound with (`later_passes`)."""
    is_again: bool = False
    """Fronts refused it in an earlier pass, and their words may come late."""
    is_between: bool = False
    """Fronts refused that pass, and no other one has come yet."""
    is_last: bool = False
    """The client's own pass has ended: no other one comes."""

    @property
    def holder(self) -> Replica | None:
        """Whose report tells whether it lives."""
        return self.front or self.replica

    def take_slot(self) -> None:
        """Count against its replica and its tenant."""
        replica = self.replica
        if replica is not None:
            replica.num_in_flight += 1
            replica.num_assigned += 1
            if self.front is not None:
                self.front.num_in_flight += 1
            if self.charge.limits is not None:
                self.charge.limits.bind(replica.replica_id)

    def free_slot(self) -> None:
        """Count no more. Nothing happens the second time."""
        replica = self.replica
        if replica is not None:
            replica.num_in_flight -= 1
            if self.front is not None:
                self.front.num_in_flight -= 1
            if self.charge.limits is not None:
                self.charge.limits.free(replica.replica_id)
            self.replica = None

    def hear(self, finished: FinishedRequest, now_s: float) -> bool:
        """Take a front's word on the end. True if the slot is free by it: with the first one. Of a request
        that was tried again elsewhere a later word counts for its state."""
        is_first = self.front_state is None
        if is_first or finished.state is TerminalState.FINISHED:
            is_begun = finished.num_output_tokens > 0
            is_retried = finished.state in (TerminalState.REFUSED, TerminalState.FAILED)
            self.may_live_on = is_retried and not is_begun
            self.front_state, self.front_reported_s = finished.state, now_s
        if is_first:
            self.free_slot()
        return is_first

    def is_late(self, finished: FinishedRequest, reporter: str) -> bool:
        """Whether a front's word is of an earlier pass: a refusal by another than has it now."""
        if not self.is_again or self.holder is None or reporter in ("", self.holder.replica_id):
            return False
        is_refused = finished.state in (TerminalState.REFUSED, TerminalState.FAILED)
        return is_refused and finished.num_output_tokens == 0

    def move_slot(self, replica: Replica) -> None:
        """Another replica has it now; nothing happens if its slot is free already."""
        if self.replica not in (None, replica):
            self.free_slot()
            self.replica = replica
            self.take_slot()
            self.charge.generation = replica.generation


class Flights:
    """All bound requests by id, and the ids of those that ended here."""

    def __init__(self) -> None:
        self.open: dict[str, InFlight] = {}
        self._ended: OrderedDict[str, Charge | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.open)

    def __contains__(self, request_id: str) -> bool:
        """Whether it is bound, or ended lately."""
        return request_id in self.open or request_id in self._ended

    def has_ended(self, request_id: str) -> bool:
        return request_id in self._ended

    def enter(self, request_id: str, flight: InFlight) -> None:
        """A request is bound."""
        self.open[request_id] = flight
        flight.endpoint.num_in_flight += 1
        if flight.charge.account is not None:
            flight.charge.account.num_in_flight += 1
        flight.take_slot()

    def leave(self, request_id: str) -> InFlight:
        """A bound request ended: its slot is free."""
        flight = self.open.pop(request_id)
        flight.free_slot()
        flight.endpoint.num_in_flight -= 1
        if flight.charge.account is not None:
            flight.charge.account.num_in_flight -= 1
        return flight

    def move(self, moved: Mapping[str, str], front: Replica, replicas: ReplicaTable) -> list[InFlight]:
        """Take from a durable front where its requests are that are not where they were bound. Return those
        whose slot moved."""
        found = []
        for request_id, replica_id in moved.items():
            flight, replica = self.open.get(request_id), replicas.replicas.get(replica_id)
            if flight is None or replica is None or flight.front is not front or flight.replica is replica:
                continue
            if replica.endpoint == front.endpoint and not replica.gateway_id:
                flight.move_slot(replica)
                found.append(flight)
        return found

    def remember(self, request_id: str, charge: Charge | None) -> None:
        """Remember the id of a request that ended, and what its front's report has yet to correct."""
        self._ended[request_id] = charge
        if len(self._ended) > MAX_ENDED_REMEMBERED:
            self._ended.popitem(last=False)

    def unsettled(self, request_id: str) -> Charge | None:
        """Return the charge of an ended request that waits for its front's report."""
        charge = self._ended[request_id]
        return charge if charge is not None and not charge.is_settled else None

    def settled(self, request_id: str) -> None:
        """Nothing is left to correct."""
        self._ended[request_id] = None

    def lost(self, replicas: ReplicaTable, now_s: float) -> Iterator[tuple[str, TerminalState]]:
        """Yield the requests whose completion line was lost, and how they ended: by what their fronts said,
        or because a replica reports fewer open requests than were bound to it long ago (it knows all of those
        that live). The caller lets them leave."""
        old: dict[str, list[str]] = {}
        for request_id, bound in list(self.open.items()):
            if bound.front_state is not None:
                grace_s = ORPHAN_LIMIT_S if bound.may_live_on else LOG_GRACE_S
                if now_s - bound.front_reported_s >= grace_s:
                    yield request_id, bound.front_state
            elif (holder := bound.holder) is None or holder.is_gone:
                if now_s - bound.bound_s >= ORPHAN_LIMIT_S:
                    yield request_id, TerminalState.FAILED
            elif now_s - bound.bound_s >= RECONCILE_AFTER_S:
                old.setdefault(holder.replica_id, []).append(request_id)
        for replica_id, members in old.items():
            num_open = replicas.replicas[replica_id].num_open
            for request_id in members[: max(0, len(members) - num_open)]:
                yield request_id, TerminalState.FAILED
