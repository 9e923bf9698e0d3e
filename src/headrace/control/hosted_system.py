"""A system on a Ray cluster that somebody else's deployment holds: made what a config says, checked, ended.

Owns what is started, changed and awaited in which order, and when it counts as healthy. It can be made anew
at any time: the system goes on meanwhile, and is found again. Must not know: who asks
(`headrace.fabric.ray_serve`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from headrace.api.config import Config
from headrace.api.config_loader import parse_config
from headrace.api.messages import (
    AdminCommand,
    AdminReply,
    ApplyConfig,
    EndpointStatus,
    GetStatus,
    SystemStatus,
)
from headrace.control.admin import NoAnswer, NotRunning
from headrace.control.cluster_system import ClusterSystem, check_for_cluster
from headrace.control.preflight import check_keys, check_models
from headrace.control.serve import StartFailed, describe_unready, hopeless_error
from headrace.control.status import gateway_url
from headrace.errors import ConfigError, HeadraceError

READY_LIMIT_S = 1800.0
"""Of a start, nodes that come and models that are fetched included."""
MAX_CONTROLLER_FAILURES = 4
"""A controller that ends so often in a row before the system was ready will not get better."""
_POLL_S = 0.25
_log = logging.getLogger(__name__)


class RunningSystem(Protocol):
    """A system on a cluster, as `ClusterSystem` is one."""

    async def is_held(self) -> bool: ...

    async def start(self, config: Config) -> None: ...

    async def ask(self, command: AdminCommand) -> AdminReply: ...

    async def find_failure(self, max_failures: int) -> str: ...

    async def home_address(self) -> str: ...

    async def stop(self, grace_s: float, *, at_once: bool = False) -> None: ...

    def close(self) -> None: ...


Connect = Callable[[str], Awaitable[RunningSystem]]


async def connect_here(name: str) -> RunningSystem:
    """Return the system `name` of the cluster that this process is part of. Raises ClusterUnavailable."""
    return await ClusterSystem.connect(name, "")


class HostedSystem:
    """Holds one system by its name."""

    def __init__(
        self,
        name: str,
        ready_limit_s: float = READY_LIMIT_S,
        connect: Connect = connect_here,
    ) -> None:
        """ready_limit_s: how long a start or a change may take until it serves."""
        self._name = name
        self._ready_limit_s = ready_limit_s
        self._connect = connect
        self._system: RunningSystem | None = None
        self._config: Config | None = None
        """The last one that the system took from us."""

    def __repr__(self) -> str:
        return f"HostedSystem({self._name}, {'nothing applied' if self._config is None else 'applied'})"

    async def apply(self, tree: Mapping[str, Any]) -> None:
        """Start the system, or change the one that is there; return once it serves.

        Raises HeadraceError; a system that served before goes on as it was. One that was started here and
        does not get ready within the limit is ended again: nobody may be left to end it.
        """
        config = checked_config(tree)
        system = await self._connected()
        if await system.is_held():
            await self._change(system, config)
            self._config = config
            await self._wait_until_serving(system, config)
            return
        await system.start(config)
        self._config = config
        try:
            await self._wait_until_serving(system, config)
        except StartFailed:
            await system.stop(0.0, at_once=True)
            self._config = None
            raise

    async def check(self) -> None:
        """Raise HeadraceError unless the system answers and serves."""
        if self._system is None or self._config is None:
            raise StartFailed(
                "nothing is served: there is no user_config. Put headrace's config there "
                "(docs/guides/ray-serve.md)"
            )
        status = await _status_of(self._system)
        if reason := why_not_serving(status, self._config):
            raise StartFailed(reason)

    async def describe(self) -> dict[str, Any]:
        """Return where the gateways are, and how the system stands. Nothing of tenants or keys."""
        if self._system is None or self._config is None:
            return {"name": self._name, "state": "nothing applied", "gateways": []}
        try:
            status = await _status_of(self._system)
        except HeadraceError as error:
            return {"name": self._name, "state": "not answering", "gateways": [], "reason": str(error)}
        reason = why_not_serving(status, self._config)
        return {
            "name": self._name,
            "version": status.version,
            "state": "not serving" if reason else "serving",
            "reason": reason,
            "gateways": await self._urls(self._system, self._config, status),
            "endpoints": {endpoint.name: _counts(endpoint) for endpoint in status.endpoints},
            "rollouts": {
                rollout.endpoint: {"state": rollout.state, "reason": rollout.reason}
                for rollout in status.rollouts
            },
        }

    async def leave(self, *, is_deleted: bool) -> None:
        """Leave the system running; or drain it and remove it, if it is deleted."""
        if self._system is None:
            return
        try:
            if is_deleted:
                sections = self._config.endpoints.values() if self._config is not None else ()
                await self._system.stop(max((section.drain_grace_s for section in sections), default=0.0))
        finally:
            self._system.close()
            self._system = None

    # ---- inside ----------------

    async def _connected(self) -> RunningSystem:
        if self._system is None:
            self._system = await self._connect(self._name)
        return self._system

    async def _change(self, system: RunningSystem, config: Config) -> None:
        """Apply to what runs; while its controller is being restarted, again and again."""
        deadline_s = time.monotonic() + self._ready_limit_s
        command = ApplyConfig(config.model_dump_json())
        while True:
            try:
                for note in (await system.ask(command)).notes:
                    _log.info("%s", note)
            except NotRunning as error:  # applying twice does what applying once does
                failure = await system.find_failure(MAX_CONTROLLER_FAILURES)
                if failure or time.monotonic() >= deadline_s:
                    raise StartFailed(failure or str(error)) from None
            else:
                return
            await asyncio.sleep(_POLL_S)

    async def _wait_until_serving(self, system: RunningSystem, config: Config) -> None:
        """Raises StartFailed when it cannot, or has not within the limit."""
        deadline_s = time.monotonic() + self._ready_limit_s
        status: SystemStatus | None = None
        while True:
            failure = ""
            with contextlib.suppress(NotRunning):
                status = await _status_of(system)
                if not why_not_serving(status, config):
                    return
                failure = hopeless_error(status)
            failure = failure or await system.find_failure(MAX_CONTROLLER_FAILURES)
            if not failure and time.monotonic() >= deadline_s:
                failure = f"not ready after {self._ready_limit_s:.0f} s: {describe_unready(status)}"
            if failure:
                raise StartFailed(failure)
            await asyncio.sleep(_POLL_S)

    async def _urls(self, system: RunningSystem, config: Config, status: SystemStatus) -> list[str]:
        """Where clients reach the gateways: each on its node, or all at one address of the controller's."""
        if config.gateway.placement is not None:
            return [gateway.url for gateway in status.gateways if gateway.url]
        return [gateway_url(config.gateway, await system.home_address())]


