"""The front's view of its engine, as `replica.engine_client` has it, on virtual time.

Owns the engine's state, its restarts (by the real policy) and its sleep. What becomes of a stream whose
engine is lost is the stream's own business. Must not know HTTP, clients or other replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from headrace.api.messages import (
    Abort,
    Drain,
    EngineCommand,
    EngineEvent,
    EngineFailed,
    EngineLoad,
    EngineReady,
    EngineSpec,
    EngineStarting,
    GenerationRequest,
    Sleep,
    StepBatch,
    StepOutput,
    Submit,
    Wake,
)
from headrace.replica.engine_client import EngineState, EngineTimeLimits
from headrace.replica.prefix_digest import PrefixDigest
from headrace.replica.restart import EngineEnd, RestartPolicy
from headrace.sim.engines import EngineBehaviour, EngineProcess
from headrace.sim.machine import Process
from headrace.sim.network import Connection, End, Weather


class EngineStream(Protocol):
    """One generation in an engine, as its owner sees it."""

    def on_output(self, output: StepOutput) -> None: ...

    def on_engine_lost(self, reason: str) -> None: ...


class EngineLink:
    """Keeps one engine process alive, and knows which generations are in it."""

    def __init__(
        self,
        front: Process,
        weather: Weather,
        spec: EngineSpec,
        behaviour: EngineBehaviour,
        digest: PrefixDigest,
        on_change: Callable[[], None],
    ) -> None:
        self._front = front
        self._weather = weather
        self._spec = spec
        self._behaviour = behaviour
        self._digest = digest
        self._on_change = on_change
        self._policy = RestartPolicy()
        self._limits = EngineTimeLimits(silence_s=20.0, start_phase_s=120.0)
        self._streams: dict[str, EngineStream] = {}
        self._end: End | None = None
        self._ready_at_s: float | None = None
        self._last_event_s = front.host.now_s()
        self._error = ""
        self._is_retryable_end = True
        self._is_sleep_wanted = spec.is_standby
        self._sleep_done: Callable[[str], None] | None = None
        self._sleep_level_wanted = 0
        self.process: EngineProcess | None = None
        self.state: EngineState = "starting"
        self.phase = "starting the engine"
        self.info: EngineReady | None = None
        self.load: EngineLoad | None = None
        self.num_restarts = 0
        self.restarts_s: list[float] = []
        """True times of the restarts, for the checks."""
        self.last_error = ""
        self.is_retryable = True

    @property
    def num_requests(self) -> int:
        return len(self._streams)

    @property
    def sleep_level(self) -> int:
        return 0 if self.load is None else self.load.sleep_level

    # ---- requests

    def submit(self, request: GenerationRequest, stream: EngineStream) -> None:
        """Hand a generation to the engine, which is ready."""
        assert self.state == "ready", f"submitted while {self.state}"
        assert request.request_id not in self._streams, f"{request.request_id} is in use"
        self._streams[request.request_id] = stream
        self._send(Submit(request))

    def abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._send(Abort(request_id))
            self._digest.on_abort(request_id)

    def has_request(self, request_id: str) -> bool:
        return request_id in self._streams

    # ---- life

    def start(self) -> None:
        """Start the engine and keep it alive until `stop`."""
        self._start_process()
        self._front.after(self._limits.check_s, self._check_silence, "engine watch")

    def stop(self) -> None:
        """Let it go: it drains, and is killed two seconds later."""
        self.state = "stopped"
        process = self.process
        if process is not None:
            self._send(Drain())
            process.terminate()
            self._front.after(2.0, process.kill, "engine kill")

    def set_sleep(self, level: int, done: Callable[[str], None]) -> None:
        """Put the engine to sleep (1, 2) or wake it (0); `done` gets why it could not be, or nothing."""
        assert self._sleep_done is None, "one change of sleep at a time"
        if self.state not in ("ready", "asleep") or self.process is None:
            done(f"the engine is {self.state}")
            return
        if level and self._streams:
            done(f"it cannot sleep: {len(self._streams)} requests are open")
            return
        self._set_state("asleep", f"falling asleep to level {level}" if level else "waking")
        self._sleep_done, self._sleep_level_wanted = done, level
        self._send(Sleep(1 if level == 1 else 2) if level else Wake())

    def _start_process(self) -> None:
        if self.state in ("stopped", "failed"):
            return
        front = self._front
        self._ready_at_s = None
        self._error, self._is_retryable_end = "", True
        self._last_event_s = front.host.now_s()
        spec = msgspec.structs.replace(self._spec, is_standby=self._is_sleep_wanted)
        process = EngineProcess(
            front.registry, f"engine {front.name}", front.host, spec, self._behaviour
        )
        self.process = process
        process.on_exit = self._on_exit
        connection = Connection(front.registry, self._weather, front, process)
        self._end = connection.ends[0]
        self._end.on_message = lambda event: self._on_event(event, process)
        self._end.on_close = lambda: self._on_lost("the engine process ended")
        process.begin(connection.ends[1])

    def _check_silence(self) -> None:
        self._front.after(self._limits.check_s, self._check_silence, "engine watch")
        limit_s = self._limits.start_phase_s if self._ready_at_s is None else self._limits.silence_s
        now_s = self._front.host.now_s()
        if self.process is not None and now_s - self._last_event_s > limit_s:
            self._last_event_s = now_s
            self._error = f"the engine said nothing for {limit_s:g} s"
            self.process.kill()

    def _send(self, command: EngineCommand) -> None:
        if self._end is not None:
            self._end.send(command)

    def _set_state(
        self, state: EngineState, phase: str, error: str | None = None, is_retryable: bool = True
    ) -> None:
        if self.state == "stopped":
            return
        self.state, self.phase = state, phase
        if error is not None:
            self.last_error, self.is_retryable = error, is_retryable
        self._on_change()

    # ---- what the process tells

    def _on_event(self, event: EngineEvent, process: EngineProcess) -> None:
        if process is not self.process:
            return
        self._last_event_s = self._front.host.now_s()
        match event:
            case StepBatch():
                self._hand_out(event)
            case EngineStarting(phase):
                self._set_state("starting", phase)
            case EngineReady():
                self.info = event
                self._ready_at_s = self._front.host.now_s()
                self._digest.on_ready(event.block_size)
                self.load = EngineLoad(sleep_level=event.sleep_level)
                self._set_state("asleep" if event.sleep_level else "ready", "")
            case EngineFailed(error, retryable):
                self._error, self._is_retryable_end = error, retryable

    def _hand_out(self, batch: StepBatch) -> None:
        self.load = batch.load
        self._follow_sleep()
        self._digest.on_step(batch)
        for output in batch.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # aborted while this step ran
            if output.finish_reason is not None:
                del self._streams[output.request_id]
            stream.on_output(output)

    def _follow_sleep(self) -> None:
        load = self.load
        if load is None or self.state not in ("ready", "asleep"):
            return
        done = self._sleep_done
        if done is not None:
            wanted = self._sleep_level_wanted
            is_reached = load.sleep_level >= wanted if wanted else load.sleep_level == 0
            if not load.sleep_error and not is_reached:
                return
            self._sleep_done = None
        state: EngineState = "asleep" if load.sleep_level else "ready"
        self._is_sleep_wanted = state == "asleep"
        if state != self.state or done is not None:
            self._set_state(state, f"asleep at level {load.sleep_level}" if load.sleep_level else "")
        if done is not None:
            done(load.sleep_error)

    def _on_lost(self, reason: str) -> None:
        error = self._error = self._error or reason
        if self.state in ("ready", "asleep"):
            self._set_state("starting", "restarting the engine", error)
        done, self._sleep_done = self._sleep_done, None
        if done is not None:
            done(error)
        self.load = None
        self._digest.on_lost()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.on_engine_lost(error)

    def _on_exit(self, process: Process, code: int) -> None:
        self._front.run(lambda: self._after_exit(process, code))

    def _after_exit(self, process: Process, code: int) -> None:
        """The child was reaped; its socket may still hold its last words, which are read first."""
        if self._end is not None and self._end.is_open:
            self._front.after(0.01, lambda: self._after_exit(process, code), "engine exit")
            return
        if process is not self.process:
            return
        self.process = None
        if self.state in ("stopped", "failed"):
            self._on_change()
            return
        error = self._error or f"exited with {code}"
        end = EngineEnd(self._front.host.now_s(), self._ready_at_s, error, self._is_retryable_end)
        decision = self._policy.decide(end)
        if decision.delay_s is None:
            self._set_state("failed", "", error=error, is_retryable=self._is_retryable_end)
            return
        self.num_restarts += 1
        self.restarts_s.append(self._front.timeline.now_s)
        self._set_state("starting", "restarting the engine", error=error)
        self._front.after(decision.delay_s, self._start_process, "engine restart")
