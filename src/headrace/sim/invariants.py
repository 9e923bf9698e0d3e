"""What must hold after every event, each with its number in INVARIANTS.md.

Owns the checks of one process at one moment. They look, and change nothing. Must not know faults or clients'
plans: what clients must not see is asserted where it is seen (`clients`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.control.reconciler import (
    Action,
    ForgetReplica,
    RestReplica,
    StartReplica,
    StopReplica,
)
from headrace.control.system_state import SystemState
from headrace.gateway.endpoint_state import EndpointState
from headrace.policy.placement import has_room, load_of
from headrace.policy.traffic import choose_version, own_wait_s
from headrace.sim.durable_front import DurableFrontProcess
from headrace.sim.engines import EngineProcess
from headrace.sim.front import FrontProcess
from headrace.sim.front_base import ServingFront
from headrace.sim.machine import Process
from headrace.sim.router import RouterProcess

MAX_ENGINE_STARTS_PER_MINUTE = 14
"""Of one front. Back-off doubles from 0.1 s to 10 s, and starts over after 30 s of health."""


class Violation(Exception):
    """An invariant does not hold."""

    def __init__(self, number: int, name: str, message: str) -> None:
        super().__init__(f"invariant {number}, {name}: {message}")
        self.number = number
        self.name = name


@dataclass(frozen=True, slots=True)
class Check:
    """One entry of INVARIANTS.md as it can be seen in one process."""

    number: int
    name: str
    kind: type[Process]
    look: Callable[[Any], str]
    """Returns what is wrong, or nothing; may raise AssertionError instead."""
    every: int = 1
    """Events of a process between two looks. A sum that is wrong stays wrong: it need not be seen at once."""


def _requests_are_counted(front: ServingFront) -> str:
    front.check_integrity()
    return ""


def _router_counts_requests(router: RouterProcess) -> str:
    router.dispatcher.check_integrity()
    return ""


def _blocks_are_counted(engine: EngineProcess) -> str:
    engine.check_integrity()
    return ""


def _nothing_waits_for_room(router: RouterProcess) -> str:
    for name, endpoint in router.dispatcher.endpoints.items():
        if not endpoint.queue.has_turn:
            continue
        for replica in router.replicas.choosable(name, _only_version(router, endpoint)):
            if has_room(replica, load_of(replica)):
                return f"{len(endpoint.queue)} requests of {name} are held, and {replica.replica_id} has room"
    return ""


def _only_version(router: RouterProcess, endpoint: EndpointState) -> str:
    """Return the version whose replicas alone the next held request waits for; empty: any will do. That its
    time for them is over is seen at a tick."""
    rule, request = endpoint.rule, endpoint.queue.peek(router.ticked_s)
    if request is None or router.ticked_s - request.arrived_s >= own_wait_s(rule.ttft_s):
        return ""
    return choose_version(request.request_id, rule.traffic)


def _slots_are_the_flights(router: RouterProcess) -> str:
    for replica in router.replicas.replicas.values():
        if replica.num_in_flight < 0:
            return f"{replica.replica_id} has {replica.num_in_flight} in flight"
    return ""


def _restarts_are_bounded(front: FrontProcess) -> str:
    starts = front.engine.restarts_s
    since_s = front.timeline.now_s - 60.0
    recent = sum(moment > since_s for moment in starts[-MAX_ENGINE_STARTS_PER_MINUTE - 1 :])
    if recent > MAX_ENGINE_STARTS_PER_MINUTE:
        return f"{recent} engine restarts within a minute"
    return ""


def _sleepers_have_no_requests(front: FrontProcess) -> str:
    if front.engine.sleep_level and front.engine.num_requests:
        return f"its engine sleeps with {front.engine.num_requests} requests"
    return ""


def _each_line_once(router: RouterProcess) -> str:
    if router.last_record and router.records[router.last_record] > 1:
        return f"{router.last_record} has {router.records[router.last_record]} lines"
    return ""


CHECKS: Sequence[Check] = (
    Check(1, "request conservation at the front", ServingFront, _requests_are_counted, 16),
    Check(1, "request conservation at the router", RouterProcess, _router_counts_requests, 16),
    Check(2, "KV conservation", EngineProcess, _blocks_are_counted),
    Check(9, "work conservation", RouterProcess, _nothing_waits_for_room),
    Check(12, "restarts are bounded in rate", FrontProcess, _restarts_are_bounded, 16),
    Check(27, "one line per ended request", RouterProcess, _each_line_once),
    Check(29, "slots do not leak", RouterProcess, _slots_are_the_flights, 8),
    Check(38, "sleep loses no request", FrontProcess, _sleepers_have_no_requests),
)


def check(process: Process) -> None:
    """Look at one process after one of its events. Raises Violation."""
    number = process.num_events = process.num_events + 1
    for every, look, entry in _LOOKS.get(type(process), ()):
        if every > 1 and number % every:
            continue
        try:
            problem = look(process)
        except AssertionError as error:
            problem = str(error) or "an assertion failed"
        if problem:
            raise Violation(entry.number, entry.name, f"{process.name}: {problem}")


_LOOKS: dict[type[Process], list[tuple[int, Callable[[Any], str], Check]]] = {
    kind: [(entry.every, entry.look, entry) for entry in CHECKS if issubclass(kind, entry.kind)]
    for kind in (EngineProcess, FrontProcess, DurableFrontProcess, RouterProcess)
}


def check_actions(actions: Sequence[Action], before: PlanView) -> None:
    """Look at what a controller decided in one turn. Raises Violation."""
    for name, view in before.endpoints.items():
        mine = [action for action in actions if action.endpoint == name]
        num_started = sum(isinstance(action, StartReplica) for action in mine)
        if num_started and view.num_alive + num_started > view.limit:
            raise Violation(
                11,
                "no more replicas than the maximum and the surge",
                f"{name}: {view.num_alive} alive and {num_started} started, the limit is {view.limit}",
            )
        taking = StopReplica | ForgetReplica | RestReplica
        stopped = {action.replica_id for action in mine if isinstance(action, taking)}
        left = len(view.ready - stopped)
        if stopped & view.ready and left < min(view.needed, len(view.ready)):
            raise Violation(
                11,
                "no ready replica is taken that is needed",
                f"{name}: {sorted(stopped & view.ready)} stopped, {left} ready ones are left and "
                f"{view.needed} needed",
            )


def check_counts(state: SystemState, now_s: float) -> None:
    """Look at how many replicas are wanted. Raises Violation."""
    for desired in state.desired(now_s):
        replicas = state.config.endpoints[desired.name].replicas
        if not replicas.min <= desired.count <= replicas.max:
            raise Violation(
                11,
                "counts are within their bounds",
                f"{desired.name}: {desired.count} are wanted, {replicas.min} to {replicas.max} allowed",
            )


@dataclass(frozen=True, slots=True)
class EndpointView:
    """One endpoint before a turn: what is wanted, and what is true."""

    needed: int
    """Ready replicas that must not be taken."""
    limit: int
    """Most that may be alive."""
    num_alive: int
    ready: frozenset[str]
    """Replicas that the controller has every reason to think ready."""


@dataclass(frozen=True, slots=True)
class PlanView:
    """All endpoints before a turn."""

    endpoints: dict[str, EndpointView]


__all__ = [
    "CHECKS",
    "Check",
    "EndpointView",
    "PlanView",
    "Violation",
    "check",
    "check_actions",
    "check_counts",
]
