"""Hosts of their own for tests: each with an address, processes, a name and a disk, joined by one bridge.

    test ── bridge 10.77.0.254 ─┬─ veth ── host-1 10.77.0.1
                                ├─ veth ── host-2 10.77.0.2
                                └─ ...

A host is a set of namespaces below those of `in_namespaces.sh`, whose end ends everything here. Owns hosts,
cables and what becomes of them: a host that loses its power, a cable that is pulled.
Must not know what runs there (`ray_hosts`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
BRIDGE = "hosts"
BRIDGE_MAC = "02:68:72:00:00:fe"
"""Of its own: else it has that of one of its cables, and takes another one when that host is killed, of which
the others hear only after a minute."""
NETWORK = "10.77.0"
KINDS = ["--net", "--pid", "--mount", "--uts", "--ipc"]
LIMIT_S = 15.0
INIT = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
print("ready", flush=True)
while signal.sigwait([signal.SIGCHLD]):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
"""
"""What the first process of a host does: it takes leave of those whose parents are gone."""
BEGIN = (
    'set -e; hostname "$1"; mount --bind "$2" "$3"; mount -t tmpfs tmpfs /dev/shm; ip link set lo up; '
    'exec "$4" -I -c "$5"'
)


class Host:
    """One host. `number` is the end of its address."""

    def __init__(self, number: int, disk: Path, mount_point: Path) -> None:
        """disk: directory that it alone sees at `mount_point`, where each host has its own."""
        self.name, self.address, self.disk = f"host-{number}", f"{NETWORK}.{number}", disk
        self._cable = f"cable-{number}"
        self._begun: list[subprocess.Popen[bytes]] = []
        arguments = [self.name, str(disk), str(mount_point), sys.executable, INIT]
        with open(disk / "host.log", "wb") as log:
            self._process = subprocess.Popen(
                [
                    "unshare",
                    *KINDS,
                    *("--fork", "--kill-child", "--mount-proc", "sh", "-c", BEGIN, "sh"),
                    *arguments,
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        with self._process.stdout as said:
            assert said.readline() == b"ready\n", (disk / "host.log").read_text()
        (first,) = psutil.Process(self._process.pid).children()
        self.pid = first.pid
        """Of its first process: with it everything ends."""
        self._namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        _ip("link", "set", self._cable, "master", BRIDGE, "up")
        for words in (
            ("address", "add", f"{self.address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("route", "add", "default", "via", f"{NETWORK}.254"),
        ):
            self.run(["ip", *words])

    def __repr__(self) -> str:
        return f"<{self.name} {self.address}>"

    def begin(
        self, argv: Sequence[str], log: str, environment: Mapping[str, str] = os.environ
    ) -> subprocess.Popen[bytes]:
        """Start a process there; what it says is appended to the file `log` of the host's disk."""
        with open(self.disk / log, "ab") as output:
            process = subprocess.Popen(
                [*self._enter(), *argv], env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self._begun.append(process)
        return process

    def run(
        self, argv: Sequence[str], environment: Mapping[str, str] = os.environ, limit_s: float = 90.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a process there to its end, which must be a good one."""
        done = subprocess.run(
            [*self._enter(), *argv], env=environment, capture_output=True, text=True, timeout=limit_s
        )
        assert done.returncode == 0, (argv, done.stderr)
        return done

    def processes(self) -> list[psutil.Process]:
        """All that run there, whoever their parent is."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == self._namespace:
                    found.append(process)
        return found

    def titles(self, prefix: str) -> list[str]:
        """What processes call themselves whose first words are `prefix`, in order; the dead do not count."""
        titles = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                if title.startswith(prefix) and process.status() != psutil.STATUS_ZOMBIE:
                    titles.append(title)
        return sorted(titles)

    def cut(self) -> None:
        """Pull its cable: what is said to it and by it is lost, and nobody is told."""
        _ip("link", "set", self._cable, "down")

    def heal(self) -> None:
        _ip("link", "set", self._cable, "up")

    def kill(self) -> None:
        """Everything there ends at this moment."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        for process in (self._process, *self._begun):
            process.wait(LIMIT_S)

    def unplug(self) -> None:
        """Take its cable away. The kernel does so, too, when it has cleared its namespace, a while later."""
        with contextlib.suppress(OSError):
            _ip("link", "delete", self._cable)

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *KINDS, f"--wd={REPOSITORY}"]


class Hosts:
    """All hosts of one bridge, and the directory where their disks are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mount_point = directory / "disk"
        self.mount_point.mkdir()
        self.hosts: list[Host] = []

    def add(self) -> Host:
        disk = self.directory / f"host-{len(self.hosts) + 1}"
        disk.mkdir()
        self.hosts.append(Host(len(self.hosts) + 1, disk, self.mount_point))
        return self.hosts[-1]

    def revive(self, host: Host) -> Host:
        """Give a host that was killed its power back: its disk is as it was, and nothing runs there."""
        index = self.hosts.index(host)
        self.hosts[index] = Host(index + 1, host.disk, self.mount_point)
        return self.hosts[index]


@contextlib.contextmanager
def hosts_on_a_bridge(count: int) -> Iterator[Hosts]:
    """So many hosts; at the end nothing of them is left. Skips the test where such things are not allowed."""
    if not os.environ.get("HEADRACE_IN_NAMESPACES"):
        pytest.skip("it needs namespaces of its own: sh tests/cluster/in_namespaces.sh pytest tests/...")
    try:
        _ip("link", "add", BRIDGE, "address", BRIDGE_MAC, "type", "bridge")
        _ip("address", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
    except OSError as error:
        pytest.skip(f"this machine has no bridges, or no `ip` (iproute2): {error}")
    directory = Path(tempfile.mkdtemp(prefix="hr-", dir="/tmp"))
    hosts = Hosts(directory)
    try:
        for _ in range(count):
            hosts.add()
        yield hosts
    finally:
        for host in hosts.hosts:
            host.kill()
            host.unplug()
        _ip("link", "delete", BRIDGE)
        shutil.rmtree(directory, ignore_errors=True)


def wait_for(what: str, condition: object, limit_s: float = LIMIT_S) -> float:
    """Wait until `condition()` is true; return how long it took."""
    assert callable(condition)
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < limit_s, f"after {limit_s} s still not: {what}"
        time.sleep(0.02)
    return time.monotonic() - began_s


def _ip(*words: str) -> None:
    """Raises OSError with what `ip` says."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
