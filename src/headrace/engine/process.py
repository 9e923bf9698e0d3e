"""The engine process: starts an engine, then reads commands, steps, and sends one batch per step.

Owns the process's life: it dies with its front, drains on SIGTERM, and says why it failed.
One thread. Must not know text, HTTP, or what a step computes; imports torch only for a native engine.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import msgspec

from headrace.api.messages import (
    Abort,
    Drain,
    EngineCommand,
    EngineFailed,
    EngineReady,
    EngineSpec,
    EngineStarting,
    Sleep,
    StepBatch,
    StepOutput,
    Submit,
    Wake,
)
from headrace.clock import Clock, SystemClock
from headrace.engine.channel import FrontChannel, FrontGone
from headrace.engine.grammar_queue import Compiler, GrammarQueue
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.protocol import Engine
from headrace.engine.simulated import SimulatedEngine
from headrace.engine.start_phases import StartPhases, describe_phases, process_age_s
from headrace.engine.threads import limit_spinning
from headrace.errors import (
    ConfigError,
    HeadraceError,
    ModelChanged,
    ModelError,
    Overloaded,
    RequestError,
    text_of,
)
from headrace.lifetime import die_with_parent

if TYPE_CHECKING:
    from headrace.engine.workers.group import WorkerGroup

HEARTBEAT_S = 1.0
MAX_WAITING = 65536
"""As many as the largest max_open: a front that keeps to its own limit never meets this one."""

OnPhase = Callable[[str], None]


class DrainSignal:
    """SIGTERM means: finish what runs, take no more, exit. While the engine still starts: exit at once."""

    def __init__(self) -> None:
        self.is_set = False
        self.is_starting = True
        self.wakeup_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def install(self) -> None:
        """Handle SIGTERM, and ignore SIGINT: Ctrl-C reaches the whole group, and the front decides."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)

    def clear_wakeup(self) -> None:
        """Take what the signals wrote, so that the next wait blocks again."""
        try:
            os.read(self.wakeup_fd, 4096)
        except BlockingIOError:
            pass

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.is_set = True
        if self.is_starting:
            raise SystemExit(0)


class EngineLoop:
    """Reads what came, advances the engine one step, sends what it gave; in turn, until drained."""

    def __init__(
        self,
        engine: Engine,
        channel: FrontChannel,
        drain: DrainSignal,
        clock: Clock,
        phases: StartPhases | None = None,
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._drain = drain
        self._clock = clock
        self._phases = phases
        self._refusals: list[StepOutput] = []
        self._evicted: list[bytes] = []
        self._sleep_error = ""
        self._is_load_wanted = False
        self._next_heartbeat_s = clock.now_s()

    def run(self) -> None:
        """Return when a drain is complete. Raises FrontGone, ProtocolError, and what a step raises."""
        while self.turn():
            pass

    def turn(self) -> bool:
        """Read what came, waiting at most until the next heartbeat, and do what follows. False: drained."""
        self._read_commands()
        if self._engine.has_work():
            self._send(self._engine.step())
        elif self._refusals or self._is_load_wanted or self._clock.now_s() >= self._next_heartbeat_s:
            self._send(StepBatch([], self._engine.load()))
        elif self._drain.is_set:
            return False
        return True

    def _read_commands(self) -> None:
        is_idle = not self._engine.has_work() and not self._drain.is_set
        wait_s = max(0.0, self._next_heartbeat_s - self._clock.now_s()) if is_idle else 0.0
        for command in self._channel.receive(wait_s):
            self._apply(command)
        if self._drain.is_set:
            self._drain.clear_wakeup()

    def _apply(self, command: EngineCommand) -> None:
        match command:
            case Submit(request):
                try:
                    self._check_open()
                    self._engine.submit(request)
                except RequestError as error:
                    # The id must end exactly once: if it is a double, the first one ends here too.
                    self._engine.abort(request.request_id)
                    self._refusals.append(
                        StepOutput(request.request_id, finish_reason="error", error=error.message)
                    )
            case Abort(request_id):
                self._engine.abort(request_id)
            case Drain():
                self._drain.is_set = True
            case Sleep(level):
                self._change_sleep(lambda: self._evicted.extend(self._engine.sleep(level)))
            case Wake():
                self._change_sleep(self._engine.wake)

    def _change_sleep(self, change: Callable[[], None]) -> None:
        """Sleep or wake, and tell at once what came of it."""
        self._is_load_wanted = True
        if self._phases is not None:
            self._phases.begin("changing")
        try:
            if self._drain.is_set:
                raise Overloaded("the engine is draining")
            change()
        except (HeadraceError, MemoryError) as error:
            self._sleep_error = text_of(error)
        level = self._engine.load().sleep_level
        what = f"asleep at level {level}" if level else "awake"
        spent = f" after {describe_phases(self._phases.finish())}" if self._phases is not None else ""
        say(f"{what}{spent}{self._sleep_error and ': '}{self._sleep_error}")

    def _check_open(self) -> None:
        if self._drain.is_set:
            raise Overloaded("the engine is draining and takes no more requests")
        if self._engine.num_waiting() >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} requests wait in the engine already; send it again later")

    def _send(self, batch: StepBatch) -> None:
        """Send what a step gave, and what else there is to tell."""
        if self._refusals or self._evicted:
            batch = StepBatch(self._refusals + batch.outputs, batch.load, self._evicted + batch.evicted)
            self._refusals, self._evicted = [], []
        if self._sleep_error:
            load = msgspec.structs.replace(batch.load, sleep_error=self._sleep_error)
            batch = msgspec.structs.replace(batch, load=load)
            self._sleep_error = ""
        self._is_load_wanted = False
        self._channel.send(batch)
        self._next_heartbeat_s = self._clock.now_s() + HEARTBEAT_S


