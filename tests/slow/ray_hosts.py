"""A Ray cluster over several hosts, each with an address and a disk of its own, and one system on it.

The first host is the cluster's head; the gateway asks for a key, because other machines reach it.
Owns Ray's nodes, the system and how it is looked at. Must not know what a test does to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import psutil
from tests.cluster.hosts_rig import Host, Hosts, hosts_on_a_bridge, wait_for
from tests.cluster.ray_rig import HEADRACE, RAY, REPOSITORY, SMALL

from headrace.api.messages import GetStatus
from headrace.control.admin import NotRunning, ask
from headrace.control.cluster_watch import LIMIT_VARIABLE

RAY_PORT, GATEWAY_PORT = 6379, 8000
RAY_LIMIT_S, READY_LIMIT_S = 180.0, 180.0
STARTED = "Ray runtime started"
KEY = "hr-three-hosts"
EDGE = "edge"
"""What the label `kind` of every host but the head is."""
Status = dict[str, Any]


class RayHosts:
    """Hosts with a Ray node each, and a system on them."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self.head = hosts.hosts[0]
        self.ray_address = f"{self.head.address}:{RAY_PORT}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0",
            "PYTHONPATH": f"{REPOSITORY / 'src'}",
            "TMPDIR": str(hosts.mount_point),
            "XDG_STATE_HOME": str(hosts.mount_point / "state"),
        }
        self._system: subprocess.Popen[bytes] | None = None

    @property
    def hosts(self) -> list[Host]:
        return self._hosts.hosts

    @property
    def url(self) -> str:
        """Of the gateway on the head."""
        return f"http://{self.head.address}:{GATEWAY_PORT}/v1"

    def add_host(self) -> Host:
        """A machine that comes later, with a Ray node."""
        host = self._hosts.add()
        self.start_ray(host)
        wait_for_ray(host)
        return host

    def keep_store(self) -> None:
        """Have Ray keep on the head's disk what its GCS knows. Before `start_ray`."""
        store = self._hosts.mount_point / "store"
        self.environment |= {
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(store),
            LIMIT_VARIABLE: f"{RAY_LIMIT_S:.0f}",  # Ray's own starts take long on a busy machine
        }

    def revive_head(self) -> None:
        """The machine that was the head has power again, and Ray is started there as it was: until it runs,
        because Ray gives a start half a minute at most."""
        self.head = self._hosts.revive(self.head)
        log = self.head.disk / "ray.log"
        log.rename(self.head.disk / "ray-before.log")
        deadline_s = time.monotonic() + RAY_LIMIT_S
        while True:
            process = self._begin_ray(self.head)
            while process.poll() is None and time.monotonic() < deadline_s:
                if STARTED in log.read_text():
                    return
                time.sleep(0.1)
            assert time.monotonic() < deadline_s, log.read_text()[-3000:]

    def start_ray(self, host: Host) -> None:
        self._begin_ray(host)
        if host is self.head:  # the others need it
            wait_for_ray(host)

    def _begin_ray(self, host: Host) -> subprocess.Popen[bytes]:
        place = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
        labels = f"host={host.name}"
        if host is not self.head:
            place, labels = [f"--address={self.ray_address}"], f"{labels},kind={EDGE}"
        options = [f"--node-ip-address={host.address}", "--num-cpus=1", f"--labels={labels}", *SMALL]
        argv = [*RAY, "start", "--block", "--disable-usage-stats", *place, *options]
        return host.begin(argv, "ray.log", self.environment)

    def up(
        self,
        endpoints: Mapping[str, object],
        gateway: Mapping[str, object] | None = None,
        *,
        is_detached: bool = False,
    ) -> None:
        """Start `headrace up --launcher ray` on the head, and wait until it serves. is_detached: no command
        stays there."""
        config = {
            "endpoints": endpoints,
            "gateway": {"bind": f"{self.head.address}:{GATEWAY_PORT}", **(gateway or {})},
            "tenants": {"tests": {"keys": [f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"]}},
        }
        (self.head.disk / "config.yaml").write_text(json.dumps(config))
        path = str(self._hosts.mount_point / "config.yaml")
        argv = [*HEADRACE, "up", path, "--launcher", "ray", "--address", self.ray_address]
        if is_detached:
            self.head.run([*argv, "--detach"], self.environment, READY_LIMIT_S)
        else:
            self._system = self.head.begin(argv, "up.log", self.environment)
        self.wait("it serves", lambda status: bool(status["is_ready"]), READY_LIMIT_S)

    def down(self) -> None:
        """Ctrl-C, or where no command stayed there, another one."""
        if self._system is None:
            self.head.run([*HEADRACE, "down", "--address", self.ray_address], self.environment)
            return
        (command,) = psutil.Process(self._system.pid).children()  # of nsenter, which passes no signal on
        command.send_signal(signal.SIGINT)
        assert self._system.wait(90) == 0, (self.head.disk / "up.log").read_text()

    def drain(self, host: Host, status: Status, deadline_s: int) -> None:
        """As an operator tells Ray: this host goes in so many seconds, for maintenance."""
        (node_id,) = [node["node_id"] for node in status["nodes"] if node["address"] == host.address]
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=maintenance"]
        self.head.run(
            [
                *(*RAY, "drain-node", f"--address={self.ray_address}", f"--node-id={node_id}"),
                *(*reason, f"--deadline-remaining-seconds={deadline_s}"),
            ],
            self.environment,
        )

    # ---- looking ----------------

    def status(self) -> Status:
        """As `headrace status --json` on the head; empty while the controller does not answer."""
        for path in self.head.disk.glob("headrace-*/ray-*"):
            with contextlib.suppress(NotRunning):
                reply = ask(path, GetStatus())
                status: Status = msgspec.json.decode(msgspec.json.encode(reply.status))
                return status
        return {}

    def wait(self, what: str, condition: Callable[[Status], bool], limit_s: float = 60.0) -> Status:
        """Wait for a status like that and return it."""
        deadline_s = time.monotonic() + limit_s
        while True:
            status = self.status()
            if status and condition(status):
                return status
            assert time.monotonic() < deadline_s, (
                f"after {limit_s} s still not: {what}\n{self.explain(status)}"
            )
            time.sleep(0.05)

    def host_of(self, status: Status, replica: Status) -> Host | None:
        """Where a replica is. None: nowhere yet, or on a host that is no more."""
        addresses = {node["node_id"]: node["address"] for node in status["nodes"]}
        address = addresses.get(replica["node"])
        return next((host for host in self.hosts if host.address == address), None)

    def names_on(self, status: Status, host: Host) -> list[str]:
        """The replicas that the controller has on a host, in order."""
        return sorted(r["replica_id"] for r in status["replicas"] if self.host_of(status, r) is host)

    def gateways(self, status: Status) -> dict[Host, Status]:
        """The gateways that have a host, by it."""
        hosts = {f"http://{host.address}:{GATEWAY_PORT}/v1": host for host in self.hosts}
        return {hosts[gateway["url"]]: gateway for gateway in status["gateways"] if gateway["url"]}

    def explain(self, status: Status) -> str:
        """What somebody who looks into a failure wants to see."""
        names = ("replicas", "nodes", "endpoints", "gateways", "warnings")
        seen = [json.dumps({name: status.get(name) for name in names}, indent=1)]
        for host in self.hosts:
            seen += [f"---- {host}: {title}" for title in host.titles("headrace:")]
            for pattern in ("up.log", "headrace-*/*/logs/controller.log", "headrace-*/*/logs/router*.log"):
                for path in host.disk.glob(pattern):
                    seen.append(f"---- {host}: {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(seen)


def wait_for_ray(host: Host) -> None:
    """Wait until the host's Ray node is there; what Ray said is in the error."""
    log = host.disk / "ray.log"
    try:
        wait_for(f"{host} has joined", lambda: STARTED in log.read_text(), RAY_LIMIT_S)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text()[-3000:]}") from None


@contextlib.contextmanager
def ray_hosts(count: int, *, has_store: bool = False) -> Iterator[RayHosts]:
    """So many hosts with Ray; at the end nothing of them is left. has_store: the head's GCS has one."""
    with hosts_on_a_bridge(count) as hosts:
        cluster = RayHosts(hosts)
        if has_store:
            cluster.keep_store()
        for host in cluster.hosts:
            cluster.start_ray(host)
        for host in cluster.hosts:
            wait_for_ray(host)
        yield cluster


@contextlib.contextmanager
def serving_hosts(
    endpoints: Mapping[str, object], gateway: Mapping[str, object] | None = None
) -> Iterator[RayHosts]:
    """Three hosts with Ray, and a system on them that leaves nothing behind; a dead one has nothing."""
    with ray_hosts(3) as cluster:
        cluster.up(endpoints, gateway)
        yield cluster
        cluster.down()
        for host in cluster.hosts:
            wait_for(f"nothing is left on {host}", lambda host=host: not host.titles("headrace"))