def checked_config(tree: Mapping[str, Any]) -> Config:
    """Return the config in `tree` for the cluster that this process is part of. Raises ConfigError."""
    config = parse_config({"launcher": "ray", **tree}, source="user_config")
    problems = []
    if config.launcher != "ray":
        problems.append(f"user_config: launcher is {config.launcher}; Ray Serve hosts with ray: leave it out")
    if "ray" in tree:
        problems.append("user_config: ray is set; it is this cluster in any case: leave it out")
    if problems:
        raise ConfigError(problems)
    return check_keys(check_models(check_for_cluster(config)))


def why_not_serving(status: SystemStatus, config: Config) -> str:
    """Return why `status` does not count as healthy; empty: it does. More may be wanted than is there: a
    gateway must answer, and each endpoint have the least that the config names."""
    if status.is_ready:
        return ""
    if not any(
        gateway.is_answering and gateway.router == gateway.haproxy == "running" for gateway in status.gateways
    ):
        return f"no gateway answers: {describe_unready(status)}"
    changing = {rollout.endpoint for rollout in status.rollouts if rollout.state in ("running", "paused")}
    short = [
        f"{endpoint.name} has {endpoint.ready} of {least} replicas"
        for endpoint in status.endpoints
        if endpoint.ready < (least := _least(endpoint, config, is_changing=endpoint.name in changing))
    ]
    return f"{', '.join(short)}: {describe_unready(status)}" if short else ""


def _least(endpoint: EndpointStatus, config: Config, *, is_changing: bool) -> int:
    """While versions change one less may be there than wanted, and with one place only, none."""
    section = config.endpoints.get(endpoint.name)
    least = min(endpoint.desired, section.replicas.min if section is not None else 0)
    return max(0, least - 1) if is_changing else least


def _counts(endpoint: EndpointStatus) -> dict[str, int]:
    return {"ready": endpoint.ready, "wanted": endpoint.desired, "held": endpoint.num_held}


async def _status_of(system: RunningSystem) -> SystemStatus:
    reply = await system.ask(GetStatus())
    if reply.status is None:
        raise NoAnswer("the controller answered without a status")
    return reply.status