def check_spec(spec: EngineSpec) -> None:
    """Raise ConfigError that lists every setting an engine cannot start with."""
    problems = []
    if spec.block_size < 8 or spec.block_size & (spec.block_size - 1):
        problems.append(f"block_size is {spec.block_size}; it must be a power of two >= 8")
    for name, least in (
        ("max_running", 1),
        ("token_budget", 1),
        ("max_draft_tokens", 1),
        ("tensor_parallel", 1),
    ):
        if getattr(spec, name) < least:
            problems.append(f"{name} is {getattr(spec, name)}; it must be >= {least}")
    at_least_zero = (
        "kv_cache_bytes",
        "max_context_tokens",
        "num_threads",
        "simulated_step_s",
        "simulated_start_s",
    )
    for name in at_least_zero:
        # Written so that NaN is refused too.
        if not getattr(spec, name) >= 0:
            problems.append(f"{name} is {getattr(spec, name)}; it must be >= 0")
    if problems:
        raise ConfigError(problems)


def build_engine(spec: EngineSpec, on_phase: OnPhase, clock: Clock) -> Engine:
    """Build the engine that `spec` names. Raises ConfigError, ModelError, MemoryError, OSError."""
    check_spec(spec)
    if spec.kind == "simulated":
        on_phase("waiting for simulated_start_s")
        time.sleep(spec.simulated_start_s)
        simulated = SimulatedEngine(spec, clock, time.sleep)
        if spec.is_standby:
            simulated.sleep(1)
        return simulated
    from headrace.engine.model_files.resolve import resolve_model

    on_phase("finding the model")
    files = resolve_model(spec.model)
    if spec.packed_dir:
        from headrace.engine.weights.packed_cache import read_ahead_all

        read_ahead_all(Path(spec.packed_dir), str(files.path))
    limit_spinning()
    group = start_ranks(spec, files, on_phase)
    on_phase("importing torch")
    from headrace.engine.fused_sampling import load_fused_sampling
    from headrace.engine.native import NativeEngine
    from headrace.engine.sampler import Sampler
    from headrace.engine.speculation.select import load_speculator
    from headrace.engine.workers.parallel_runner import load_any_runner

    runner = load_any_runner(spec, files, on_phase, group)
    grammars = GrammarQueue(lambda: compiler_for(files, runner.eos_token_ids))
    speculator = load_speculator(spec, files, runner, on_phase)
    sampler = Sampler(load_fused_sampling(runner.team))
    engine = NativeEngine(spec, runner, clock, speculator, grammars, sampler)
    on_phase("computing the first step")
    engine.compute_first_step()
    if spec.is_standby:
        engine.sleep(1)
    grammars.prepare_when(lambda: not engine.has_work())
    return engine


def start_ranks(spec: EngineSpec, files: ModelFiles, on_phase: OnPhase) -> WorkerGroup | None:
    """Start the other ranks' processes, which import torch meanwhile.

    Raises ConfigError where the model cannot be cut into so many parts, ModelError, EngineDead, OSError.
    """
    if spec.tensor_parallel == 1:
        return None
    from headrace.engine.model_files.metadata import read_metadata
    from headrace.engine.operations.shard import cut
    from headrace.engine.workers.group import WorkerGroup
    from headrace.engine.workers.local import start_local_rank
    from headrace.engine.workers.placed import Lobby

    cut(read_metadata(files).hyperparameters, spec.tensor_parallel)  # before anything is started in vain
    if not spec.rank_socket:
        return WorkerGroup(spec, start_local_rank)
    on_phase("waiting for the hosts of the other ranks")
    with Lobby(spec.rank_socket, spec.rank_address, range(1, spec.tensor_parallel)) as lobby:
        return WorkerGroup(spec, lobby.start_rank)


