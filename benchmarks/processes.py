"""CPU time and memory of the system under test, by process role.

Roles come from process titles (`headrace: front chat-1` is a `front`), so that nothing needs to be asked of
the system while it is measured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

TITLE = "headrace: "


def role_of(process: psutil.Process) -> str:
    """Return `router`, `front`, `engine`, `haproxy` …, or an empty text for a process that is not ours."""
    try:
        title = " ".join(process.cmdline()).strip()
        if title.startswith(TITLE):
            return title.removeprefix(TITLE).split()[0]
        return "haproxy" if process.name() == "haproxy" else ""
    except psutil.Error:
        return ""


@dataclass(frozen=True)
class ForeignTree:
    """Another program's processes, which this one started: the root, and how their roles are told."""

    root_pid: int
    role_of: Callable[[psutil.Process], str]


def find_processes(
    root_pid: int | None = None, foreign: ForeignTree | None = None
) -> dict[int, tuple[str, psutil.Process]]:
    """Return pid -> (role, process) of the system's processes below `root_pid` (default: this one). Those of
    `foreign` get roles of their own, which begin with `peer `."""
    root = psutil.Process(root_pid)
    below = [*root.children(recursive=True), *([root] if root_pid is not None else [])]
    found = {process.pid: (role_of(process), process) for process in below}
    if foreign is not None:
        for process in tree_of(foreign.root_pid):
            role = foreign.role_of(process)
            found[process.pid] = (f"peer {role}" if role else "", process)
    return {pid: (role, process) for pid, (role, process) in found.items() if role}


def tree_of(root_pid: int) -> list[psutil.Process]:
    """Return a process and all below it; empty when it is gone."""
    try:
        root = psutil.Process(root_pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


@dataclass(frozen=True)
class CpuSample:
    """CPU seconds of each process at one time."""

    at_s: float
    """Monotonic: the clock of the load's records."""
    cpu_s: dict[int, tuple[str, float]]

    def since(self, before: CpuSample) -> dict[str, float]:
        """Return CPU seconds per role between two samples. A process that began between counts from 0."""
        spent: dict[str, float] = {}
        for pid, (role, cpu_s) in self.cpu_s.items():
            start_s = before.cpu_s[pid][1] if pid in before.cpu_s else 0.0
            spent[role] = spent.get(role, 0.0) + cpu_s - start_s
        return spent


def sample_cpu(foreign: ForeignTree | None = None) -> CpuSample:
    """Sample all processes of the system under test, and those of `foreign`."""
    spent: dict[int, tuple[str, float]] = {}
    for pid, (role, process) in find_processes(foreign=foreign).items():
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        spent[pid] = (role, times.user + times.system)
    return CpuSample(time.monotonic(), spent)


@dataclass
class CpuWindow:
    """The two samples around a steady stretch of load."""

    samples: list[CpuSample] = field(default_factory=list)

    @property
    def span_s(self) -> tuple[float, float]:
        return self.samples[0].at_s, self.samples[1].at_s

    def spent_s(self) -> dict[str, float]:
        """CPU seconds per role inside the window."""
        return self.samples[1].since(self.samples[0])


@contextmanager
def cpu_window(
    after_s: float,
    length_s: float,
    foreign: ForeignTree | None = None,
    on_sample: Callable[[], None] = lambda: None,
) -> Iterator[CpuWindow]:
    """Sample from a thread `after_s` seconds into the block and again `length_s` later. The block must last
    longer than both. `on_sample` is called with each sample."""
    window = CpuWindow()
    is_over = threading.Event()

    def watch() -> None:
        for wait_s in (after_s, length_s):
            if not is_over.wait(wait_s):
                window.samples.append(sample_cpu(foreign))
                on_sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield window
    finally:
        is_over.set()
        thread.join()
    if len(window.samples) != 2:
        raise RuntimeError(f"the load ended before its window of {after_s} + {length_s} s was over")


@dataclass(frozen=True)
class Memory:
    """One process's memory in bytes. Shared pages: in full in resident, not in unique, by share in
    proportional."""

    pid: int
    title: str
    role: str
    resident: int
    unique: int
    proportional: int


def sample_memory(root_pid: int | None = None) -> list[Memory]:
    """Return the memory of each process of the system, by role."""
    found = []
    for pid, (role, process) in find_processes(root_pid).items():
        try:
            info = process.memory_full_info()
            title = _title(role, process)
        except psutil.Error:
            continue
        found.append(Memory(pid, title, role, info.rss, info.uss, info.pss))
    return sorted(found, key=lambda memory: (memory.role, memory.title))


def _title(role: str, process: psutil.Process) -> str:
    if role != "haproxy":
        return " ".join(process.cmdline()).strip().removeprefix(TITLE)
    parent = process.parent()
    return "haproxy worker" if parent is not None and role_of(parent) == "haproxy" else "haproxy master"
