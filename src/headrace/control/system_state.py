"""Everything the controller knows, and its decisions put into it: config, fleet and gateway. Pure.

Owns the applied config. `plan` returns what the launcher must do; status and readiness are read from here.
Must not know: sockets, launchers, files, time's source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headrace.api.config import Config
from headrace.api.messages import ProcessEnded, ProcessStarted, ProcessState
from headrace.control.fleet import Fleet
from headrace.control.gateway_state import GatewayState
from headrace.control.reconciler import (
    Action,
    DesiredEndpoint,
    ForgetReplica,
    StartReplica,
    StopReplica,
    choose_count,
    reconcile,
)
from headrace.control.specs import gateway_ids, generation_of
from headrace.errors import ConfigError

_FIXED_GATEWAY_FIELDS = (
    "bind",
    "admin_bind",
    "count",
    "metrics_bind",
    "max_connections",
    "num_threads",
    "tls",
)


class SystemState:
    """One running system as its controller sees it."""

    def __init__(self, config: Config, started_s: float) -> None:
        self.started_s = started_s
        self.fleet = Fleet()
        self.gateway = GatewayState(gateway_ids(config))
        self._take(config)

    def __repr__(self) -> str:
        return f"SystemState({self.fleet}, {self.gateway})"

    # ---- events ----------------

    def adopt(self, processes: Sequence[ProcessState], now_s: float) -> None:
        """Take over what ran before this controller."""
        for process in processes:
            if process.name in self.gateway.processes:
                self.gateway.adopt(process, now_s)
        self.fleet.adopt(processes, self._generations, now_s)
        for slot in self.fleet.slots.values():
            self.gateway.note_requests(slot.endpoint, now_s)
            if slot.endpoint in self.config.endpoints:
                slot.drain_grace_s = self.config.endpoints[slot.endpoint].drain_grace_s

    def on_started(self, event: ProcessStarted) -> None:
        essential = self.gateway.processes.get(event.process.name)
        if essential is not None:
            essential.pid = event.process.pid
        else:
            self.fleet.on_started(event.process)

    def on_ended(self, event: ProcessEnded, now_s: float) -> None:
        process = event.process
        if process.name in self.gateway.processes:
            last_line = process.last_output.splitlines()[-1:] or [""]
            self.gateway.on_ended(process.name, f"exit code {process.exit_code}: {last_line[0]}", now_s)
        else:
            self.fleet.on_ended(process, now_s)

    def on_refused(self, name: str, error: str, now_s: float) -> None:
        """The launcher could not start or stop a process."""
        essential = self.gateway.processes.get(name)
        if essential is None:
            self.fleet.on_refused(name, error, now_s)
        elif essential.is_alive and (essential.pid == 0 or essential.is_stopping):
            self.gateway.on_ended(name, error, now_s)

    # ---- the user's wishes ----------------

    def scale(self, endpoint: str, count: int) -> str:
        """Set how many replicas an endpoint has. Returns a line for people. Raises ConfigError."""
        section = self.config.endpoints.get(endpoint)
        if section is None:
            known = ", ".join(sorted(self.config.endpoints))
            raise ConfigError(f"endpoint {endpoint!r} does not exist; there are: {known}")
        if not 0 <= count <= section.replicas.max:
            raise ConfigError(
                f"{count} replicas of {endpoint!r}: its replicas.max is {section.replicas.max}; ask for "
                "0 to that many, or raise replicas.max in the config and apply it"
            )
        replicas = section.replicas.model_copy(update={"min": count})
        changed = section.model_copy(update={"replicas": replicas})
        endpoints = {**self.config.endpoints, endpoint: changed}
        self._take(self.config.model_copy(update={"endpoints": endpoints}))
        self.fleet.forgive(endpoint)
        if count == 0:
            self.gateway.forget_requests(endpoint)
        return f"{endpoint}: {section.replicas.min} -> {count} replicas"

    def apply(self, config: Config) -> list[str]:
        """Take a new config. Returns what changes, one line each. Raises ConfigError and changes nothing."""
        config = _keep_address(config, self.config)
        notes = _describe_changes(self.config, config, self._generations)
        self._take(config)
        for name in config.endpoints:
            self.fleet.forgive(name)
        return notes

    def _take(self, config: Config) -> None:
        self.config = config
        self._generations = _generations(config)

    # ---- decisions ----------------

    def desired(self, now_s: float) -> list[DesiredEndpoint]:
        """What is wanted now."""
        wanted = []
        for name, endpoint in self.config.endpoints.items():
            num_held = self.gateway.demand_of(name).num_held
            count, reason = choose_count(endpoint.replicas.min, num_held, self.gateway.idle_s(name, now_s))
            generation = self._generations[name]
            wanted.append(DesiredEndpoint(name, count, endpoint.replicas.max, generation, reason))
        return wanted

    def plan(self, now_s: float) -> list[Action]:
        """Decide, and note what was decided. The caller tells the launcher."""
        observed = self.fleet.observe(now_s)
        if not self.fleet.is_settled(now_s):
            return []
        actions = reconcile(self.desired(now_s), observed, now_s)
        for action in actions:
            match action:
                case StartReplica(endpoint=name):
                    grace_s = self.config.endpoints[name].drain_grace_s
                    self.fleet.start(action, self._generations[name], grace_s, now_s)
                case StopReplica():
                    self.fleet.stop(action)
                case ForgetReplica(replica_id):
                    self.fleet.forget(replica_id)
        return actions

    def is_ready(self, now_s: float) -> bool:
        """All gateways answer, and every endpoint has the replicas it wants, of the current config."""
        serving = self.gateway.serving_replicas(now_s)
        if not self.gateway.has_answered or serving is None or not self.fleet.is_settled(now_s):
            return False

        def count(name: str, counts: Callable[[str], bool]) -> int:
            return sum(
                slot.endpoint == name and slot.phase == "ready" and counts(slot.replica_id)
                for slot in self.fleet.slots.values()
                if slot.generation == self._generations[name]
            )

        return all(
            count(endpoint.name, lambda replica_id: replica_id in serving) >= endpoint.count
            for endpoint in self.desired(now_s)
        )


def _generations(config: Config) -> dict[str, str]:
    return {name: generation_of(config, name) for name in config.endpoints}


def _keep_address(new: Config, old: Config) -> Config:
    """The gateway's address and size are set when it starts; port 0 means the one it has."""
    for field in ("bind", "admin_bind"):
        before: str = getattr(old.gateway, field)
        host, _, port = getattr(new.gateway, field).rpartition(":")
        if port == "0" and host == before.rpartition(":")[0]:
            new = new.model_copy(update={"gateway": new.gateway.model_copy(update={field: before})})
    if not new.state_dir:
        new = new.model_copy(update={"state_dir": old.state_dir})
    problems = [
        f"gateway.{field}: is {getattr(old.gateway, field)!r} and cannot become "
        f"{getattr(new.gateway, field)!r} while the system runs; stop it and start it with the new config"
        for field in _FIXED_GATEWAY_FIELDS
        if getattr(new.gateway, field) != getattr(old.gateway, field)
    ]
    if new.state_dir != old.state_dir:
        problems.append(
            f"state_dir: is {old.state_dir!r} and cannot become {new.state_dir!r} while the system runs; "
            "stop it and start it with the new config"
        )
    if problems:
        raise ConfigError(problems)
    return new


