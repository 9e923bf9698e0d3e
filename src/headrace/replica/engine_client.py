"""The front's engine: submits requests, hands out each step's outputs, and keeps an engine process alive.

Owns which requests are in the engine, its state, and restarts. What becomes of a request whose engine is
lost is the stream's own business (`on_engine_lost`). Must not know text or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from headrace.api.messages import (
    PROTOCOL_VERSION,
    Abort,
    Drain,
    EngineEvent,
    EngineFailed,
    EngineLoad,
    EngineReady,
    EngineSpec,
    EngineStarting,
    GenerationRequest,
    KvPlace,
    Sleep,
    StepBatch,
    Submit,
    Wake,
)
from headrace.clock import Clock
from headrace.errors import Overloaded
from headrace.replica.aborted_ids import AbortedIds
from headrace.replica.engine_process import EngineProcess
from headrace.replica.engine_silence import EngineTimeLimits, SilenceWatch
from headrace.replica.engine_users import CacheWatcher, EngineStream
from headrace.replica.kept_memory import KeptMemory, can_keep
from headrace.replica.restart import START_HOLD_S, START_HOLD_TICK_S, EngineEnd, RestartPolicy
from headrace.replica.sleep_change import SleepChange, sleep_phase

_log = logging.getLogger(__name__)
EngineState = Literal["starting", "ready", "asleep", "failed", "stopped"]


class EngineClient:
    """Talks to the one engine process of this replica. `on_change` is called after each change of state."""

    def __init__(
        self,
        spec: EngineSpec,
        title: str,
        clock: Clock,
        on_change: Callable[[], None],
        time_limits: EngineTimeLimits | None = None,
        restart_policy: RestartPolicy | None = None,
        cache_watcher: CacheWatcher | None = None,
        is_untimely: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_untimely`: whether a new engine would disturb those that go on with the last one's work."""
        self._spec = spec
        self._title = title
        self._clock = clock
        self._on_change = on_change
        self._time_limits = time_limits or EngineTimeLimits()
        self._restart_policy = restart_policy or RestartPolicy()
        self._cache_watcher = cache_watcher
        self._is_untimely = is_untimely
        self._is_sleep_wanted = spec.is_standby
        self.kv_memory = KeptMemory(can_keep(spec))
        self._streams: dict[str, EngineStream] = {}
        self._aborted = AbortedIds()
        self._process: EngineProcess | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._settled = asyncio.Event()
        """It is not starting: it is there, or never will be."""
        self._ready_at_s: float | None = None
        self._silence = SilenceWatch(spec, self._time_limits, clock.now_s())
        self._error = ""
        self._is_retryable_end = True
        self._sleep_change: SleepChange | None = None
        self.state: EngineState = "starting"
        self.phase = "starting the engine"
        self.info: EngineReady | None = None
        self.load: EngineLoad | None = None
        self.num_restarts = 0
        self.last_error = ""
        self.is_retryable = True

    def __repr__(self) -> str:
        return f"EngineClient({self.state}, pid {self.pid}, {len(self._streams)} requests)"

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    @property
    def kv_place(self) -> KvPlace | None:
        """Where its keys and values can be read, now and when it is gone."""
        return self.kv_memory.place

    @property
    def num_requests(self) -> int:
        """Requests inside the engine, guests included."""
        return len(self._streams)

    @property
    def streams(self) -> Mapping[str, EngineStream]:
        """What is inside the engine, by request id."""
        return self._streams

    # ---- requests

    def submit(self, request: GenerationRequest, stream: EngineStream) -> None:
        """Hand `request` to the engine. Raises Overloaded while the engine is not ready."""
        if self.state != "ready" or self._process is None:
            raise Overloaded(self.why_not_ready(), retry_after_s=1.0)
        assert request.request_id not in self._streams, f"request id {request.request_id!r} is in use"
        self._streams[request.request_id] = stream
        self._silence.sent(len(request.prompt_token_ids) + len(request.resume_from))
        self._process.send(Submit(request))

    def abort(self, request_id: str) -> None:
        """Take a request back. Its stream hears nothing more; unknown ids are ignored."""
        if self._streams.pop(request_id, None) is not None and self._process is not None:
            self._aborted.add(request_id)
            self._process.send(Abort(request_id))
            if self._cache_watcher is not None:
                self._cache_watcher.on_abort(request_id)

    @property
    def sleep_level(self) -> int:
        """0 awake, 1 without KV memory, 2 without weights, too."""
        return 0 if self.load is None else self.load.sleep_level

    async def set_sleep(self, level: int) -> str:
        """Put the engine to sleep (1, 2) or wake it (0). Return why it could not be done; empty: it was.

        From the call on no request is taken, until it is awake. One call at a time. An engine that is being
        started is waited for, and is started anew as it then shall be.
        """
        assert self._sleep_change is None, "one change of sleep at a time"
        while self.state == "starting":
            self._is_sleep_wanted = level > 0
            await self._settled.wait()
        if self.state == "ready" and not level:
            return ""
        if self.state not in ("ready", "asleep") or self._process is None:
            return self.why_not_ready()
        if level and self._streams:
            return f"it cannot sleep: {len(self._streams)} requests are open"
        self._set_state("asleep", f"falling asleep to level {level}" if level else "waking")
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._sleep_change = SleepChange(level, done)
        self._silence.is_changing = True
        self._process.send(Sleep(1 if level == 1 else 2) if level else Wake())
        try:
            async with asyncio.timeout(self._time_limits.sleep_s):
                return await done
        except TimeoutError:
            return f"the engine did not answer within {self._time_limits.sleep_s:g} s"
        finally:
            self._sleep_change = None
            self._silence.is_changing = False
            self._follow_sleep()

    def has_request(self, request_id: str) -> bool:
        return request_id in self._streams or request_id in self._aborted

    def why_not_ready(self) -> str:
        """Say in a sentence why no request can be taken."""
        if self.state == "failed":
            return f"the engine failed and is not started again: {self.last_error}"
        if self.state == "asleep":
            return f"this replica is on standby ({self.phase}); use another one"
        return f"the engine is not ready ({self.phase or self.state}); try again shortly"

    # ---- life

    def start(self) -> None:
        """Start the engine and keep it alive until `stop`."""
        self._start_process()
        self._schedule(self._time_limits.check_s, self._check_silence)

    async def stop(self, grace_s: float) -> None:
        """Let the engine finish for `grace_s`, then kill it. Returns when it is gone."""
        self.state = "stopped"
        self._settled.set()
        for timer in self._timers:
            timer.cancel()
        for task in list(self._tasks):
            await asyncio.wait([task], timeout=grace_s)
        if self._process is None:
            self.kv_memory.close()
            return
        self._process.send(Drain())
        self._process.terminate()
        for _attempt in range(2):
            try:
                await asyncio.wait_for(self._ended.wait(), grace_s)
                return
            except TimeoutError:
                self._process.kill("it did not end in time")

    def fail(self, error: str) -> None:
        """Give up for good: another part of the replica cannot work (its tokenizer, say)."""
        self._set_state("failed", "", error=error, is_retryable=False)
        if self._process is not None:
            self._process.kill(error)

    def _start_process(self) -> None:
        self._ready_at_s = None
        self._error, self._is_retryable_end = "", True
        self._silence = SilenceWatch(self._spec, self._time_limits, self._clock.now_s())
        self._process = process = self.make_process()
        task = asyncio.get_running_loop().create_task(self._run_start(process))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def make_process(self) -> EngineProcess:
        """Return a process that is not started yet. A simulation has others."""
        return EngineProcess(self)

    async def _run_start(self, process: EngineProcess) -> None:
        try:
            # An engine that is started again is as its replica was: a woken standby stays awake.
            kv = self.kv_memory.open()
            spec = msgspec.structs.replace(self._spec, is_standby=self._is_sleep_wanted, kv_descriptor=kv)
            await process.start(spec, self._title)
        except OSError as error:
            if process.pid:
                process.kill(f"the engine's socket could not be opened: {error}")
            else:
                self.on_lost(f"the engine process could not be started: {error}")
                self.on_exit("it never ran")
        self._on_change()

    def _schedule(self, delay_s: float, callback: Callable[[], None]) -> None:
        now_s = asyncio.get_running_loop().time()
        self._timers = [t for t in self._timers if not t.cancelled() and t.when() > now_s]
        self._timers.append(asyncio.get_running_loop().call_later(delay_s, callback))

    def _check_silence(self) -> None:
        self._schedule(self._time_limits.check_s, self._check_silence)
        watch, process = self._silence, self._process
        if watch.check(self._clock.now_s()) and process is not None:
            reason = f"the engine said nothing for {watch.silent_s:.1f} s, which no step takes"
            self._silence = SilenceWatch(self._spec, self._time_limits, self._clock.now_s())
            process.kill(reason)

    def _set_state(
        self, state: EngineState, phase: str, error: str | None = None, is_retryable: bool = True
    ) -> None:
        if self.state == "stopped":
            return
        self.state, self.phase = state, phase
        if state == "starting":
            self._settled.clear()
        else:
            self._settled.set()
        if error is not None:
            self.last_error, self.is_retryable = error, is_retryable
        self._on_change()

    # ---- what the process tells

    def on_event(self, event: EngineEvent) -> None:
        now_s = self._clock.now_s()
        self._silence.heard(now_s, event.load if isinstance(event, StepBatch) else None)
        if isinstance(event, StepBatch):
            self._hand_out(event, now_s)
        elif isinstance(event, EngineStarting):
            self._set_state("starting", event.phase)
        elif isinstance(event, EngineReady):
            self._on_ready(event, now_s)
        elif isinstance(event, EngineFailed):
            self._error, self._is_retryable_end = event.error, event.retryable

    def _on_ready(self, event: EngineReady, now_s: float) -> None:
        assert self._process is not None
        if event.version != PROTOCOL_VERSION:
            self._error = f"the engine speaks protocol {event.version}, this front {PROTOCOL_VERSION}"
            self._is_retryable_end = False
            self._process.kill(self._error)
            return
        self.info = event
        self._ready_at_s = now_s
        if self._cache_watcher is not None:
            self._cache_watcher.on_ready(event.block_size)
        self.load = EngineLoad(sleep_level=event.sleep_level)
        self._silence.heard(now_s, self.load)
        self._set_state("asleep" if event.sleep_level else "ready", sleep_phase(event.sleep_level))

    def _follow_sleep(self) -> None:
        """Be in the state that the engine's last load tells of; tell whoever waits for a change."""
        load, change = self.load, self._sleep_change
        if load is None or self.state not in ("ready", "asleep"):
            return
        if change is not None:
            if not change.done.done() and (load.sleep_error or change.is_reached(load.sleep_level)):
                change.done.set_result(load.sleep_error)
            return
        state: EngineState = "asleep" if load.sleep_level else "ready"
        self._is_sleep_wanted = state == "asleep"
        phase = sleep_phase(load.sleep_level)
        if (state, phase) != (self.state, self.phase):
            self._set_state(state, phase)

    def _hand_out(self, batch: StepBatch, now_s: float) -> None:
        self.load = batch.load
        self._follow_sleep()
        if self._cache_watcher is not None:
            self._cache_watcher.on_step(batch)
        streams = self._streams
        touched: list[EngineStream] = []
        for output in batch.outputs:
            stream = streams.get(output.request_id)
            if stream is None:
                continue  # aborted while this step ran
            if output.finish_reason is not None:
                del streams[output.request_id]
            try:
                if stream.on_output(output, now_s):
                    touched.append(stream)
            except Exception:
                _log.exception("request %s: handling a step's output failed", output.request_id)
                self.abort(output.request_id)
                stream.on_broken()
        for stream in touched:
            stream.flush()

    def on_lost(self, reason: str) -> None:
        error = self._error or reason
        self._error = error
        if self.state in ("ready", "asleep"):
            self._set_state("starting", "restarting the engine", error)
        if self._sleep_change is not None and not self._sleep_change.done.done():
            self._sleep_change.done.set_result(error)
        self.load = None
        if self._cache_watcher is not None:
            self._cache_watcher.on_lost()
        self._aborted.clear()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.on_engine_lost(error)

    def on_exit(self, description: str) -> None:
        self._process = None
        self._ended.set()
        if self._ready_at_s is None or self.state in ("stopped", "failed"):
            # Also so that no engine breaks again and again on what it begins with.
            self.kv_memory.close()
        if self.state in ("stopped", "failed"):
            return
        self._ended.clear()
        generic = not self._error or self._error == "the engine process ended"
        error = description if generic else self._error
        end = EngineEnd(self._clock.now_s(), self._ready_at_s, error, self._is_retryable_end)
        decision = self._restart_policy.decide(end)
        _log.warning("engine: %s", decision.reason)
        if decision.delay_s is None:
            self._set_state("failed", "", error=error, is_retryable=self._is_retryable_end)
            self.kv_memory.close()
            return
        self.num_restarts += 1
        self._set_state("starting", "restarting the engine", error=error)
        now_s = self._clock.now_s()
        self._schedule(decision.delay_s, lambda: self._start_in_time(now_s + START_HOLD_S))

    def _start_in_time(self, latest_s: float) -> None:
        if self._is_untimely() and self._clock.now_s() < latest_s:
            self._schedule(START_HOLD_TICK_S, lambda: self._start_in_time(latest_s))
        else:
            self._start_process()
