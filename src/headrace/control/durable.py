"""Durable fronts: which there are to be at each gateway, and what is to be done for it. Pure.

They are kept by the code that keeps replicas, as a fleet of their own: a group of theirs (one endpoint at one
gateway) is to the reconciler what an endpoint is. Must not know sockets, launchers, or what replicas do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from headrace.api.config import Config
from headrace.api.messages import LoadReport, ProcessState
from headrace.control.fleet import Fleet, Slot
from headrace.control.notices import MachineNotices
from headrace.control.reconciler import (
    Action,
    DesiredEndpoint,
    ForgetReplica,
    StartReplica,
    StopReplica,
    WantedVersion,
    reconcile,
)
from headrace.control.slots import slot_prefix
from headrace.control.specs import durable_generation_of

_MARK = ":"
"""In every durable front's id, and in no replica's."""
_NUM_LEAVING = 4
"""Durable fronts of a group that may still end their streams while others start: they are small."""


def is_durable_front(process_name: str) -> bool:
    """Whether a process is a durable front's, by its name."""
    return _MARK in process_name


def group_of(endpoint: str, gateway_id: str) -> str:
    """Return the name of an endpoint's durable fronts at a gateway: their ids are NAME-1, NAME-2, ..."""
    return f"{slot_prefix(endpoint)}{_MARK}{gateway_id}"


@dataclass(frozen=True, slots=True)
class _Group:
    """What one group is to be."""

    endpoint: str
    gateway_id: str
    configs: Mapping[str, Config]
    """By the generations that are wanted: what their durable fronts are started from."""
    num_each: int

    @property
    def count(self) -> int:
        return self.num_each * len(self.configs)


class DurableFronts:
    """All durable fronts of one system."""

    def __init__(self, gateway_ids: Iterable[str], notices: MachineNotices | None = None) -> None:
        """notices: of the machines, as replicas hear them, too."""
        self.fleet = Fleet(notices)
        """Its slots' endpoint is the group's name."""
        self._nodes: dict[str, str] = {}
        """Of each gateway's durable fronts, as far as one was heard of; bounded by the gateways."""
        self._gateway_ids = tuple(gateway_ids)
        self._groups: dict[str, _Group] = {}
        self._served: dict[str, str] = {}
        """Endpoint by durable front, as they report it: also of groups that are wanted no more."""

    def __repr__(self) -> str:
        return f"DurableFronts({self.fleet})"

    def endpoint_of(self, slot: Slot) -> str:
        """Return the endpoint of a durable front, its group's name if it is not known."""
        group = self._groups.get(slot.endpoint)
        return group.endpoint if group is not None else self._served.get(slot.replica_id, slot.endpoint)

    def served(self) -> dict[str, str]:
        """Return the endpoint of each durable front that ever reported."""
        self._served = {name: each for name, each in self._served.items() if name in self.fleet.slots}
        return self._served

    # ---- what is wanted and what happens

    def gateways(self) -> set[str]:
        """Return the gateways that have durable fronts."""
        return {slot.endpoint.rpartition(_MARK)[2] for slot in self.fleet.slots.values() if slot.is_alive}

    def want(
        self, endpoints: Mapping[str, Sequence[Config]], config: Config, left: Collection[str] = ()
    ) -> None:
        """Take what the durable endpoints' replicas are started from, version by version. `config`: the
        applied one, which says how many durable fronts there are to be. left: gateways that are to have
        none, because they leave their nodes."""
        self._groups = {
            group_of(name, gateway_id): _Group(
                name,
                gateway_id,
                {durable_generation_of(version, name): version for version in versions},
                config.endpoints[name].streams.durable_fronts,
            )
            for name, versions in endpoints.items()
            for gateway_id in self._gateway_ids
            if gateway_id not in left
        }

    def adopt(self, processes: Sequence[ProcessState], now_s: float) -> None:
        """Take over those that ran before this controller."""
        generations = {name: next(iter(group.configs)) for name, group in self._groups.items()}
        self.fleet.adopt(processes, generations, now_s)

    def on_report(self, report: LoadReport, now_s: float) -> None:
        """Take a durable front's load report."""
        slot = self.fleet.slots.get(report.replica_id)
        if slot is not None:
            self._served[report.replica_id] = report.endpoint
            if slot.pid and report.gateway_id in self._gateway_ids:
                self._nodes[report.gateway_id] = slot.node
            self.fleet.on_report(msgspec.structs.replace(report, endpoint=slot.endpoint), now_s)

    def forgive(self, endpoint: str) -> None:
        """Forget failures: the user changed something, so try again at once."""
        for gateway_id in self._gateway_ids:
            self.fleet.forgive(group_of(endpoint, gateway_id))

    # ---- decisions

    def plan(self, now_s: float) -> list[Action]:
        """Decide, and note what was decided. The actions' endpoints are real ones."""
        observed = self.fleet.observe(now_s)
        if not self.fleet.is_settled(now_s):
            return []
        actions: list[Action] = []
        desired = [
            _desired(name, group, self._hold_off(group, now_s)) for name, group in self._groups.items()
        ]
        for action in reconcile(desired, observed, now_s):
            match action:
                case StartReplica(endpoint=name, generation=generation):
                    group = self._groups[name]
                    config = group.configs[generation]
                    self.fleet.start(action, config.endpoints[group.endpoint].drain_grace_s, now_s)
                    actions.append(replace(action, endpoint=group.endpoint, gateway_id=group.gateway_id))
                case StopReplica():
                    self.fleet.stop(action)
                    actions.append(action)
                case ForgetReplica(replica_id):
                    self.fleet.forget(replica_id)
        return actions

    def _hold_off(self, group: _Group, now_s: float) -> str:
        hold_off = self.fleet.notices.hold_off_at(self._nodes.get(group.gateway_id, ""), now_s)
        return hold_off.reason if hold_off is not None else ""

    def config_of(self, action: StartReplica) -> Config:
        """Return the config from which a durable front is started."""
        return self._groups[group_of(action.endpoint, action.gateway_id)].configs[action.generation]

    @property
    def num_wanted(self) -> int:
        """How many there are to be at all gateways."""
        return sum(group.count for group in self._groups.values())

    def is_ready(self, serving: Mapping[str, frozenset[str]]) -> bool:
        """Whether each group has what it is to have. `serving`: by gateway, whom it sends requests to."""
        ready = [
            (slot.endpoint, slot.generation)
            for slot in self.fleet.slots.values()
            if slot.phase == "ready" and any(slot.replica_id in ids for ids in serving.values())
        ]
        return all(
            ready.count((name, generation)) >= group.num_each
            for name, group in self._groups.items()
            for generation in group.configs
        )


def _desired(name: str, group: _Group, hold_off: str) -> DesiredEndpoint:
    versions = tuple(WantedVersion(generation, group.num_each) for generation in group.configs)
    return DesiredEndpoint(
        name,
        group.count,
        group.count + _NUM_LEAVING,
        versions,
        reason=f"{group.endpoint} is durable",
        hold_off=hold_off,
        id_prefix=name,
    )
