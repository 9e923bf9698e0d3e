"""One simulated system: its machines, processes and clients, run from a scenario to its end.

Owns who is started where, the checks after every event, and the convergence that must follow once faults
have stopped. Must not know how anything decides.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

import msgspec

from headrace.api.messages import ProcessSpec, ReplicaSpec
from headrace.control.durable import is_durable_front
from headrace.control.fleet import Slot
from headrace.control.reconciler import Action, StopReplica
from headrace.control.specs import gateway_ids, gateway_specs
from headrace.control.system_state import SystemState
from headrace.gateway.placed import localized
from headrace.sim.clients import Crowd
from headrace.sim.cluster_supervisor import ClusterSupervisor, gateway_of_process
from headrace.sim.controller import ControllerProcess, RunDirectory
from headrace.sim.convergence import miscounted, unsettled
from headrace.sim.cuts import cut_without_cause
from headrace.sim.durable_front import DurableFrontProcess
from headrace.sim.ending import Ending
from headrace.sim.faults import Breaker
from headrace.sim.front import FrontProcess
from headrace.sim.front_base import ServingFront
from headrace.sim.gateway_nodes import GatewayNodes, Node
from headrace.sim.haproxy import ConfigOnDisk, HaproxyProcess
from headrace.sim.invariants import EndpointView, PlanView, Violation, check, check_actions, check_counts
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.metric_sources import MetricSources
from headrace.sim.network import Weather
from headrace.sim.relay import RelayProcess
from headrace.sim.router import RouterProcess
from headrace.sim.scenario import Scenario
from headrace.sim.supervisor import SupervisorProcess
from headrace.sim.timeline import Timeline

RUN_DIR = "/run"
CONVERGES_WITHIN_S = 900.0
"""After the last fault: a lost request of a lost replica is given up after 600 s, a slot that failed
repeatedly is tried every 60 s."""
LOOK_EVERY_S = 2.0
HISTORY = 400


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    seed: int
    violation: Violation | None
    simulated_s: float
    num_events: int
    events: Counter[str]
    faults: Counter[str]
    requests: Counter[str]
    converged_s: float
    """After the last fault."""
    num_resumed: int = 0
    """Streams that were continued in another engine."""
    history: tuple[str, ...] = ()


class World:
    """Everything that there is."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.timeline = Timeline(scenario.seed)
        self.weather = Weather()
        self.registry = Registry(self.timeline, check)
        names = ["control", *(f"node-{number}" for number in range(scenario.num_hosts))]
        self.hosts = [Host(self.timeline, n, skew) for n, skew in zip(names, scenario.skews, strict=True)]
        self.metrics = MetricSources(scenario.config, self.hosts[0])
        self.run_directory = RunDirectory(RUN_DIR, scenario.config, self.metrics)
        gateways = gateway_ids(scenario.config)
        self.nodes = (
            GatewayNodes(self.timeline, self.weather, scenario.node_skews, self.hosts)
            if scenario.node_skews
            else None
        )
        """Machines that gateways are on; None: they are beside the controller."""
        self._disks: dict[tuple[str, int], ConfigOnDisk] = {}
        """By gateway and its placement."""
        self.haproxies: dict[str, HaproxyProcess] = {}
        self.routers: dict[str, RouterProcess] = {}
        self.fronts: dict[str, FrontProcess] = {}
        self.controller: ControllerProcess | None = None
        self.history: deque[str] = deque(maxlen=HISTORY)
        self.supervisor = self._make_supervisor()
        self.crowd = Crowd(
            self.registry,
            self.hosts[0],
            self.weather,
            lambda name: scenario.config.endpoints[name].engine,
            gateways,
            lambda client: cut_without_cause(self, client),
        )
        self.ending = Ending(self)
        self.breaker = Breaker(self)
        self.all_fronts: list[FrontProcess] = []
        """Also those that are gone."""
        self.durable: dict[str, DurableFrontProcess] = {}
        self.all_durable: list[DurableFrontProcess] = []
        self.relays: dict[str, RelayProcess] = {}
        self.all_routers: list[RouterProcess] = []
        self.stopped_fronts: set[str] = set()
        """Fronts that were told to leave: those end what they cannot finish in their grace."""

    # ---- running

    def run(self) -> Outcome:
        """Run to the end, or to the first violation."""
        scenario, violation, converged_s = self.scenario, None, -1.0
        self.supervisor.begin()
        self.crowd.expect(list(scenario.clients))
        self.breaker.expect(list(scenario.faults))
        try:
            self._run_until(scenario.ends_s)
            self.breaker.mend()
            converged_s = self._end() if self.ending.is_asked else self._converge()
        except Violation as found:
            violation = found
        except AssertionError as error:
            violation = Violation(0, _where(error), str(error))
        except Exception as error:  # a bug of the product or of this world: found by this seed
            violation = Violation(0, f"{type(error).__name__} in {_where(error)}", str(error))
        return Outcome(
            scenario.seed,
            violation,
            self.timeline.now_s,
            self.timeline.num_events,
            self.timeline.by_kind,
            self.breaker.counts,
            Counter(self.crowd.outcomes),
            converged_s,
            sum(sum(front.metrics.num_resumed.values()) for front in self._every_front()),
            tuple(self.history),
        )

    def _every_front(self) -> list[ServingFront]:
        return [*self.all_fronts, *self.all_durable]

    def _run_until(self, end_s: float) -> None:
        while self.timeline.run_next(end_s):
            if self.registry.errors:
                raise self.registry.errors[0]

    def _converge(self) -> float:
        """Run on until everything is as wanted. Raises Violation if that takes too long."""
        began_s = self.timeline.now_s
        while True:
            self._run_until(self.timeline.now_s + LOOK_EVERY_S)
            problem = unsettled(self)
            elapsed_s = self.timeline.now_s - began_s
            if not problem:
                if miscount := miscounted(self):
                    raise Violation(miscount.number, miscount.name, miscount.message)
                return elapsed_s
            if elapsed_s > CONVERGES_WITHIN_S:
                raise Violation(problem.number, f"convergence: {problem.name}", problem.message)

    def _end(self) -> float:
        """Run on until the system that was told to end has ended. Raises Violation if something is wrong."""
        began_s = self.timeline.now_s
        while not self.ending.is_over:
            self._run_until(self.timeline.now_s + LOOK_EVERY_S)
        problem = self.ending.problem()
        if problem is not None:
            raise problem
        if miscount := miscounted(self):
            raise Violation(miscount.number, miscount.name, miscount.message)
        return self.timeline.now_s - began_s

    def note(self, text: str) -> None:
        """Remember what happened, for people."""
        self.history.append(f"{self.timeline.now_s:9.3f} {text}")

    # ---- processes

    def _make_supervisor(self) -> SupervisorProcess:
        control = self.hosts[0]
        if self.nodes is None:
            return SupervisorProcess(self.registry, control, self._spawn)
        return ClusterSupervisor(self.registry, control, self._spawn, self.nodes)

    def lose_node(self, node: Node, noticed_after_s: float) -> int:
        """Let a gateway's machine go. Return how many processes were on it."""
        assert isinstance(self.supervisor, ClusterSupervisor)
        return self.supervisor.lose_node(node, noticed_after_s)

    def cut_off_node(self, node: Node, duration_s: float) -> int:
        """Let a gateway's machine reach no other one. Return how many processes are on it."""
        assert isinstance(self.supervisor, ClusterSupervisor)
        return self.supervisor.cut_off_node(node, duration_s)

    def _place_of(self, gateway: str) -> tuple[Host, ConfigOnDisk]:
        """Where a gateway is, and what was written there for it."""
        host, number = self.hosts[0], 0
        if self.nodes is not None:
            placement = self.nodes.placements[gateway]
            host, number = placement.host, placement.number
        return host, self._disks.setdefault((gateway, number), ConfigOnDisk())

    def _spawn(self, spec: ProcessSpec) -> Process:
        self.ending.judge_start(spec.name)
        process = self._make(spec)
        self.note(f"start {spec.name} (pid {process.pid}) on {process.host.name}")
        return process

    def _make(self, spec: ProcessSpec) -> Process:
        kind, gateway = spec.name.partition("-")[0], gateway_of_process(spec.name)
        if spec.argv:
            front = msgspec.json.decode(spec.argv[-1], type=ReplicaSpec)
            return self._make_durable(front) if front.gateway_id else self._make_front(front)
        if kind == "router":
            return self._make_router(gateway)
        if kind == "haproxy":
            host, disk = self._place_of(gateway)
            haproxy = HaproxyProcess(self.registry, host, gateway, RUN_DIR, self.weather, disk)
            self.haproxies[gateway] = haproxy
            haproxy.begin()
            return haproxy
        if kind == "relay":
            host, _ = self._place_of(gateway)
            relay = RelayProcess(self.registry, host, gateway, RUN_DIR, self.weather)
            self.relays[gateway] = relay
            relay.begin()
            return relay
        self.controller = ControllerProcess(
            self.registry,
            self.hosts[0],
            self.run_directory,
            self.weather,
            self._answers,
            self._plan,
            self.note,
        )
        self.controller.begin()
        return self.controller

    def _make_router(self, gateway: str) -> RouterProcess:
        spec = gateway_specs(self.run_directory.config, Path(RUN_DIR))[gateway]
        host, disk = self._place_of(gateway)
        spec = localized(spec, RUN_DIR, host.name)
        router = RouterProcess(
            self.registry, host, spec, self.weather, disk, lambda: self.haproxies.get(gateway)
        )
        self.routers[gateway] = router
        self.all_routers.append(router)
        router.begin()
        return router

    def _make_front(self, spec: ReplicaSpec) -> FrontProcess:
        host = self.hosts[1 + len(self.all_fronts) % self.scenario.num_hosts]
        behaviour = self.scenario.behaviour(spec.engine.model)
        front = FrontProcess(
            self.registry, host, spec, self.weather, behaviour, self.scenario.busy_interval_s
        )
        self.fronts[spec.replica_id] = front
        self.all_fronts.append(front)
        front.begin()
        return front

    def _make_durable(self, spec: ReplicaSpec) -> DurableFrontProcess:
        interval_s = self.scenario.busy_interval_s
        host, _ = self._place_of(spec.gateway_id)
        front = DurableFrontProcess(self.registry, host, spec, self.weather, interval_s)
        self.durable[spec.replica_id] = front
        self.all_durable.append(front)
        self.stopped_fronts.discard(spec.replica_id)
        front.begin()
        return front

    def _answers(self, name: str) -> bool:
        process = self.supervisor.children.get(name)
        if process is None or not process.is_alive or process.is_paused:
            return False
        if isinstance(process, HaproxyProcess) and process.is_leaving:
            return False  # it does not listen
        return not self.weather.unreachable_s(self.hosts[0], process.host, self.timeline.now_s)

    # ---- the controller's decisions

    def _plan(self, state: SystemState, now_s: float) -> list[Action]:
        before = {
            name: (
                frozenset(slot.replica_id for slot in slots if _seems_ready(slot, now_s)),
                sum(slot.is_alive and not _leaves_by_itself(slot) for slot in slots),
            )
            for name in state.config.endpoints
            for slots in (state.fleet.of(name),)
        }
        actions = state.plan(now_s)
        check_counts(state, now_s)
        for action in actions:
            self.note(f"controller: {type(action).__name__} {action.replica_id}: {action.reason}")
            if isinstance(action, StopReplica) and not action.is_failure:
                self.stopped_fronts.add(action.replica_id)
        if actions:
            views = {}
            for desired in state.desired(now_s):
                ready, num_alive = before[desired.name]
                needed = desired.count - (desired.surge == 0)  # without room for more, the old one goes first
                limit = max(desired.max_count, desired.count) + desired.surge
                views[desired.name] = EndpointView(needed, limit, num_alive, ready)
            check_actions([a for a in actions if not is_durable_front(a.replica_id)], PlanView(views))
        return actions


def _leaves_by_itself(slot: Slot) -> bool:
    """Its machine goes away, and it drains without having been told to."""
    return not slot.is_stopping and slot.report is not None and slot.report.state == "draining"


def _seems_ready(slot: Slot, now_s: float) -> bool:
    """Whether the controller has every reason to think that it serves. It may have died a moment ago."""
    report = slot.report
    is_there = slot.is_alive and not slot.is_stopping and now_s <= slot.lease_ends_s
    return is_there and report is not None and report.state == "ready"


def _where(error: BaseException) -> str:
    """Where an error was raised, as a name that stays the same from run to run."""
    trace = error.__traceback__
    name = "nowhere"
    while trace is not None:
        code = trace.tb_frame.f_code
        if "headrace" in code.co_filename:
            name = f"{code.co_filename.rpartition('/')[2]}:{code.co_name}"
        trace = trace.tb_next
    return name
