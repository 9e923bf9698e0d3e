"""A front with a real vLLM engine, and the processes below it. One start takes half a minute and more."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil

from headrace.api.framing import FrameDecoder
from headrace.api.messages import EngineEvent, EngineSpec

START_LIMIT_S = 400.0
ARGUMENTS = {
    "enforce_eager": True,
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 256 << 20,
}


def write_model(directory: Path) -> Path:
    """Write SmolLM2 as a Hugging Face directory, from the packaged GGUF file."""
    from benchmarks.engines.convert import write_huggingface

    from headrace.engine.model_files.resolve import resolve_model

    write_huggingface(resolve_model("smollm2-135m-instruct"), directory)
    return directory


def spec_of(model: Path | str, **arguments: object) -> EngineSpec:
    return EngineSpec("vllm", str(model), vllm_args={**ARGUMENTS, **arguments})


def processes_below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def wait_until(condition: Callable[[], object], limit_s: float, what: str) -> None:
    until_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until_s, f"not within {limit_s:g} s: {what}"
        time.sleep(0.05)


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class EngineUnderTest:
    """The front's end of an engine process's socket, with a deadline on every wait."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes], log: Path) -> None:
        self.connection = connection
        self.process = process
        self.log = log
        self._decoder: FrameDecoder[EngineEvent] = FrameDecoder(EngineEvent)
        self._events: list[EngineEvent] = []

    def until(self, is_it: Callable[[EngineEvent], object], limit_s: float = START_LIMIT_S) -> EngineEvent:
        """Return the first event that is it."""
        until_s = time.monotonic() + limit_s
        while True:
            while self._events:
                if is_it(event := self._events.pop(0)):
                    return event
            ready = select.select([self.connection], [], [], max(0.0, until_s - time.monotonic()))[0]
            assert ready, self.log.read_text()[-4000:]
            data = self.connection.recv(1 << 20)
            assert data, self.log.read_text()[-4000:]
            self._events.extend(self._decoder.feed(data))


@contextmanager
def start_engine(spec: EngineSpec) -> Iterator[EngineUnderTest]:
    """Start an engine process as a front does: a group of its own, its log a file."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory() as folder, ours:
        log = Path(folder) / "log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "headrace.engine.adapted", "--fd", str(theirs.fileno())),
                    *("--spec", msgspec.json.encode(spec).decode()),
                ],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                process_group=0,
            )
        theirs.close()
        try:
            yield EngineUnderTest(ours, process, log)
        finally:
            process.kill()
            process.wait()
