"""A simulated controller: the real SystemState in the order of `control.app`.

Mirrors the app's shell on virtual time: launcher events, load reports and demand in; starts, stops and words
to fronts and routers out. Must not decide anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

from headrace.api.config import Config
from headrace.api.messages import (
    ChangeRollout,
    Demand,
    GatewaySpec,
    LauncherError,
    LauncherEvent,
    ListProcesses,
    LoadReport,
    Nodes,
    ProcessEnded,
    Processes,
    ProcessSpec,
    ProcessStarted,
    ProcessWaiting,
    ReportAck,
    StartProcess,
    StopProcess,
)
from headrace.api.run_paths import CONTROLLER_SOCKET
from headrace.control.app import STOP_MARGIN_S, TICK_S
from headrace.control.connections import Connections
from headrace.control.custom_metrics import READ_PERIOD_S
from headrace.control.drain import drain
from headrace.control.essentials import Essential
from headrace.control.reconciler import Action, PromoteReplica, RestReplica, StartReplica, StopReplica
from headrace.control.rollouts import KeptRollout
from headrace.control.specs import durable_process, gateway_specs, replica_process
from headrace.control.system_state import SystemState
from headrace.errors import ConfigError
from headrace.fabric.channel import Channel
from headrace.fabric.launcher import Launcher
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.metric_sources import MetricSources, MetricsReader
from headrace.sim.network import End, Weather, connect
from headrace.sim.process_loop import ProcessLoop
from headrace.sim.supervisor import ADDRESS
from headrace.sim.timeline import Timer

PROBE_S = 1.0
MIN_TICK_GAP_S = 0.02
"""A real tick takes some milliseconds; events that come meanwhile are taken together."""


class RunDirectory:
    """What outlives a controller: the applied config, the rollouts, and users' files of their own."""

    def __init__(self, path: str, config: Config, metrics: MetricSources) -> None:
        self.path = path
        self.config = config
        self.rollouts: list[KeptRollout] = []
        self.metrics = metrics
        self.is_ending = False
        """`headrace down` has told the system to end."""


