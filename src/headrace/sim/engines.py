"""The engine process of a replica, on virtual time: the real engine in the real loop, without a process.

Owns start, heartbeat, crash and hang of an engine, and how long its steps take. Must not know streams or
HTTP. An engine is one thread: while a step runs nothing is read, and what a step gives leaves at its end.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

from headrace.api.messages import EngineCommand, EngineEvent, EngineFailed, EngineSpec, EngineStarting
from headrace.engine.channel import FrontChannel
from headrace.engine.fake_runner import FakeRunner
from headrace.engine.native import NativeEngine
from headrace.engine.process import HEARTBEAT_S, DrainSignal, EngineLoop
from headrace.engine.protocol import StepInput
from headrace.engine.simulated import SimulatedEngine
from headrace.sim.answers import FAKE_VOCABULARY
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.network import End
from headrace.sim.timeline import Timer

PHASES = ("finding the model", "mapping weights", "computing the first step")
NUM_BLOCKS = 96
CHECK_EVERY = 4
"""Steps between two looks at every block of an engine's pool."""


@dataclass(frozen=True, slots=True)
class EngineBehaviour:
    """What this version's engines do in this world."""

    start_s: float = 2.0
    """Mean time from start to ready."""
    crashes_at_start: bool = False
    is_hopeless: bool = False
    """With crashes_at_start: it says that starting again cannot help."""
    step_factor: float = 1.0
    """How much slower than the config says its steps are."""


class EngineClock:
    """The machine's clock, ahead by what the step that runs has taken so far."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.ahead_s = 0.0

    def now_s(self) -> float:
        return self._host.now_s() + self.ahead_s

    def now_ns(self) -> int:
        return round(self.now_s() * 1e9)

    def wall_s(self) -> float:
        return self._host.wall_s() + self.ahead_s

    def sleep(self, seconds: float) -> None:
        self.ahead_s += seconds


class TimedRunner(FakeRunner):
    """A runner whose steps take time: a fixed part, a part per token, and a part per token of context."""

    def __init__(self, spec: EngineSpec, clock: EngineClock) -> None:
        super().__init__(NUM_BLOCKS, spec.block_size, FAKE_VOCABULARY, 1024)
        self._spec = spec
        self._clock = clock

    def execute(self, batch: StepInput) -> Any:
        spec = self._spec
        num_tokens = len(batch.token_ids_T)
        context = int(batch.context_lengths_R.sum())
        self._clock.sleep(spec.simulated_step_s + num_tokens * 1e-4 + context * 1e-6)
        return super().execute(batch)


class _Drain(DrainSignal):
    """SIGTERM without a signal."""

    def __init__(self) -> None:
        self.is_set = False
        self.is_starting = False

    def clear_wakeup(self) -> None:
        """There is no descriptor to empty."""


class _Channel(FrontChannel):
    """What came, and what is to be sent when the step that runs has ended."""

    def __init__(self) -> None:
        self.commands: list[EngineCommand] = []
        self.events: list[EngineEvent] = []

    def receive(self, timeout_s: float) -> list[EngineCommand]:
        commands, self.commands = self.commands, []
        return commands

    def send(self, event: EngineEvent) -> None:
        self.events.append(event)


class EngineProcess(Process):
    """One engine process, from its start to its end. It dies with its front."""

    def __init__(
        self, registry: Registry, name: str, host: Host, spec: EngineSpec, behaviour: EngineBehaviour
    ) -> None:
        super().__init__(registry, name, host)
        self._spec = spec
        self._behaviour = behaviour
        self._clock = EngineClock(host)
        self._drain = _Drain()
        self._channel = _Channel()
        self._loop: EngineLoop | None = None
        self._is_in_step = False
        self._next_turn: Timer | None = None
        self._num_turns = self._checked_at = 0
        self.engine: SimulatedEngine | NativeEngine | None = None
        self.end: End | None = None

    def begin(self, end: End) -> None:
        """`end`: its side of the socket pair that its front made."""
        self.end = end
        end.on_message = self._on_command
        end.on_close = lambda: self.exit(0)  # the front is gone: nobody is left to compute for
        behaviour = self._behaviour
        total_s = behaviour.start_s * self.random.uniform(0.6, 1.8)
        share_s = total_s / len(PHASES)
        for index, phase in enumerate(PHASES):
            self.after(index * share_s, lambda p=phase: self._tell_phase(p), "engine start")  # type: ignore[misc]
        if behaviour.crashes_at_start:
            self.after(total_s * self.random.random(), self._crash, "engine start")
        else:
            self.after(total_s, self._become_ready, "engine start")

    def terminate(self) -> None:
        """SIGTERM: drain; while it starts, end at once."""
        if self._loop is None:
            self.exit(0)
        else:
            self._drain.is_set = True
            self._want_turn()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is accounted for. Looks every few steps."""
        if self.engine is not None and self._num_turns >= self._checked_at + CHECK_EVERY:
            self._checked_at = self._num_turns
            self.engine.check_integrity()

    # ---- start

    def _tell_phase(self, phase: str) -> None:
        assert self.end is not None
        self.end.send(EngineStarting(phase, 0.0))

    def _crash(self) -> None:
        assert self.end is not None
        if self._behaviour.is_hopeless:
            self.end.send(EngineFailed("this version's weights do not fit", retryable=False))
        self.exit(1)

    def _become_ready(self) -> None:
        assert self.end is not None
        self.engine = engine = self._build()
        if self._spec.is_standby:
            engine.sleep(1)
        self.end.send(engine.describe())
        self._loop = EngineLoop(engine, self._channel, self._drain, self._clock)
        self._want_turn()

    def _build(self) -> SimulatedEngine | NativeEngine:
        clock = self._clock
        if self._spec.kind == "simulated":
            return SimulatedEngine(self._spec, clock, clock.sleep)
        return NativeEngine(self._spec, TimedRunner(self._spec, clock), clock)

    # ---- steps

    def _on_command(self, command: EngineCommand) -> None:
        self._channel.commands.append(command)
        self._want_turn()

    def _want_turn(self, delay_s: float = 0.0) -> None:
        """Take a turn soon. One that was to come later comes now."""
        if self._loop is None or self._is_in_step:
            return
        if self._next_turn is not None:
            self._next_turn.cancel()
        self._next_turn = self.after(delay_s, self._turn, "engine turn")

    def _turn(self) -> None:
        """Read, compute one step, and be busy for as long as it takes."""
        assert self._loop is not None
        self._next_turn = None
        self._num_turns += 1
        with _quiet_stderr() if self._channel.commands else contextlib.nullcontext():
            goes_on = self._loop.turn()
        if not goes_on:
            self.exit(0)
            return
        taken_s, self._clock.ahead_s = self._clock.ahead_s * self._behaviour.step_factor, 0.0
        if taken_s > 0:
            self._is_in_step = True
            self.after(taken_s, self._end_step, "engine step")
        else:
            self._end_step()

    def _end_step(self) -> None:
        assert self.end is not None
        assert self.engine is not None
        self._is_in_step = False
        events, self._channel.events = self._channel.events, []
        for event in events:
            self.end.send(event)
        is_busy = self.engine.has_work() or self._drain.is_set or bool(self._channel.commands)
        self._want_turn(0.0 if is_busy else HEARTBEAT_S)


def _quiet_stderr() -> contextlib.AbstractContextManager[object]:
    """The loop prints changes of sleep."""
    return contextlib.redirect_stderr(io.StringIO())
