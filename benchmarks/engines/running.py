"""An engine's life: started, asked until it answers, stopped while others are measured, ended.

Owns the processes. Must not know what is measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.engines.catalogue import MAX_RUNNING, NUM_THREADS, EngineRig, PeerEngine
from benchmarks.engines.models import BenchModel
from benchmarks.processes import find_processes, tree_of
from benchmarks.system import ENDPOINT, free_port, serve
from headrace.engine.model_files.metadata import read_metadata

HEADRACE = "headrace"
QUESTION = "The capital of France is"
"""What every engine is asked first: its answer stands in the report, so that one sees that it computes the
same model."""
STOP_LIMIT_S = 20.0


class EngineFailed(Exception):
    """An engine did not start, or died; the message holds the end of its log."""


@dataclass
class RunningEngine:
    """An engine that answers."""

    name: str
    title: str
    url: str
    """With /v1."""
    served_name: str
    start_s: float
    answer: str
    """What it says to QUESTION."""
    find: Callable[[], list[psutil.Process]]
    """Its processes now."""
    takes_ignore_eos: bool = True
    says_done: bool = True
    max_rounds: int = 3
    weights: str = ""
    is_pausable: bool = True

    def pause(self) -> None:
        """Stop all its processes, so that it takes nothing from whoever is measured."""
        if self.is_pausable:
            for process in self.find():
                with suppress(psutil.Error):
                    process.suspend()

    def wake(self) -> None:
        """Let it run again."""
        if self.is_pausable:
            for process in self.find():
                with suppress(psutil.Error):
                    process.resume()

    def cpu_s(self) -> float:
        """CPU seconds of its processes so far."""
        spent_s = 0.0
        for process in self.find():
            with suppress(psutil.Error):
                times = process.cpu_times()
                spent_s += times.user + times.system
        return spent_s

    def memory_bytes(self) -> int:
        """What its processes hold, pages that they share counted once (proportional set size)."""
        held = 0
        for process in self.find():
            with suppress(psutil.Error):
                held += process.memory_full_info().pss
        return held


@contextmanager
def running_peer(
    engine: PeerEngine, model: BenchModel, context_tokens: int, max_running: int = MAX_RUNNING
) -> Iterator[RunningEngine]:
    """Start a peer's server and yield it when it has answered. Raises EngineFailed."""
    with tempfile.TemporaryDirectory(prefix="hr-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        rig = EngineRig(model, free_port(), folder, context_tokens, max_running)
        log_path = folder / "log"
        url = f"http://127.0.0.1:{rig.port}/v1"
        command = engine.command(rig)
        environment = {**_clean_environment(), **engine.variables(rig)}
        started_s = time.monotonic()
        with log_path.open("wb") as log:
            tether = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("tether.py")), *command],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            answer = await_answer(
                url, engine.served_name(rig), engine.start_limit_s, lambda: _check_alive(tether, log_path)
            )
            yield RunningEngine(
                name=engine.name,
                title=engine.title,
                url=url,
                served_name=engine.served_name(rig),
                start_s=time.monotonic() - started_s,
                answer=answer,
                find=lambda: tree_of(tether.pid)[1:],
                takes_ignore_eos=engine.takes_ignore_eos,
                says_done=engine.says_done,
                max_rounds=engine.max_rounds,
                weights=engine.weights,
            )
        finally:
            _end(tether)


@contextmanager
def running_headrace(
    model: BenchModel, context_tokens: int, max_running: int = MAX_RUNNING
) -> Iterator[RunningEngine]:
    """Serve with one native replica and yield its front: its own OpenAI server. Raises EngineFailed."""
    native = {"num_threads": NUM_THREADS, "max_running": max_running, "max_context_tokens": context_tokens}
    endpoint = {"model": str(model.gguf()), "replicas": 1, "native": native}
    started_s = time.monotonic()
    with serve(endpoint) as system:
        url = system.front_urls[0]
        answer = await_answer(url, ENDPOINT, 60.0, lambda: None)
        yield RunningEngine(
            name=HEADRACE,
            title="headrace",
            weights=_arithmetic(model),
            url=url,
            served_name=ENDPOINT,
            start_s=time.monotonic() - started_s,
            answer=answer,
            find=_replica,
            is_pausable=False,  # idle it uses nothing, and its controller expects to hear from it
        )


def _arithmetic(model: BenchModel) -> str:
    """Return what headrace's `auto` chooses on this machine."""
    from headrace.engine.operations.select import select_operations

    h = read_metadata(model.find()).hyperparameters
    return select_operations("auto", "auto", NUM_THREADS, h).description


def _replica() -> list[psutil.Process]:
    return [process for role, process in find_processes().values() if role in ("front", "engine")]


def _clean_environment() -> dict[str, str]:
    """A peer must find its own packages, not ours."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _check_alive(tether: subprocess.Popen[bytes], log_path: Path) -> None:
    if tether.poll() is not None:
        raise EngineFailed(f"it ended with {tether.returncode}: {_tail(log_path)}")


def await_answer(url: str, served_name: str, limit_s: float, check: Callable[[], None]) -> str:
    """Ask QUESTION until it is answered; return the answer. `check` raises when there is no hope. Raises
    EngineFailed."""
    body = {"model": served_name, "prompt": QUESTION, "max_tokens": 8, "temperature": 0}
    until_s = time.monotonic() + limit_s
    reason = "no answer"
    while time.monotonic() < until_s:
        check()
        try:
            answer = httpx.post(f"{url}/completions", json=body, timeout=min(30.0, limit_s))
            if answer.status_code == 200:
                return str(answer.json()["choices"][0]["text"])
            reason = f"{answer.status_code}: {answer.text[:200]}"
        except (httpx.HTTPError, ValueError, LookupError) as error:
            reason = str(error)
        time.sleep(0.1)
    raise EngineFailed(f"no answer within {limit_s:g} s ({reason})")


def _tail(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-4:])[-500:]


def _end(tether: subprocess.Popen[bytes]) -> None:
    """Let go of the pipe, which ends everything; wait until it has."""
    assert tether.stdin is not None
    with suppress(OSError):
        tether.stdin.close()
    try:
        tether.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        for process in tree_of(tether.pid):
            with suppress(psutil.Error):
                process.kill()
        tether.wait()