class ControllerProcess(Process):
    """One controller process."""

    def __init__(
        self,
        registry: Registry,
        host: Host,
        run_directory: RunDirectory,
        weather: Weather,
        probe: Callable[[str], bool],
        plan: Callable[[SystemState, float], list[Action]],
        note: Callable[[str], None],
    ) -> None:
        """probe: whether a process of this name answers. plan: calls the state's, and looks at it. note:
        what happened by itself, for the history."""
        super().__init__(registry, "controller", host)
        self._run_directory = run_directory
        self._weather = weather
        self._probe = probe
        self._plan = plan
        self._note = note
        self._launcher: End | None = None
        self._nodes: Nodes | None = None
        """Of a cluster, as they were told before the state was there."""
        self._connections = Connections()
        self._told_traffic: dict[str, dict[str, float]] = {}
        self._next_tick: Timer | None = None
        self._ticked_s = -1.0
        self.state: SystemState | None = None
        self.is_stopping = False
        self._metrics = MetricsReader(host, run_directory.metrics)
        self._draining = asyncio.Event()
        """Set when something happened while it drains."""

    def begin(self) -> None:
        self.after(self.random.uniform(0.2, 1.0), self._connect, "controller start")

    def _connect(self) -> None:
        connect(self, self._weather, ADDRESS, self._on_launcher, lambda: self.exit(1))

    def _on_launcher(self, end: End) -> None:
        self._launcher = end
        end.on_message = self._on_event
        end.on_close = lambda: self.exit(1)
        end.send(ListProcesses())

    def accept(self, address: str, connection: object) -> None:
        assert isinstance(connection, End)
        end = connection
        end.on_message = lambda message: self._on_report(end, message)
        end.on_close = lambda: self._on_report_close(end)

    # ---- the launcher

    def _on_event(self, event: LauncherEvent) -> None:
        now_s = self.host.now_s()
        if self.state is None:
            if isinstance(event, Processes):
                self._adopt(event, now_s)
            elif isinstance(event, Nodes):
                self._nodes = event
            return
        match event:
            case ProcessStarted():
                self.state.on_started(event)
            case ProcessEnded():
                self.state.on_ended(event, now_s)
            case LauncherError():
                self.state.on_refused(event.name, event.error, now_s)
            case ProcessWaiting():
                self.state.on_waiting(event.name, event.reason, now_s)
            case Nodes():
                self.state.on_nodes(event, now_s, self.host.wall_s())
            case _:
                pass
        self._draining.set()
        self.wake()

    def _adopt(self, event: Processes, now_s: float) -> None:
        state = SystemState(self._run_directory.config, now_s)
        state.rollouts.restore(self._run_directory.rollouts, now_s)
        if self._nodes is not None:
            state.on_nodes(self._nodes, now_s, self.host.wall_s())
        state.adopt(event.processes, now_s)
        self.state = state
        self.listen(f"{self._run_directory.path}/{CONTROLLER_SOCKET}")
        if self.is_stopping or self._run_directory.is_ending:
            self.is_stopping = True
            self._begin_drain(state)
            return
        for gateway_id in state.gateway.pairs:
            self._probe_gateway(gateway_id)
        if self._run_directory.metrics.sources:
            self._read_metrics()
        self._tick()

    def _read_metrics(self) -> None:
        assert self.state is not None
        self._metrics.want(self.state.config)
        self._metrics.read_now()
        self.after(READ_PERIOD_S, self._read_metrics, "metrics")

    def _probe_gateway(self, gateway_id: str) -> None:
        assert self.state is not None
        if self.is_stopping:
            return
        now_s = self.host.now_s()
        pair = self.state.gateway.pairs[gateway_id]
        has_answered = self._probe(pair.haproxy.name)
        if self._probe(pair.relay.name):
            pair.relay.heard_s = now_s
        if has_answered != pair.has_answered:
            self.wake()
        self.state.gateway.on_probe(gateway_id, has_answered, now_s)
        self.after(PROBE_S, lambda: self._probe_gateway(gateway_id), "probe")

    # ---- the end

    def terminate(self) -> None:
        """SIGTERM: drain, as soon as it knows what runs; before it could ask, end at once."""
        if self._launcher is None:
            self.exit(-15)
        else:
            self._stop()

    def shut_down(self) -> bool:
        """`headrace down`. False: it is not there yet."""
        if self.state is None:
            return False
        self._run_directory.is_ending = True
        self._stop()
        return True

    def _stop(self) -> None:
        if not self.is_stopping:
            self.is_stopping = True
            if self.state is not None:
                self._begin_drain(self.state)

    def _begin_drain(self, state: SystemState) -> None:
        """Let the real drain run, on a loop of this process."""
        self._note("controller: drains")
        if self._next_tick is not None:
            self._next_tick.cancel()
            self._next_tick = None
        loop = ProcessLoop(self)
        self.loop = loop.as_loop()
        loop.create_task(self._drain(state))

    async def _drain(self, state: SystemState) -> None:
        assert self._launcher is not None
        await drain(LauncherEnd(self._launcher), state, self._draining, self.host)
        self.exit(0)

    # ---- ticks

    def wake(self) -> None:
        """Tick now, or as soon as the last tick is over."""
        if self._next_tick is not None:
            self._next_tick.cancel()
            delay_s = max(0.0, self._ticked_s + MIN_TICK_GAP_S - self.timeline.now_s)
            self._next_tick = self.after(delay_s, self._tick, "controller tick")

    def _tick(self) -> None:
        assert self.state is not None
        self._ticked_s = self.timeline.now_s
        self._next_tick = self.after(TICK_S, self._tick, "controller tick")
        now_s = self.host.now_s()
        self._tend_gateway(self.state, now_s)
        self.state.metrics = {name: self._metrics.readings(name) for name in self.state.config.endpoints}
        for action in self._plan(self.state, now_s):
            self._act(self.state, action)
        self._announce(self.state, now_s)

    def _act(self, state: SystemState, action: Action) -> None:
        name = action.replica_id
        match action:
            case StartReplica(endpoint=endpoint, is_standby=is_standby, gateway_id=gateway_id):
                config, path = state.config_of(action), Path(self._run_directory.path)
                if gateway_id:
                    spec = durable_process(config, endpoint, name, gateway_id, path)
                else:
                    spec = replica_process(config, endpoint, name, path, is_standby)
                self._order(StartProcess(spec))
            case StopReplica(grace_s=grace_s):
                self._order(StopProcess(name, grace_s + STOP_MARGIN_S if grace_s > 0 else 0.0))
            case PromoteReplica():
                self._connections.set_sleep(name, 0)
            case RestReplica():
                self._connections.set_sleep(name, 1)

    def _announce(self, state: SystemState, now_s: float) -> None:
        """Tell fronts and routers what changed, and keep what a restarted controller must know."""
        for note in state.notes:
            self._note(f"controller: {note}")
        state.notes.clear()
        self._connections.send_siblings(state.siblings(), now_s)
        self._connections.send_leaving(state.leaving(), now_s)
        self._connections.send_outlooks(state.outlooks(now_s), now_s)
        if state.traffic(now_s) != self._told_traffic:
            self._tell_routers(state)
        self._run_directory.rollouts = state.rollouts.keep()

    def _specs(self, state: SystemState) -> dict[str, GatewaySpec]:
        traffic = state.traffic(self.host.now_s())
        return gateway_specs(state.config, Path(self._run_directory.path), traffic=traffic)

    def _tell_routers(self, state: SystemState) -> None:
        self._told_traffic = state.traffic(self.host.now_s())
        self._connections.send_specs(self._specs(state))

    def _order(self, command: StartProcess | StopProcess) -> None:
        assert self._launcher is not None
        assert not self.is_stopping, f"it drains, and orders {command}"
        self._launcher.send(command)

    def _tend_gateway(self, state: SystemState, now_s: float) -> None:
        state.gateway.on_tick(now_s)
        for essential in state.gateway.hung(now_s):
            self._stop_essential(essential, 0.0)
        for essential, grace_s in state.depart(now_s):
            self._note(f"controller: {essential.name} leaves its node within {grace_s:.0f} s")
            self._stop_essential(essential, grace_s)
        for essential in state.gateway.due(now_s):
            essential.on_start(now_s)
            self._order(StartProcess(ProcessSpec(essential.name, [])))

    def _stop_essential(self, essential: Essential, grace_s: float) -> None:
        essential.is_stopping = True
        self._order(StopProcess(essential.name, grace_s))

    # ---- reports

    def _on_report(self, end: End, message: LoadReport | Demand) -> None:
        assert self.state is not None
        now_s = self.host.now_s()
        if isinstance(message, LoadReport):
            slot = self.state.fleet_of(message.replica_id).slots.get(message.replica_id)
            if slot is not None:
                self._connections.add_front(message.replica_id, _as_channel(end))
            before = slot.report.state if slot is not None and slot.report is not None else None
            self.state.on_report(message, now_s)
            end.send(ReportAck(message.sequence, is_released=True))
            if before != message.state:
                self.wake()
            return
        is_known = message.router_id in self.state.gateway.pairs
        if is_known and self._connections.add_router(message.router_id, _as_channel(end)):
            end.send(self._specs(self.state)[message.router_id])
        self.state.gateway.on_demand(message, now_s)
        if any(endpoint.num_held for endpoint in message.endpoints):
            self.wake()

    def _on_report_close(self, end: End) -> None:
        self._connections.remove(_as_channel(end))

    # ---- the user

    def scale(self, endpoint: str, count: int) -> bool:
        """`headrace scale`. False: it was refused."""
        return self._change(lambda state: state.scale(endpoint, count))

    def apply(self, config: Config) -> bool:
        """`headrace apply`."""
        return self._change(lambda state: state.apply(config, self.host.now_s()))

    def change_rollout(self, command: ChangeRollout) -> bool:
        """`headrace rollout`."""
        return self._change(lambda state: state.change_rollout(command, self.host.now_s()))

    def _change(self, change: Callable[[SystemState], object]) -> bool:
        state = self.state
        if state is None:
            return False
        try:
            change(state)
        except ConfigError:
            return False
        self._metrics.want(state.config)
        self._run_directory.config = state.config
        self._run_directory.rollouts = state.rollouts.keep()
        self._tell_routers(state)
        self.wake()
        return True

    def set_sleep(self, replica_id: str, level: Literal[0, 1, 2]) -> bool:
        """`headrace sleep` and `wake`."""
        state = self.state
        if state is None or replica_id not in state.fleet.slots:
            return False
        if not self._connections.set_sleep(replica_id, level):
            return False
        state.fleet.rest(replica_id, is_asleep=level > 0)
        return True


class LauncherEnd(Launcher):
    """The launcher of a controller that drains: its connection to the supervisor."""

    def __init__(self, end: End) -> None:
        self._end = end

    def start(self, spec: ProcessSpec) -> None:
        raise AssertionError(f"it drains, and starts {spec.name}")

    def stop(self, name: str, grace_s: float) -> None:
        self._end.send(StopProcess(name, grace_s))

    def list_processes(self) -> None:
        self._end.send(ListProcesses())

    async def next_event(self) -> LauncherEvent:
        raise NotImplementedError("events come by themselves here")

    def close(self) -> None:
        """The connection is the controller's."""


def _as_channel(end: End) -> Channel:
    """An end has what connections use of a channel: `send`, and being itself."""
    return cast(Channel, end)