def compiler_for(files: ModelFiles, eos_token_ids: frozenset[int]) -> Compiler:
    """Return what compiles grammars for a model. Called when the engine is idle, or at the first grammar: the
    library loads slowly."""
    from headrace.engine.grammars import GrammarCompiler
    from headrace.engine.model_files.metadata import read_metadata
    from headrace.engine.model_files.vocabulary import read_token_bytes

    return GrammarCompiler(lambda: read_token_bytes(read_metadata(files)), eos_token_ids)


def is_retryable(error: BaseException) -> bool:
    """Whether starting the same engine again can help."""
    return isinstance(error, ModelChanged) or not isinstance(
        error, ModelError | ConfigError | ImportError | msgspec.DecodeError
    )


def run_engine(
    spec: EngineSpec, channel: FrontChannel, drain: DrainSignal, clock: Clock, phases: StartPhases
) -> None:
    """Start an engine that this process steps, and run it to its end."""
    engine = build_engine(spec, phases.begin, clock)
    say_ready(engine.describe(), channel, drain, phases)
    EngineLoop(engine, channel, drain, clock, phases).run()


def say_ready(ready: EngineReady, channel: FrontChannel, drain: DrainSignal, phases: StartPhases) -> None:
    """The start is over: tell the front, and what it took."""
    ready = msgspec.structs.replace(ready, phases=phases.finish())
    drain.is_starting = False
    # What was imported stays: collections need not look at it again, which would take milliseconds.
    gc.freeze()
    gc.enable()
    channel.send(ready)
    say(f"ready after {describe_phases(ready.phases)}")


def say(text: str) -> None:
    """Write a line to the log. One that cannot be written, on a full disk, is lost: no reason to end."""
    with contextlib.suppress(OSError):
        print(f"engine: {text}", file=sys.stderr, flush=True)


RunEngine = Callable[[EngineSpec, FrontChannel, DrainSignal, Clock, StartPhases], None]


def serve(
    spec_json: str, channel: FrontChannel, drain: DrainSignal, clock: Clock, run: RunEngine = run_engine
) -> int:
    """Start the engine and run it to its end; return the exit status."""
    gc.disable()  # a tenth of the time that importing torch takes
    try:
        phases = StartPhases(
            lambda phase, elapsed_s: channel.send(EngineStarting(phase, elapsed_s)), clock, process_age_s()
        )
        run(msgspec.json.decode(spec_json, type=EngineSpec), channel, drain, clock, phases)
    except FrontGone as gone:
        say(f"{gone}")
        return 0
    except Exception as error:  # whatever it is, the front must be told before this process ends
        report_failure(channel, error)
        return 1
    return 0


def report_failure(channel: FrontChannel, error: Exception) -> None:
    """Say why the engine ends: to the front, and in full to the log."""
    is_explained = isinstance(error, HeadraceError | msgspec.DecodeError)
    if is_explained:
        say(f"{error}")
    else:
        traceback.print_exception(error)
    text = str(error) if is_explained else f"{type(error).__name__}: {error}"
    try:
        channel.send(EngineFailed(text, is_retryable(error)))
    except FrontGone as gone:
        say(f"{gone}")


def main(argv: Sequence[str] | None = None, run: RunEngine = run_engine) -> int:
    """Run an engine process, whose engine `run` starts and runs to its end; return its exit status:
    0 drained or front gone, 1 failed, 2 wrong use."""
    parser = argparse.ArgumentParser(prog="python -m headrace.engine", description="Started by a front.")
    parser.add_argument("--fd", type=int, required=True, help="inherited UNIX stream socket to the front")
    parser.add_argument("--spec", required=True, help="EngineSpec as JSON")
    parser.add_argument("--title", default="", help="process title")
    arguments = parser.parse_args(argv)
    if arguments.title:
        from setproctitle import setproctitle

        setproctitle(arguments.title)
    drain = DrainSignal()
    drain.install()
    die_with_parent()  # a parent that ended before this is noticed by its closed socket
    try:
        connection = socket.socket(fileno=arguments.fd)
    except OSError as error:
        say(f"--fd {arguments.fd} is not a socket: {error}")
        return 2
    channel = FrontChannel(connection, drain.wakeup_fd)
    if channel.is_front_gone():
        say("the front is gone already")
        return 0
    return serve(arguments.spec, channel, drain, SystemClock(), run)
