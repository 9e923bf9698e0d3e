"""The controller's shell: events in, decisions out to the launcher, answers to the CLI.

Owns the sockets admin.sock and controller.sock, the applied config's file, and the order of start and drain.
Must not know: how decisions are made (`system_state`, `reconciler`), tokens, HAProxy's words.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Literal

import msgspec

from headrace.api.config import Config
from headrace.api.messages import (
    AdminCommand,
    AdminReply,
    ApplyConfig,
    ChangeRollout,
    CreateKey,
    Demand,
    ExplainEndpoint,
    GatewaySpec,
    GetStatus,
    LauncherError,
    LauncherEvent,
    ListKeys,
    LoadReport,
    Nodes,
    ProcessEnded,
    Processes,
    ProcessStarted,
    ProcessWaiting,
    ReportAck,
    RevokeKey,
    ScaleEndpoint,
    Shutdown,
    SleepReplica,
)
from headrace.api.run_paths import ADMIN_HTTP_SOCKET, CONTROLLER_SOCKET
from headrace.clock import Clock
from headrace.control.applied import RolloutsFile, is_ending, keep_ending, parse_applied, write_config
from headrace.control.connections import Connections
from headrace.control.custom_metrics import CustomMetrics
from headrace.control.drain import drain
from headrace.control.essentials import Essential
from headrace.control.identity import open_identity
from headrace.control.places import avoiding, gateway_place
from headrace.control.probe import watch_gateway
from headrace.control.process_sources import ProcessSources
from headrace.control.reconciler import Action, PromoteReplica, RestReplica, StartReplica, StopReplica
from headrace.control.specs import ADMIN_SOCKET, CONFIG_FILE, gateway_specs
from headrace.control.status import describe
from headrace.control.system_state import SystemState
from headrace.errors import ConfigError, HeadraceError
from headrace.fabric.channel import Channel, listen
from headrace.fabric.launcher import Launcher

TICK_S = 0.2
HEARTBEAT_S = 1.0
"""How often the launcher hears something: the supervisor kills a controller that says nothing for long."""
KEYS_CHECK_S = 0.5
"""How often the key store is looked at: the CLI writes it by itself while no controller answers."""
STOP_MARGIN_S = 15.0
"""A front ends itself when its drain grace is over; only one that does not is killed, this much later."""
_log = logging.getLogger(__name__)


class Controller:
    """One controller. `run` returns when the system was asked to end and has drained."""

    def __init__(
        self,
        run_directory: Path,
        config: Config,
        launcher: Launcher,
        sources: ProcessSources,
        clock: Clock,
    ) -> None:
        self._run_directory = run_directory
        self._launcher = launcher
        self._sources = sources
        self._clock = clock
        self._state = SystemState(config, clock.now_s())
        self._rollouts_file = RolloutsFile(run_directory, self._state.rollouts)
        if problem := self._rollouts_file.restore(clock.now_s()):
            _log.error("%s", problem)
        # The event loop must not wait long for another process that changes the keys.
        self._identity = open_identity(config, lock_limit_s=0.5)
        self._keys_checked_s = clock.now_s()
        self._heartbeat_s = clock.now_s()
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self._connections = Connections()
        self._metrics = CustomMetrics(clock)
        self._metrics.want(config)
        self._told_traffic: dict[str, dict[str, float]] = {}

    def __repr__(self) -> str:
        return f"Controller({self._state})"

    def stop(self) -> None:
        """Begin to drain."""
        self._stop.set()
        self._wake.set()

    async def run(self) -> None:
        """Control until stopped, then drain. Raises LauncherLost when the supervisor is gone."""
        await self._find_what_is_running()
        servers = [
            await listen(self._path(ADMIN_SOCKET), self._admin_channel),
            await listen(self._path(CONTROLLER_SOCKET), self._report_channel),
        ]
        try:
            async with asyncio.TaskGroup() as group:
                events = group.create_task(self._take_events())
                admin = group.create_task(self._serve_admin_http())
                metrics = group.create_task(self._metrics.run())
                probes = [
                    group.create_task(
                        watch_gateway(
                            self._state.gateway, name, str(self._run_directory), self._wake, self._clock
                        )
                    )
                    for name in self._state.gateway.pairs
                ]
                await self._tick_until_stopped()
                for task in (metrics, *probes):
                    task.cancel()
                await drain(self._launcher, self._state, self._wake, self._clock)
                admin.cancel()
                events.cancel()
        finally:
            for server in servers:
                server.close()

    async def _find_what_is_running(self) -> None:
        self._launcher.list_processes()
        while True:
            async with asyncio.timeout(10):
                event = await self._launcher.next_event()
            if isinstance(event, Nodes):
                self._state.on_nodes(event, self._clock.now_s(), self._clock.wall_s())
            if isinstance(event, Processes):
                break
        self._state.adopt(event.processes, self._clock.now_s())
        if is_ending(self._run_directory):
            _log.info("an earlier controller was told to end the system")
            self.stop()
        _log.info("found %s", ", ".join(process.name for process in event.processes) or "nothing running")

    # ---- loops ----------------

    async def _take_events(self) -> None:
        while True:
            self._on_launcher_event(await self._launcher.next_event())
            self._wake.set()

    def _on_launcher_event(self, event: LauncherEvent) -> None:
        now_s = self._clock.now_s()
        match event:
            case ProcessStarted():
                self._state.on_started(event)
            case ProcessEnded(process):
                _log.info("%s (pid %d) ended with %s", process.name, process.pid, process.exit_code)
                self._state.on_ended(event, now_s)
            case LauncherError(name, error):
                _log.warning("%s: %s", name, error)
                self._state.on_refused(name, error, now_s)
            case ProcessWaiting(name, reason):
                self._state.on_waiting(name, reason, now_s)
            case Nodes():
                self._state.on_nodes(event, now_s, self._clock.wall_s())
            case Processes():
                pass

    async def _tick_until_stopped(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            self._tick()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()

    def _tick(self) -> None:
        now_s = self._clock.now_s()
        self._state.gateway.on_tick(now_s)
        self._tend_gateway(now_s)
        if now_s - self._heartbeat_s >= HEARTBEAT_S:
            self._heartbeat_s = now_s
            self._launcher.list_processes()  # its answer is not needed: a supervisor hears that we live
        if now_s - self._keys_checked_s >= KEYS_CHECK_S:
            self._keys_checked_s = now_s
            if self._identity.refresh():
                _log.info("another process changed the keys")
                self._tell_routers()
        self._state.metrics = {name: self._metrics.readings(name) for name in self._state.config.endpoints}
        for action in self._state.plan(now_s):
            _log.info("%s %s: %s", type(action).__name__, action.replica_id, action.reason)
            self._act(action)
        self._announce(now_s)

    def _act(self, action: Action) -> None:
        name, state = action.replica_id, self._state
        match action:
            case StartReplica(endpoint=endpoint, is_standby=is_standby, gateway_id=gateway_id):
                config, directory = state.config_of(action), self._run_directory
                if gateway_id:
                    spec = self._sources.prepare_durable(config, endpoint, name, gateway_id, directory)
                else:
                    spec = self._sources.prepare_replica(config, endpoint, name, directory, is_standby)
                self._launcher.start(avoiding(spec, state.fleet.notices.avoided(self._clock.now_s())))
            case StopReplica(grace_s=grace_s):
                self._launcher.stop(name, grace_s + STOP_MARGIN_S if grace_s > 0 else 0.0)
            case PromoteReplica():
                self._connections.set_sleep(name, 0)  # one that is not connected misses its time limit
            case RestReplica():
                self._connections.set_sleep(name, 1)

    def _announce(self, now_s: float) -> None:
        """Tell fronts and routers what changed, and keep what a restarted controller must know."""
        state = self._state
        for note in state.notes:
            _log.info("%s", note)
        state.notes.clear()
        self._connections.send_siblings(state.siblings(), now_s)
        self._connections.send_leaving(state.leaving(), now_s)
        self._connections.send_outlooks(state.outlooks(now_s), now_s)
        if state.traffic(now_s) != self._told_traffic:
            self._tell_routers()
        self._rollouts_file.keep()

    def _tend_gateway(self, now_s: float) -> None:
        processes = self._state.gateway.processes.values()
        for essential in self._state.gateway.hung(now_s):
            # A hung router's end costs no request: HAProxy balances by itself meanwhile.
            _log.warning("%s has said nothing for a while: killing it", essential.name)
            self._stop_essential(essential, 0.0)
        for essential, grace_s in self._state.depart(now_s):
            _log.info("stopping %s, whose node goes away, within %.0f s", essential.name, grace_s)
            self._stop_essential(essential, grace_s)
        due = self._state.gateway.due(now_s)
        if not due:
            return
        is_fresh = not any(essential.num_starts for essential in processes)
        get_specs = self._sources.prepare_gateway if is_fresh else self._sources.gateway_processes
        place = gateway_place(self._state.config)
        try:
            if (is_fresh or place is not None) and self._keys() is None:
                raise ConfigError(self._identity.error)
            specs = {
                spec.name: msgspec.structs.replace(spec, place=place)
                for gateway in self._gateway_specs().values()
                for spec in get_specs(gateway)
            }
        except (HeadraceError, OSError) as error:
            for essential in due:
                self._state.gateway.on_ended(essential.name, str(error), now_s)
            _log.error("the gateways cannot be prepared: %s", error)
            return
        for essential in due:
            _log.info(
                "starting %s %s", essential.name, f"again: {essential.last_error}" * bool(essential.failures)
            )
            essential.on_start(now_s)
            self._launcher.start(specs[essential.name])

    def _stop_essential(self, essential: Essential, grace_s: float) -> None:
        essential.is_stopping = True
        self._launcher.stop(essential.name, grace_s)

    def _gateway_specs(self) -> dict[str, GatewaySpec]:
        config, keys, admin_key_hash = self._state.config, self._keys(), self._identity.admin_key_hash
        traffic = self._state.traffic(self._clock.now_s())
        return gateway_specs(config, self._run_directory, keys, admin_key_hash, traffic)

    def _keys(self) -> dict[str, str] | None:
        """The valid keys; None: they are not known, and the routers keep those that they have."""
        return self._identity.valid_keys(self._state.config)

    def _tell_routers(self) -> None:
        if self._keys() is not None:
            self._told_traffic = self._state.traffic(self._clock.now_s())
            self._connections.send_specs(self._gateway_specs())

    # ---- load reports and demand ----------------

    def _report_channel(self) -> Channel:
        return Channel(LoadReport | Demand, self._on_report, self._on_report_close)

    def _on_report(self, channel: Channel, message: LoadReport | Demand) -> None:
        now_s = self._clock.now_s()
        if isinstance(message, LoadReport):
            slot = self._state.fleet_of(message.replica_id).slots.get(message.replica_id)
            if slot is not None:
                self._connections.add_front(message.replica_id, channel)
            before = slot.report.state if slot is not None and slot.report is not None else None
            self._state.on_report(message, now_s)
            # A controller sends no requests, so that no replica has to wait for it.
            channel.send(ReportAck(message.sequence, is_released=True))
            if before != message.state:
                self._wake.set()
            return
        is_known = message.router_id in self._state.gateway.pairs
        is_new = is_known and self._connections.add_router(message.router_id, channel)
        if is_new and self._keys() is not None:
            channel.send(self._gateway_specs()[message.router_id])  # its own may be older than the config
        self._state.gateway.on_demand(message, now_s)
        if any(endpoint.num_held for endpoint in message.endpoints):
            self._wake.set()

    def _on_report_close(self, channel: Channel, reason: str) -> None:
        self._connections.remove(channel)

    # ---- the CLI and the admin API ----------------

    async def _serve_admin_http(self) -> None:
        if self._state.config.gateway.admin_bind:
            from headrace.control.admin_http import serve_admin  # 9 MB that only those pay who want it

            await serve_admin(self._path(ADMIN_HTTP_SOCKET), self._obey_and_wake)

    def _obey_and_wake(self, command: AdminCommand) -> AdminReply:
        try:
            return self._obey(command)
        finally:
            self._wake.set()

    def _admin_channel(self) -> Channel:
        return Channel(AdminCommand, self._on_admin, lambda channel, reason: None)

    def _on_admin(self, channel: Channel, command: AdminCommand) -> None:
        try:
            channel.send(self._obey_and_wake(command))
        except ConfigError as error:
            channel.send(AdminReply(error=str(error)))

    def _obey(self, command: AdminCommand) -> AdminReply:
        match command:
            case GetStatus():
                status = describe(self._state, self._run_directory, self._clock.now_s())
                return AdminReply(status=status)
            case ScaleEndpoint(endpoint, count):
                notes = [self._state.scale(endpoint, count)]
            case ApplyConfig(text):
                notes = self._state.apply(parse_applied(text), self._clock.now_s())
                notes += self._identity.describe_keyless(self._state.config)
            case ChangeRollout():
                notes = [self._state.change_rollout(command, self._clock.now_s())]
            case ExplainEndpoint(endpoint):
                return AdminReply(explanation=self._state.explain(endpoint, self._clock.now_s()))
            case Shutdown():
                problem = keep_ending(self._run_directory)
                self.stop()
                return AdminReply(notes=["draining", *([problem] if problem else [])])
            case SleepReplica(replica_id, level):
                return AdminReply(notes=[self._set_sleep(replica_id, level)])
            case CreateKey() | ListKeys() | RevokeKey():
                reply = self._identity.obey(command, self._state.config, self._clock.wall_s())
                if not isinstance(command, ListKeys):
                    _log.info("%s: %s", type(command).__name__, [key.key_id for key in reply.keys])
                    self._tell_routers()
                return reply
        for note in notes:
            _log.info("%s", note)
        self._metrics.want(self._state.config)
        if problem := self._rollouts_file.keep():
            notes.append(problem)
        try:
            write_config(self._run_directory, self._state.config)
        except OSError as error:
            notes.append(f"a restarted controller will not know of this: {CONFIG_FILE}: {error}")
        self._tell_routers()
        return AdminReply(notes=notes)

    def _set_sleep(self, replica_id: str, level: Literal[0, 1, 2]) -> str:
        """Tell a front how deep its engine is to sleep. Raises ConfigError."""
        slots = self._state.fleet.slots
        if replica_id not in slots or not self._connections.set_sleep(replica_id, level):
            names = ", ".join(sorted(slots)) or "none"
            raise ConfigError(f"no replica {replica_id!r} reports; replicas are: {names}")
        self._state.fleet.rest(replica_id, is_asleep=level > 0)
        note = f"{replica_id} was told to " + (f"sleep at level {level}" if level else "wake")
        _log.info("%s", note)
        return f"{note}; `headrace status` shows when it does"

    def _path(self, name: str) -> str:
        return str(self._run_directory / name)
