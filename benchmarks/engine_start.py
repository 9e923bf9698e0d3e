"""One engine process from its start, or from its sleep, to its first token; in several ways, by turns.

Drives the engine through its socket, as a front does: what front, router and gateway add is not in here.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import (
    EngineCommand,
    EngineEvent,
    EngineFailed,
    EngineReady,
    EngineSpec,
    EngineStarting,
    GenerationRequest,
    SamplingParams,
    Sleep,
    StepBatch,
    Submit,
    Wake,
)
from headrace.engine.model_files.resolve import resolve_model

SOURCE = Path(__file__).parents[1] / "src"
MODEL = "smollm2-135m-instruct"
PROMPT_TOKENS = 16
LIMIT_S = 120.0
COLD, PACKED, UNCACHED, STANDBY, WAKE = WAYS = (
    "cold: nothing packed yet",
    "packed",
    "packed, nothing in the page cache",
    "standby (sleep level 1)",
    "wake (sleep level 2)",
)


@dataclass
class Samples:
    """What one way to the first token took, in seconds, each time."""

    first_token_s: list[float] = field(default_factory=list)
    until_ready_s: list[float] = field(default_factory=list)
    """Until the engine said that it takes requests; until the load said that it is awake."""
    phases: list[dict[str, float]] = field(default_factory=list)


class BenchEngine:
    """The front's end of an engine's socket."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes], started_s: float) -> None:
        self._connection = connection
        self._decoder: FrameDecoder[EngineEvent] = FrameDecoder(EngineEvent)
        self._events: list[EngineEvent] = []
        self._num_requests = 0
        self.process = process
        self.started_s = started_s

    def send(self, *commands: EngineCommand) -> None:
        for command in commands:
            self._connection.sendall(encode_frame(command))

    def wait_ready(self) -> EngineReady:
        """Wait for the end of the start. Raises RuntimeError if it fails."""
        while True:
            event = self._next()
            if isinstance(event, EngineReady):
                return event
            assert isinstance(event, EngineStarting), event

    def ask(self) -> None:
        """Send a request for two tokens."""
        self._num_requests += 1
        sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        prompt = list(range(100, 100 + PROMPT_TOKENS))
        self.send(Submit(GenerationRequest(f"r{self._num_requests}", prompt, sampling)))

    def wait_token(self) -> float:
        """Return when the first token of a request came, after its last one did."""
        first_s = 0.0
        while True:
            event = self._next()
            assert isinstance(event, StepBatch), event
            for output in event.outputs:
                if output.error:
                    raise RuntimeError(output.error)
                first_s = first_s or time.monotonic()
                if output.finish_reason:
                    return first_s

    def wait_level(self, level: int) -> float:
        """Return when a load told of this depth of sleep. Raises RuntimeError if it could not be reached."""
        while True:
            event = self._next()
            assert isinstance(event, StepBatch), event
            if event.load.sleep_error:
                raise RuntimeError(event.load.sleep_error)
            if event.load.sleep_level == level:
                return time.monotonic()

    def _next(self) -> EngineEvent:
        while not self._events:
            if not select.select([self._connection], [], [], LIMIT_S)[0]:
                raise RuntimeError(f"the engine said nothing for {LIMIT_S:g} s")
            data = self._connection.recv(1 << 20)
            if not data:
                raise RuntimeError(f"the engine ended with {self.process.wait(LIMIT_S)}")
            self._events.extend(self._decoder.feed(data))
        event = self._events.pop(0)
        if isinstance(event, EngineFailed):
            raise RuntimeError(event.error)
        return event


@contextmanager
def bench_engine(**settings: Any) -> Iterator[BenchEngine]:
    """Start an engine process; it is killed at the end."""
    spec = EngineSpec("native", MODEL, **settings)
    ours, theirs = socket.socketpair()
    started_s = time.monotonic()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "headrace.engine", "--fd", str(theirs.fileno())),
            *("--spec", msgspec.json.encode(spec).decode()),
        ],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])},
        stderr=subprocess.DEVNULL,
    )
    theirs.close()
    try:
        with ours:
            yield BenchEngine(ours, process, started_s)
    finally:
        process.kill()
        process.wait(LIMIT_S)


def measure_starts(count: int) -> dict[str, Samples]:
    """Measure every way `count` times, by turns."""
    samples = {way: Samples() for way in WAYS}
    for _ in range(count):
        with tempfile.TemporaryDirectory(prefix="headrace-packed-") as packed_dir:
            _measure_start(samples[COLD], packed_dir)
            _measure_start(samples[PACKED], packed_dir)
            _drop_pages(packed_dir)
            _measure_start(samples[UNCACHED], packed_dir)
            _measure_sleep(samples, packed_dir)
    return samples


def _measure_start(samples: Samples, packed_dir: str) -> None:
    with bench_engine(packed_dir=packed_dir) as engine:
        engine.ask()  # it waits in the socket, as a request that is held would
        ready = engine.wait_ready()
        samples.until_ready_s.append(time.monotonic() - engine.started_s)
        samples.first_token_s.append(engine.wait_token() - engine.started_s)
        samples.phases.append(ready.phases)


def _measure_sleep(samples: dict[str, Samples], packed_dir: str) -> None:
    with bench_engine(packed_dir=packed_dir, is_standby=True) as engine:
        engine.wait_ready()
        for way in (STANDBY, WAKE):
            if way == WAKE:
                engine.send(Sleep(2))
                engine.wait_level(2)
            sent_s = time.monotonic()
            engine.send(Wake())
            samples[way].until_ready_s.append(engine.wait_level(0) - sent_s)
            engine.ask()
            samples[way].first_token_s.append(engine.wait_token() - sent_s)


def _drop_pages(packed_dir: str) -> None:
    """Let the kernel forget the files that a start reads: packed weights, the model, torch, numpy. Files that
    other processes have mapped stay."""
    import importlib.util

    folders = [Path(packed_dir), resolve_model(MODEL).path.parent]
    for name in ("torch", "numpy"):
        spec = importlib.util.find_spec(name)
        folders += [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    os.sync()
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
