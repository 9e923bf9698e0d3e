"""A peer's life: started on free ports in a folder of its own, awaited, and ended with all it started.

Ends processes by their ids only; another instance of the same program on this machine is never touched.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.peers.catalogue import Peer, Rig
from benchmarks.processes import ForeignTree, tree_of
from benchmarks.system import ENDPOINT, free_port

START_LIMIT_S = 90.0
STOP_LIMIT_S = 10.0
SETTLE_LIMIT_S = 8.0
SETTLED_SHARE = 0.25
"""Of one core. A peer that uses less has ended its start-up; Ray never falls to nothing."""
_PROBE = {
    "model": ENDPOINT,
    "messages": [{"role": "user", "content": "ready?"}],
    "max_tokens": 2,
    "stream": True,
}


class PeerFailed(Exception):
    """A peer did not start, or ended; the message holds the end of its log."""


@dataclass
class RunningPeer:
    """A peer that answers."""

    peer: Peer
    process: subprocess.Popen[bytes]
    url: str
    """With /v1."""
    start_s: float
    command: list[str]
    variables: Mapping[str, str]

    @property
    def tree(self) -> ForeignTree:
        return ForeignTree(self.process.pid, self.peer.role_of)

    def set_step(self, step_ms: float) -> None:
        """Set the step of a peer's own application."""
        answer = httpx.put(f"{self.url.removesuffix('/v1')}/step/{step_ms:g}", timeout=10)
        answer.raise_for_status()


@contextmanager
def running(peer: Peer, front_url: str, start_limit_s: float = START_LIMIT_S) -> Iterator[RunningPeer]:
    """Start a peer before the front at `front_url` (without /v1) and yield it when it has served a stream.
    Raises PeerFailed."""
    with tempfile.TemporaryDirectory(prefix="hr-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        rig = Rig(front_url, free_port(), (free_port(), free_port()), folder)
        command = peer.command(rig)
        variables = peer.variables(rig)
        log_path = folder / "log"
        started_s = time.monotonic()
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**_clean_environment(), **variables},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        url = f"http://127.0.0.1:{rig.port}/v1"
        try:
            _await_stream(peer, process, url, log_path, start_limit_s)
            start_s = time.monotonic() - started_s
            _settle(process.pid)
            yield RunningPeer(peer, process, url, start_s, command, variables)
        finally:
            _stop(process)


def _clean_environment() -> dict[str, str]:
    """The peer must find its own packages, not ours."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _await_stream(
    peer: Peer, process: subprocess.Popen[bytes], url: str, log_path: Path, limit_s: float
) -> None:
    until_s = time.monotonic() + limit_s
    reason = "no answer"
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise PeerFailed(f"{peer.name} ended with {process.returncode}: {_tail(log_path)}")
        try:
            answer = httpx.post(f"{url}/chat/completions", json=_PROBE, timeout=5)
            if answer.status_code == 200 and answer.text.rstrip().endswith("[DONE]"):
                return
            reason = f"{answer.status_code}: {answer.text[:200]}"
        except httpx.HTTPError as error:
            reason = str(error)
        time.sleep(0.1)
    raise PeerFailed(f"{peer.name} served no stream in {limit_s:g} s ({reason}): {_tail(log_path)}")


def _tail(path: Path) -> str:
    return " / ".join(path.read_text(errors="replace").splitlines()[-5:])[-600:]


def _settle(pid: int) -> None:
    """Wait until the peer's processes use little, so that its start is not measured. Some never do."""
    until_s = time.monotonic() + SETTLE_LIMIT_S
    before_s, before = time.monotonic(), _cpu_s(pid)
    while time.monotonic() < until_s:
        time.sleep(0.5)
        now_s, now = time.monotonic(), _cpu_s(pid)
        if (now - before) / (now_s - before_s) < SETTLED_SHARE:
            return
        before_s, before = now_s, now


def _cpu_s(pid: int) -> float:
    total = 0.0
    for process in tree_of(pid):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the peer and everything below it, whatever state it is in."""
    tree = tree_of(process.pid)  # taken first: orphans leave the tree, and are found by identity
    if process.stdin is not None:
        process.stdin.close()  # Ray's driver ends by this, and takes its cluster along
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    survivors = psutil.wait_procs([one for one in tree if one.pid != process.pid], timeout=2)[1]
    for survivor in survivors:
        try:
            survivor.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(survivors, timeout=5)
