"""Requests that come more than once: the relay sends those that are parked, and those that fronts refused.

Each is one request all the time, under one id: it arrived once, is charged once, ends once. The line of a
pass that was refused ends nothing; the next one puts the request back to the head of its tenant's line, from
where it is bound or runs into the limit on its waiting. When the client's own pass has ended, none comes.
Owns what becomes of a request between its passes. Lines and announcements may come in any order.
Must not know HAProxy's words, or how an end is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Set

import msgspec

from headrace.api.messages import TerminalState
from headrace.gateway.arrivals import Arrival, Refused
from headrace.gateway.binding import Binder, Held
from headrace.gateway.dispatch_tenants import TenantBook
from headrace.gateway.flights import Flights

LOST_CALL = Refused("The gateway lost this request while it waited; send it again.", "overloaded", 1)
"""For a pass of a request that has ended: its client left, or its endpoint is gone."""


class LaterPasses:
    """The passes of requests beyond their first."""

    def __init__(
        self,
        binder: Binder,
        tenants: TenantBook,
        flights: Flights,
        retired: Set[str],
        end: Callable[[str, TerminalState], None],
    ) -> None:
        """retired: endpoints that take nothing more. end: lets a bound request leave, and counts its end."""
        self._binder = binder
        self._tenants = tenants
        self._flights = flights
        self._retired = retired
        self._end = end

    def __repr__(self) -> str:
        num_between = sum(flight.is_between for flight in self._flights.open.values())
        return f"<LaterPasses {num_between} requests between two>"

    # ---- announcements

    def own(self, request_id: str, owner: object, pass_name: str = "") -> None:
        """A parked request waits on another connection now, whose end would end its waiting, in this pass;
        None: on none, until it comes again."""
        held, flight = self._binder.held.get(request_id), self._flights.open.get(request_id)
        if held is not None:
            held.arrival = msgspec.structs.replace(held.arrival, owner=owner, pass_name=pass_name)
        elif flight is not None:
            flight.pass_name = pass_name

    def take(self, arrival: Arrival, now_s: float) -> bool:
        """Take a later pass of a request that is known: bind it or hold it again. True if it is held."""
        request_id = arrival.request_id
        held, flight = self._binder.held.get(request_id), self._flights.open.get(request_id)
        if held is not None:  # HAProxy lost the call that it waited on
            held.arrival = arrival
            return True
        if flight is None:
            arrival.answer(LOST_CALL)
            return False
        endpoint, name = flight.endpoint, flight.endpoint.rule.name
        is_gone = arrival.endpoint in self._retired or arrival.tenant not in self._tenants.limits
        if is_gone or flight.is_last or arrival.endpoint != name:
            arrival.answer(LOST_CALL)
            self.abandon(request_id, now_s, TerminalState.REFUSED if is_gone else TerminalState.ABORTED)
            return False
        self._binder.slot_freed(self._flights.leave(request_id))
        self._tenants.expect_again(endpoint, flight.charge, now_s)
        held = Held(arrival, flight.charge, flight.arrived_s, is_again=True)
        if not self._binder.bind_at_once(held, endpoint, now_s):
            self._binder.hold_again(held, endpoint)
        self._binder.pump(name, now_s)
        return request_id in self._binder.held

    # ---- HAProxy's lines

    def refused(self, request_id: str, pass_name: str, now_s: float) -> None:
        """Fronts refused this pass, and another one follows if the client is still there."""
        flight = self._flights.open.get(request_id)
        if flight is None or flight.pass_name != pass_name:
            return  # the next pass was faster than this line
        if flight.is_last:
            self.abandon(request_id, now_s)
            return
        flight.is_between = True
        if flight.replica is not None:
            flight.free_slot()
            self._binder.slot_freed(flight)
            self._binder.pump(flight.endpoint.rule.name, now_s)

    def first_ended(self, request_id: str, now_s: float) -> None:
        """The client's own pass has ended: a pass that is on its way is the last one."""
        flight = self._flights.open.get(request_id)
        if flight is None:
            return
        flight.is_last = True
        if flight.is_between:
            self.abandon(request_id, now_s)

    def abandon(self, request_id: str, now_s: float, state: TerminalState = TerminalState.ABORTED) -> None:
        """End a bound request that no replica will ever see, if it is one: its client left first."""
        flight = self._flights.open.get(request_id)
        if flight is not None:
            self._end(request_id, state)
            self._binder.pump(flight.endpoint.rule.name, now_s)  # its slot may be somebody's
