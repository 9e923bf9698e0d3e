"""Everything the controller knows, and its decisions put into it: config, fleet and gateway. Pure.

Owns the applied config. `plan` returns what the launcher must do; status and readiness are read from here.
Must not know: sockets, launchers, files, time's source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.api.config import Config
from headrace.api.endpoint_config import Endpoint
from headrace.api.messages import (
    ChangeRollout,
    EndpointOutlook,
    Explanation,
    LoadReport,
    Nodes,
    ProcessEnded,
    ProcessStarted,
    ProcessState,
    Sibling,
)
from headrace.control.config_changes import describe_changes, keep_address
from headrace.control.durable import DurableFronts, is_durable_front
from headrace.control.evacuation import evacuate
from headrace.control.fleet import Fleet, Slot
from headrace.control.gateway_departure import Stop, depart
from headrace.control.gateway_state import GatewayState
from headrace.control.notices import HoldOff
from headrace.control.outlook import outlook_of
from headrace.control.reconciler import (
    Action,
    DesiredEndpoint,
    ForgetReplica,
    LeaveReplica,
    PromoteReplica,
    RestReplica,
    StartReplica,
    StopReplica,
    reconcile,
)
from headrace.control.rollouts import Rollouts
from headrace.control.scaling import EndpointScaler, ScaledReplica, ScalingObservation
from headrace.control.siblings import siblings_of
from headrace.control.specs import gateway_ids
from headrace.errors import ConfigError
from headrace.policy.autoscaling import ScalingDecision
from headrace.policy.scaling_metrics import MetricReading


class SystemState:
    """One running system as its controller sees it."""

    def __init__(self, config: Config, started_s: float) -> None:
        self.started_s = started_s
        self.fleet = Fleet()
        self.gateway = GatewayState(gateway_ids(config))
        self.durable = DurableFronts(gateway_ids(config), self.fleet.notices)
        self.config = config
        self.rollouts = Rollouts(config, self.gateway.version_counts)
        self.notes: list[str] = []
        """What happened by itself since somebody looked, for the log."""
        self.nodes = Nodes([])
        """Of the cluster, as the launcher last said; none: there is this machine only."""
        self.metrics: Mapping[str, Sequence[MetricReading]] = {}
        """Custom metrics by endpoint, as they were last read."""
        self._scalers: dict[str, EndpointScaler] = {}
        self._has_planned = False
        self._scaling: dict[str, ScalingDecision] = {}
        """Of this moment, as far as it was decided."""
        self._take(config)

    def __repr__(self) -> str:
        return f"SystemState({self.fleet}, {self.gateway})"

    # ---- events ----------------

    def adopt(self, processes: Sequence[ProcessState], now_s: float) -> None:
        """Take over what ran before this controller."""
        for process in processes:
            if process.name in self.gateway.processes:
                self.gateway.adopt(process, self.nodes.own_node_id, now_s)
        generations = {name: self.rollouts.main_generation(name) for name in self.config.endpoints}
        with_standby = [name for name, endpoint in self.config.endpoints.items() if endpoint.replicas.standby]
        fronts = [process for process in processes if is_durable_front(process.name)]
        self.fleet.adopt([p for p in processes if p not in fronts], generations, now_s, with_standby)
        self.durable.want(self._durable_versions({}), self.config)
        self.durable.adopt(fronts, now_s)
        for slot in self.fleet.slots.values():
            if slot.endpoint in self.config.endpoints:
                slot.drain_grace_s = self.rollouts.section(slot.endpoint).drain_grace_s

    def on_started(self, event: ProcessStarted) -> None:
        if event.process.name in self.gateway.processes:
            self.gateway.on_started(event.process, self.nodes.own_node_id)
        else:
            self.fleet_of(event.process.name).on_started(event.process)

    def on_ended(self, event: ProcessEnded, now_s: float) -> None:
        process = event.process
        if process.name in self.gateway.processes:
            last_line = process.last_output.splitlines()[-1:] or [""]
            self.gateway.on_ended(process.name, f"exit code {process.exit_code}: {last_line[0]}", now_s)
        else:
            self.fleet_of(process.name).on_ended(process, now_s)

    def on_waiting(self, name: str, reason: str, now_s: float) -> None:
        """A process that was told to start waits for a place."""
        if name in self.gateway.processes:
            self.gateway.on_waiting(name, reason, now_s)
        else:
            self.fleet_of(name).on_waiting(name, reason, now_s)

    def on_refused(self, name: str, error: str, now_s: float) -> None:
        """The launcher could not start or stop a process."""
        essential = self.gateway.processes.get(name)
        if essential is None:
            self.fleet_of(name).on_refused(name, error, now_s)
        elif essential.is_alive and (essential.pid == 0 or essential.is_stopping):
            self.gateway.on_ended(name, error, now_s)

    def on_report(self, report: LoadReport, now_s: float) -> None:
        """Take a load report, of a replica or a durable front."""
        if report.gateway_id:
            self.durable.on_report(report, now_s)
        else:
            self.fleet.on_report(report, now_s)

    def fleet_of(self, front_id: str) -> Fleet:
        """Return the fleet that a front belongs to: replicas, or durable fronts."""
        return self.durable.fleet if is_durable_front(front_id) else self.fleet

    @property
    def slots(self) -> list[Slot]:
        """All fronts: those of replicas, and durable ones."""
        return [*self.fleet.slots.values(), *self.durable.fleet.slots.values()]

    def on_nodes(self, nodes: Nodes, now_s: float, wall_s: float) -> None:
        """Take what the launcher says of the cluster. wall_s: now_s in seconds since 1970."""
        self.nodes = nodes
        self.fleet.drains.note(nodes.nodes, now_s, wall_s)

    # ---- the user's wishes ----------------

    def scale(self, endpoint: str, count: int) -> str:
        """Set how many replicas an endpoint has. Returns a line for people. Raises ConfigError."""
        section = self._section(endpoint)
        if not 0 <= count <= section.replicas.max:
            raise ConfigError(
                f"{count} replicas of {endpoint!r}: its replicas.max is {section.replicas.max}; ask for "
                "0 to that many, or raise replicas.max in the config and apply it"
            )
        replicas = section.replicas.model_copy(update={"min": count})
        changed = section.model_copy(update={"replicas": replicas})
        endpoints = {**self.config.endpoints, endpoint: changed}
        self._take(self.config.model_copy(update={"endpoints": endpoints}))
        self.rollouts.rescale(self.config)
        self.fleet.forgive(endpoint)
        if count == 0:
            self._scalers[endpoint].end()
        return f"{endpoint}: {section.replicas.min} -> {count} replicas"

    def apply(self, config: Config, now_s: float) -> list[str]:
        """Take a new config. Returns what changes, one line each. Raises ConfigError and changes nothing."""
        config = keep_address(config, self.config)
        before = self.config
        versions = self.rollouts.apply(config, now_s)
        self._take(config)
        for name in config.endpoints:
            self.fleet.forgive(name)
            self.durable.forgive(name)
        return describe_changes(before, config, versions)

    def change_rollout(self, command: ChangeRollout, now_s: float) -> str:
        """Steer an endpoint's rollout. Returns a line for people. Raises ConfigError."""
        endpoint, rollouts = command.endpoint, self.rollouts
        self._section(endpoint)
        match command.action:
            case "pause":
                return rollouts.pause(endpoint, now_s)
            case "resume":
                return rollouts.resume(endpoint, now_s)
            case "promote":
                return rollouts.promote(endpoint, self.fleet.of(endpoint), now_s)
            case "undo":
                self.fleet.forgive(endpoint)
                return rollouts.undo(endpoint, now_s)

    def _section(self, endpoint: str) -> Endpoint:
        section = self.config.endpoints.get(endpoint)
        if section is None:
            known = ", ".join(sorted(self.config.endpoints))
            raise ConfigError(f"endpoint {endpoint!r} does not exist; there are: {known}")
        return section

    def _take(self, config: Config) -> None:
        self.config = config
        self._scaling.clear()
        self._scalers = {name: self._scaler(name, endpoint) for name, endpoint in config.endpoints.items()}

    # ---- decisions ----------------

    def desired(self, now_s: float) -> list[DesiredEndpoint]:
        """What is wanted now."""
        wanted = []
        for name, endpoint in self.config.endpoints.items():
            scaling = self.scaling(name, now_s)
            hold_off = self.hold_off(name, now_s)
            wanted.append(
                DesiredEndpoint(
                    name,
                    scaling.count,
                    endpoint.replicas.max,
                    self.rollouts.versions(name, scaling.count),
                    scaling.standby,
                    self.rollouts.main_generation(name),
                    endpoint.rollout.surge,
                    scaling.reason,
                    hold_off.reason if hold_off is not None else "",
                )
            )
        return wanted

    def hold_off(self, endpoint: str, now_s: float) -> HoldOff | None:
        """Return why no replica of an endpoint is started now: where it would be goes away. None: it may."""
        nodes = [node.node_id for node in self.nodes.nodes if node.is_alive]
        return self.fleet.notices.hold_off(endpoint, nodes, now_s)

    def scaling(self, endpoint: str, now_s: float) -> ScalingDecision:
        """Return how many replicas an endpoint is to have, decided once per tick."""
        decision = self._scaling.get(endpoint)
        if decision is None:
            decision = self._scaling[endpoint] = self._scalers[endpoint].decide(now_s)
        return decision

    def traffic(self, now_s: float) -> dict[str, dict[str, float]]:
        """Return the generations' parts of the requests, of endpoints where they differ."""
        parts = {
            name: self.rollouts.traffic(name, self.scaling(name, now_s).count)
            for name in self.config.endpoints
        }
        return {name: part for name, part in parts.items() if part}

    def outlooks(self, now_s: float) -> list[EndpointOutlook]:
        """Return when held requests of each endpoint can expect a replica."""
        fleet, rollouts = self.fleet, self.rollouts
        return [
            outlook_of(
                name,
                rollouts.section(name),
                fleet.of(name),
                fleet.starts_of(name),
                now_s,
                self.hold_off(name, now_s),
            )
            for name in self.config.endpoints
        ]

    def explain(self, endpoint: str, now_s: float) -> Explanation:
        """Return the last decision on an endpoint's count, with every number. Raises ConfigError."""
        self._section(endpoint)
        return self.scaling(endpoint, now_s).explanation(endpoint)

    def plan(self, now_s: float) -> list[Action]:
        """Decide, and note what was decided. The caller tells the launcher and the fronts."""
        observed = self.fleet.observe(now_s)
        if not self.fleet.is_settled(now_s):
            return []
        self._observe_scaling(now_s)
        for name in self.config.endpoints:
            count, demand = self.scaling(name, now_s).count, self.gateway.demand_of(name)
            note = self.rollouts.decide(name, count, self.fleet.of(name), demand, now_s)
            if note:
                self.notes.append(note)
        desired = self.desired(now_s)
        actions = reconcile(desired, observed, now_s)
        actions += evacuate(desired, observed, self.fleet.drains, now_s)
        for action in actions:
            match action:
                case StartReplica(endpoint=name, generation=generation):
                    config = self.rollouts.config_of(name, generation)
                    self.fleet.start(action, config.endpoints[name].drain_grace_s, now_s)
                case StopReplica():
                    self.fleet.stop(action)
                case LeaveReplica(replica_id):
                    self.fleet.slots[replica_id].is_told_to_leave = True
                case ForgetReplica(replica_id):
                    self.fleet.forget(replica_id)
                case PromoteReplica(replica_id):
                    self.fleet.ask_sleep(replica_id, now_s, is_standby=False)
                case RestReplica(replica_id):
                    self.fleet.ask_sleep(replica_id, now_s, is_standby=True)
        counts = {name: self.scaling(name, now_s).count for name in self.config.endpoints}
        self.durable.want(self._durable_versions(counts), self.config, self.gateway.left())
        return actions + self.durable.plan(now_s)

    def config_of(self, action: StartReplica) -> Config:
        """Return the config from which a front is started."""
        if action.gateway_id:
            return self.durable.config_of(action)
        return self.rollouts.config_of(action.endpoint, action.generation)

    def depart(self, now_s: float) -> list[Stop]:
        """Decide which gateways leave drained nodes, and return what of them is stopped now."""
        if self.config.gateway.placement is None:
            return []  # beside the controller they would only come again where they were
        grace_s = max(endpoint.drain_grace_s for endpoint in self.config.endpoints.values())
        pairs, with_fronts = self.gateway.pairs.values(), self.durable.gateways()
        return depart(pairs, self.fleet.drains, with_fronts, grace_s, now_s)

    def leaving(self) -> dict[str, float]:
        """Return by when replicas are to leave with their nodes, on the clock."""
        drains = self.fleet.drains
        return {
            slot.replica_id: drains.leave_by_s(slot.node)
            for slot in self.fleet.slots.values()
            if slot.is_told_to_leave and slot.node in drains
        }

    def siblings(self) -> dict[str, list[Sibling]]:
        """Return what each front is to know of its endpoint's replicas."""
        return siblings_of(self.fleet.slots.values(), self.durable.served())

    def is_ready(self, now_s: float) -> bool:
        """All gateways answer, and every endpoint has the replicas it wants, of the versions it wants."""
        serving = self.gateway.serving_replicas(now_s)
        if not self.gateway.has_answered or serving is None or not self.fleet.is_settled(now_s):
            return False

        def has_enough(endpoint: DesiredEndpoint) -> bool:
            if endpoint.count and self.rollouts.is_open(endpoint.name):
                return False
            generations = {version.generation for version in endpoint.versions}
            ready = [
                slot
                for slot in self.fleet.of(endpoint.name)
                if slot.phase == "ready" and slot.generation in generations and slot.replica_id in serving
            ]
            return len(ready) >= endpoint.count

        is_durable_ready = self.durable.is_ready(self.gateway.serving_by_gateway(now_s))
        return is_durable_ready and all(has_enough(endpoint) for endpoint in self.desired(now_s))

    # ---- inside ----------------

    def _durable_versions(self, counts: Mapping[str, int]) -> dict[str, list[Config]]:
        """Return the versions that replicas of durable endpoints have, or would have."""
        rollouts = self.rollouts
        return {
            name: [
                rollouts.config_of(name, version.generation)
                for version in rollouts.versions(name, counts.get(name, 0))
            ]
            for name, endpoint in self.config.endpoints.items()
            if endpoint.streams.durable
        }

    def _scaler(self, name: str, endpoint: Endpoint) -> EndpointScaler:
        """Return an endpoint's scaler, which takes its new config and keeps what it measured."""
        known = self._scalers.get(name)
        if known is None:
            return EndpointScaler(endpoint)
        known.configure(endpoint)
        return known

    def _observe_scaling(self, now_s: float) -> None:
        self._scaling.clear()
        demands, is_complete = self.gateway.demands_by_router(), self.gateway.is_heard(now_s)
        for name, scaler in self._scalers.items():
            replicas = [_scaled(slot) for slot in self.fleet.of(name) if slot.role != "standby"]
            if not self._has_planned:  # a scaler begins with the count that there is
                replicas = replicas[self.rollouts.num_surplus(name, len(replicas)) :]
            replicas += [_scaled(slot) for slot in self.fleet.of(name) if slot.role == "standby"]
            metrics = self.metrics.get(name, ())
            scaler.observe(ScalingObservation(demands.get(name, {}), replicas, is_complete, metrics), now_s)
        self._has_planned = True


def _scaled(slot: Slot) -> ScaledReplica:
    return ScaledReplica(slot.replica_id, slot.phase, slot.started_s, slot.report, slot.promoted_s)