def _describe_changes(old: Config, new: Config, old_generations: dict[str, str]) -> list[str]:
    notes = [f"{name}: removed; its replicas drain" for name in old.endpoints if name not in new.endpoints]
    for name, endpoint in new.endpoints.items():
        before = old.endpoints.get(name)
        if before is None:
            notes.append(f"{name}: added with {endpoint.replicas.min} replicas")
            continue
        if before.replicas != endpoint.replicas:
            notes.append(
                f"{name}: replicas {before.replicas.min} to {before.replicas.max} -> "
                f"{endpoint.replicas.min} to {endpoint.replicas.max}"
            )
        if generation_of(new, name) != old_generations[name]:
            notes.append(f"{name}: changed; its replicas are replaced one by one")
        elif before.queue != endpoint.queue:
            notes.append(f"{name}: queue limits changed")
    notes += _describe_tenants(old, new)
    return notes or ["nothing changed"]


def _describe_tenants(old: Config, new: Config) -> list[str]:
    notes = [
        f"tenant {name}: removed; its keys stop working" for name in old.tenants if name not in new.tenants
    ]
    notes += [f"tenant {name}: added" for name in new.tenants if name not in old.tenants]
    notes += [
        f"tenant {name}: changed"
        for name in new.tenants
        if name in old.tenants and new.tenants[name] != old.tenants[name]
    ]
    if bool(old.tenants) != bool(new.tenants):
        notes.append(f"the gateway {'asks for keys' if new.tenants else 'takes requests without keys'} now")
    return notes
