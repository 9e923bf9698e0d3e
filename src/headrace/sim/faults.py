"""Breaks a world as its scenario says, and mends it at the end.

Owns what each kind of fault does and to whom. Must not know what should follow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from headrace.api.config import Config
from headrace.api.endpoint_config import Endpoint
from headrace.api.messages import ChangeRollout
from headrace.sim.controller import ControllerProcess
from headrace.sim.front import FrontProcess
from headrace.sim.machine import Process
from headrace.sim.network import Connection
from headrace.sim.node_faults import NodeFaults
from headrace.sim.scenario import Fault, FaultKind

if TYPE_CHECKING:
    from headrace.sim.world import World

CALM_LATENCY_S = 0.0003
STEERING: tuple[Literal["pause", "resume", "promote", "undo"], ...] = ("pause", "resume", "promote", "undo")
MENDED_AFTER_S = 240.0
"""A version that cannot start is to be taken back by itself; only where there is none before it, the user
must help: then this long after the faults."""


class Breaker:
    """Lets faults happen."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.counts: Counter[str] = Counter()
        self._num_versions = 0
        self._acts: dict[FaultKind, Callable[[Fault], str]] = {
            "engine killed": self._kill_engine,
            "engine hung": self._hang_engine,
            "engine paused": lambda fault: self._pause(fault, self._engines()),
            "front killed": lambda fault: self._kill(fault, self._fronts()),
            "front paused": lambda fault: self._pause(fault, self._fronts()),
            "router killed": lambda fault: self._kill(fault, self._living(world.routers.values())),
            "router paused": lambda fault: self._pause(fault, self._living(world.routers.values())),
            "relay killed": lambda fault: self._kill(fault, self._living(world.relays.values())),
            "durable front killed": lambda fault: self._kill(fault, self._living(world.durable.values())),
            "durable front paused": lambda fault: self._pause(fault, self._living(world.durable.values())),
            "haproxy killed": lambda fault: self._kill(fault, self._living(world.haproxies.values())),
            "controller killed": lambda fault: self._kill(fault, self._controllers()),
            "controller paused": lambda fault: self._pause(fault, self._controllers()),
            "host lost": self._lose_host,
            "link cut": self._cut,
            "links stalled": self._stall,
            "network slow": self._slow,
            "reports doubled": self._double,
            "clock jumped": self._jump,
            "starts refused": self._refuse_starts,
            "scaled": self._scale,
            "version applied": lambda fault: self._apply(fault, is_bad=False),
            "bad version applied": lambda fault: self._apply(fault, is_bad=True),
            "replica slept": self._sleep,
            "rollout steered": self._steer,
            "notice given": self._give_notice,
            "front refuses": self._refuse_requests,
        }
        self._acts["system ended"] = world.ending.begin
        self._acts["metric said"] = world.metrics.say
        self._nodes = NodeFaults(world)
        self._acts.update(self._nodes.acts())

    def expect(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            self._world.timeline.at(fault.at_s, lambda fault=fault: self._happen(fault), "fault")  # type: ignore[misc]

    def mend(self) -> None:
        """Faults are over: what stands still goes on, and a version that cannot start is replaced."""
        world = self._world
        world.note("faults end")
        world.weather.latency_s, world.weather.duplicate_ratio = CALM_LATENCY_S, 0.0
        world.supervisor.refusals_left = 0
        for process in self._everything():
            process.resume()
        self._nodes.mend()
        if world.ending.is_asked:
            return
        world.timeline.after(MENDED_AFTER_S, self._mend_version, "mend")
        self._wake_all()

    def _wake_all(self) -> None:
        """The user wakes what the user put to sleep, until all is as wanted: an engine that was lost
        meanwhile comes back asleep, and only then does its controller know."""
        controllers = self._controllers()
        state = controllers[0].state if controllers else None
        if state is not None:
            for slot in state.fleet.slots.values():
                if slot.role == "resting":
                    controllers[0].set_sleep(slot.replica_id, 0)
        if state is None or not state.is_ready(controllers[0].host.now_s()):
            self._world.timeline.after(1.0, self._wake_all, "mend")

    def _mend_version(self) -> None:
        """The user applies a good version, as soon as a controller listens."""
        world = self._world
        config = world.run_directory.config
        bad = {name: e for name, e in config.endpoints.items() if e.model.startswith("bad")}
        if not bad:
            return
        self._num_versions += 1
        changes = {
            name: e.model_copy(update={"model": f"good-{self._num_versions}"}) for name, e in bad.items()
        }
        fixed = config.model_copy(update={"endpoints": {**config.endpoints, **changes}})
        controllers = self._controllers()
        if not controllers or not controllers[0].apply(fixed):
            world.timeline.after(1.0, self._mend_version, "mend")

    def _happen(self, fault: Fault) -> None:
        what = self._acts[fault.kind](fault)
        if what:
            self.counts[fault.kind] += 1
            self._world.note(
                f"FAULT {fault.kind}: {what}" + (f" for {fault.duration_s:.2f} s" if fault.duration_s else "")
            )

    # ---- whom

    def _living(self, processes: Iterable[Process]) -> list[Process]:
        return [process for process in processes if process.is_alive]

    def _fronts(self) -> list[FrontProcess]:
        return [front for front in self._world.fronts.values() if front.is_alive]

    def _engines(self) -> list[Process]:
        engines = [front.engine.child for front in self._fronts()]
        return [engine for engine in engines if engine is not None and engine.is_alive]

    def _controllers(self) -> list[ControllerProcess]:
        controller = self._world.controller
        return [controller] if controller is not None and controller.is_alive else []

    def _everything(self) -> list[Process]:
        world = self._world
        return [*world.supervisor.children.values(), *self._engines()]

    # ---- what

    def _kill(self, fault: Fault, processes: Sequence[Process]) -> str:
        if not processes:
            return ""
        victim = processes[int(fault.pick * len(processes))]
        victim.kill()
        return repr(victim)

    def _pause(self, fault: Fault, processes: Sequence[Process]) -> str:
        if not processes:
            return ""
        victim = processes[int(fault.pick * len(processes))]
        if victim.is_paused:
            return ""
        victim.pause()
        self._world.timeline.after(fault.duration_s, victim.resume, "resume process")
        return repr(victim)

    def _kill_engine(self, fault: Fault) -> str:
        return self._kill(fault, self._engines())

    def _hang_engine(self, fault: Fault) -> str:
        engines = self._engines()
        if not engines:
            return ""
        victim = engines[int(fault.pick * len(engines))]
        victim.pause()
        return repr(victim)

    def _lose_host(self, fault: Fault) -> str:
        hosts = self._world.hosts[1:]
        host = hosts[int(fault.pick * len(hosts))]
        victims = [front for front in self._fronts() if front.host is host]
        for victim in victims:
            victim.kill()
        return f"{host.name} with {len(victims)} replicas" if victims else ""

    def _connections(self) -> list[Connection]:
        found: dict[Connection, None] = {}
        for process in self._everything():
            for thing in process.held:
                if isinstance(thing, Connection) and not self._is_local(thing):
                    found[thing] = None
        return list(found)

    def _is_local(self, connection: Connection) -> bool:
        """A socket pair, or the supervisor's: those have no network between them."""
        names = [end.process.name for end in connection.ends]
        return "supervisor" in names or any(name.startswith("engine ") for name in names)

    def _cut(self, fault: Fault) -> str:
        connections = self._connections()
        if not connections:
            return ""
        victim = connections[int(fault.pick * len(connections))]
        late_s = 5.0 * max(0.0, fault.amount - 0.5)
        victim.cut((0.0, late_s) if fault.amount < 0.75 else (late_s, 0.0))
        return repr(victim)

    def _stall(self, fault: Fault) -> str:
        fronts = self._fronts()
        if not fronts:
            return ""
        victim = fronts[int(fault.pick * len(fronts))]
        for thing in victim.held:
            if isinstance(thing, Connection) and not self._is_local(thing):
                thing.stall(fault.duration_s)
        return f"all connections of {victim!r}"

    def _slow(self, fault: Fault) -> str:
        weather = self._world.weather
        weather.latency_s = 0.002 * 150.0**fault.amount
        text = f"{weather.latency_s * 1000:.1f} ms per message"

        def end() -> None:
            weather.latency_s = CALM_LATENCY_S

        self._world.timeline.after(fault.duration_s, end, "weather")
        return text

    def _double(self, fault: Fault) -> str:
        weather = self._world.weather
        weather.duplicate_ratio = 0.3

        def end() -> None:
            weather.duplicate_ratio = 0.0

        self._world.timeline.after(fault.duration_s, end, "weather")
        return "reports"

    def _jump(self, fault: Fault) -> str:
        hosts = self._world.hosts
        host = hosts[int(fault.pick * len(hosts))]
        host.jump(20.0 * fault.amount**3)
        return f"{host.name} by {20.0 * fault.amount**3:.2f} s"

    def _refuse_starts(self, fault: Fault) -> str:
        self._world.supervisor.refusals_left = 1 + int(3 * fault.amount)
        return f"the next {self._world.supervisor.refusals_left}"

    def _endpoint(self, fault: Fault) -> tuple[str, Endpoint]:
        endpoints = self._world.run_directory.config.endpoints
        names = list(endpoints)
        name = names[int(fault.pick * len(names))]
        return name, endpoints[name]

    def _scale(self, fault: Fault) -> str:
        name, endpoint = self._endpoint(fault)
        count = int(fault.amount * (endpoint.replicas.max + 1))
        controllers = self._controllers()
        if not controllers or not controllers[0].scale(name, count):
            return ""
        return f"{name} to {count}"

    def _apply(self, fault: Fault, *, is_bad: bool) -> str:
        name, endpoint = self._endpoint(fault)
        self._num_versions += 1
        if is_bad:
            model = f"bad-{self._num_versions}" + ("-hopeless" if fault.amount < 0.3 else "")
        elif fault.amount < 0.4:
            model = endpoint.model  # the same answers from other settings
        else:
            model = f"{'slow' if fault.amount > 0.9 else 'good'}-{self._num_versions}"
        native = endpoint.native.model_copy(update={"max_running": 2 + self._num_versions % 7})
        changed = endpoint.model_copy(update={"model": model, "native": native})
        config: Config = self._world.run_directory.config
        endpoints = {**config.endpoints, name: changed}
        controllers = self._controllers()
        if not controllers or not controllers[0].apply(config.model_copy(update={"endpoints": endpoints})):
            return ""
        return f"{name} is {model} now"

    def _steer(self, fault: Fault) -> str:
        name, _ = self._endpoint(fault)
        action = STEERING[int(fault.amount * len(STEERING))]
        controllers = self._controllers()
        if not controllers or not controllers[0].change_rollout(ChangeRollout(name, action)):
            return ""
        return f"{action} {name}"

    def _give_notice(self, fault: Fault) -> str:
        fronts = [front for front in self._fronts() if front.view.address and not front.is_paused]
        if not fronts:
            return ""
        victim = fronts[int(fault.pick * len(fronts))]
        left_s = 0.5 + 20.0 * fault.amount
        victim.run(lambda: victim.on_notice(left_s))
        self._world.timeline.after(left_s, victim.kill, "machine goes")
        return f"{victim!r} has {left_s:.1f} s"

    def _refuse_requests(self, fault: Fault) -> str:
        fronts = self._fronts()
        if not fronts:
            return ""
        victim = fronts[int(fault.pick * len(fronts))]
        victim.refuses_until_s = max(victim.refuses_until_s, victim.timeline.now_s + fault.duration_s)
        return repr(victim)

    def _sleep(self, fault: Fault) -> str:
        controllers, fronts = self._controllers(), self._fronts()
        if not controllers or not fronts:
            return ""
        victim = fronts[int(fault.pick * len(fronts))]
        level: Literal[0, 1, 2] = 0 if fault.amount < 0.4 else 1 if fault.amount < 0.8 else 2
        if not controllers[0].set_sleep(victim.name, level):
            return ""
        return f"{victim.name} to level {level}"
