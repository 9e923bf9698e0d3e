"""A system on a Ray cluster, from outside: started, asked, stopped. And its controller's launcher.

Owns the order of begin and end on a cluster. Must not know: what is shown to the user meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from pathlib import Path

import msgspec

from headrace.api.config import Config
from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import AdminCommand, AdminReply, Shutdown
from headrace.api.run_paths import HEARTBEAT_FILE, IDENTITY_FILE
from headrace.clock import SystemClock
from headrace.control.admin import ANSWER_LIMIT_S, NoAnswer, NotRunning, checked_reply
from headrace.control.drain import MARGIN_S
from headrace.control.essentials import GATEWAY_GRACE_S
from headrace.control.specs import ADMIN_SOCKET, cluster_controller_process
from headrace.errors import ConfigError
from headrace.fabric.cluster import ClusterUnavailable, HostLost, HostSilent, HostUnavailable
from headrace.fabric.cluster_identity import identity_pem, make_secret
from headrace.fabric.heartbeat import beat
from headrace.fabric.host_messages import CONTROLLER_GROUP, HostReport
from headrace.fabric.launcher import Launcher
from headrace.fabric.ray_cluster import RayCluster
from headrace.fabric.ray_launcher import RayLauncher

STOP_MARGIN_S = 5.0
_POLL_S = 0.2
_DESCRIBE_LIMIT_S = 5.0


async def connect_launcher(run_directory: Path, system: str) -> Launcher:
    """Return the launcher of `system` for its controller. Raises LauncherLost, ClusterUnavailable, or OSError
    if its identity is not in `run_directory`, where its keeper has put it."""
    identity = (run_directory / IDENTITY_FILE).read_bytes()
    cluster = await RayCluster.connect(system, "auto")
    heartbeat = functools.partial(beat, run_directory / HEARTBEAT_FILE)
    return await RayLauncher.connect(cluster, SystemClock(), identity, run_directory, heartbeat)


def check_for_cluster(config: Config) -> Config:
    """Return `config`. Raises ConfigError if it cannot be used on a cluster."""
    if config.gateway.bind.endswith(":0"):
        raise ConfigError(
            f"gateway.bind is {config.gateway.bind}; with launcher ray choose a port, because the gateway "
            "may be on another machine than this command: --set gateway.bind=0.0.0.0:8000"
        )
    return config


async def ask_once(name: str, address: str, command: AdminCommand) -> AdminReply:
    """Ask the controller of `name` on the cluster at `address`. Raises NotRunning, CommandRefused or
    ClusterUnavailable."""
    system = await ClusterSystem.connect(name, address)
    try:
        return await system.ask(command)
    finally:
        system.close()


class ClusterSystem:
    """One system on a cluster. Made by `connect`; `close` leaves it running."""

    def __init__(self, name: str, cluster: RayCluster) -> None:
        self._name = name
        self._cluster = cluster

    def __repr__(self) -> str:
        return f"ClusterSystem({self._name}, {self._cluster})"

    @property
    def address(self) -> str:
        """Of the cluster's head."""
        return self._cluster.address

    @classmethod
    async def connect(cls, name: str, address: str) -> ClusterSystem:
        """Connect to the cluster at `address`. Raises ClusterUnavailable."""
        return cls(name, await RayCluster.connect(name, address))

    async def start(self, config: Config) -> None:
        """Start the controller, which starts everything else, with an identity that is this system's alone.
        Raises ClusterUnavailable, HeadraceError if a package is missing."""
        if await self._cluster.has_controller():
            raise ClusterUnavailable(
                f"a system called {self._name!r} already runs on this cluster. "
                f"Stop it (headrace down --name {self._name}), or give this one another --name."
            )
        for key in await self._cluster.hosts():
            await self._cluster.release(key)  # left by a system that did not end well; also its config
        spec = cluster_controller_process(config, self._name)
        await self._cluster.start_controller(spec, identity_pem(make_secret()))

    async def is_held(self) -> bool:
        """Whether its controller has a host, which Ray starts again if it ends."""
        return await self._cluster.has_controller()

    async def home_address(self) -> str:
        """Return the address of the controller's machine, where the gateways are. Raises NotRunning."""
        try:
            report = await self._describe()
        except HostLost as error:
            raise NotRunning(f"the controller of {self._name!r} has no host: {error}") from None
        if report is None:
            raise NoAnswer(f"the host of the controller of {self._name!r} does not answer")
        return report.address

    async def is_there(self) -> bool:
        """Whether anything of it is on the cluster."""
        return await self._cluster.has_controller() or bool(await self._cluster.hosts())

    async def ask(self, command: AdminCommand, limit_s: float = ANSWER_LIMIT_S) -> AdminReply:
        """Send a command to the controller. Raises NotRunning or CommandRefused."""
        frame = encode_frame(command)
        try:
            data = await self._cluster.call(CONTROLLER_GROUP, "ask", ADMIN_SOCKET, frame, limit_s=limit_s)
        except HostLost as error:
            raise NotRunning(
                f"no system called {self._name!r} answers on this cluster: {error}. Start it with: "
                "headrace up --launcher ray CONFIG.yaml"
            ) from None
        except HostSilent as error:
            raise NoAnswer(f"the controller of {self._name!r} does not answer: {error}") from None
        decoder: FrameDecoder[AdminReply] = FrameDecoder(AdminReply)
        for reply in decoder.feed(data):
            return checked_reply(reply)
        raise NotRunning(f"the controller of {self._name!r} is not there right now; try again in a second")

    async def find_failure(self, max_failures: int) -> str:
        """Return why there will be no controller; empty: not so. max_failures: ends that are one too many."""
        try:
            report = await self._describe()
        except HostUnavailable:
            return ""  # Ray starts it again
        except HostLost as error:
            return f"the controller's host actor is gone: {error}"
        if report is None:
            return ""
        if report.error:
            return f"the controller's host: {report.error}"
        if report.num_failures >= max_failures:
            return f"the controller keeps ending:\n{report.last_output}"
        return ""

    async def stop(self, grace_s: float, *, at_once: bool = False) -> None:
        """Drain the system and remove everything of it from the cluster. grace_s: the longest drain."""
        limit_s = grace_s + 2 * MARGIN_S + GATEWAY_GRACE_S + STOP_MARGIN_S
        deadline_s = time.monotonic() + (0.0 if at_once else limit_s)
        has_said_so = False
        while time.monotonic() < deadline_s:
            try:
                report = await self._describe()
            except HostUnavailable:
                report = None  # Ray starts it again
            except HostLost:
                break
            if has_said_so and report is not None and not report.processes:
                break
            if not has_said_so:
                with contextlib.suppress(NotRunning):
                    await self.ask(Shutdown())
                    has_said_so = True
            await asyncio.sleep(_POLL_S)
        await self._cluster.release(CONTROLLER_GROUP)  # first, or it would start others again
        for key in await self._cluster.hosts():
            await self._cluster.release(key)

    def close(self) -> None:
        self._cluster.close()

    async def _describe(self) -> HostReport | None:
        """Return what the controller's host actor says; None: nothing in time. Raises HostLost."""
        try:
            answer = await self._cluster.call(CONTROLLER_GROUP, "describe", limit_s=_DESCRIBE_LIMIT_S)
        except HostSilent:
            return None
        return msgspec.msgpack.decode(answer, type=HostReport)
