"""`headrace up --launcher ray`: start a system on a Ray cluster, show how it gets ready, and end it.

Owns what is shown and what Ctrl-C does. Must not know how a system is held there
(`headrace.control.cluster_system`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from headrace.cli.progress import Progress, make_progress
from headrace.cli.up import MAX_CONTROLLER_FAILURES, show_until_ready
from headrace.clock import SystemClock
from headrace.control.cluster_system import ClusterSystem, check_for_cluster
from headrace.control.cluster_watch import ClusterWatch, watch_cluster
from headrace.control.identity import open_identity
from headrace.errors import HeadraceError

if TYPE_CHECKING:
    from headrace.api.config import Config

FAILURE_PERIOD_S = 2.0


def up_cluster(config: Config, name: str, began_s: float, ready_limit_s: float, *, detach: bool) -> None:
    """Serve on a cluster. Returns when the user stopped it, or with detach as soon as it serves."""
    checked = check_for_cluster(config)
    progress = make_progress(began_s, bool(checked.tenants))
    for note in open_identity(checked).describe_keyless(checked):
        progress.notice(note)
    try:
        error = asyncio.run(_hold(checked, name, progress, ready_limit_s, detach=detach))
    finally:
        progress.close()
    if error:
        raise HeadraceError(error)
    if not detach:
        print("stopped", file=sys.stderr)


async def _hold(config: Config, name: str, progress: Progress, ready_limit_s: float, *, detach: bool) -> str:
    """Returns why it could not serve; empty: it was stopped, or left running as wished."""
    stops: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    system = await ClusterSystem.connect(name, config.ray.address)
    watch = ClusterWatch(system.address, os.environ, progress.notice)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stops.put_nowait, None)
    try:
        progress.notice(f"connected to the Ray cluster at {system.address}")
        await system.start(config)
        failure = _Failure(system)
        showing = asyncio.create_task(show_until_ready(system.ask, failure.find, progress, ready_limit_s))
        stopping = asyncio.create_task(stops.get())
        watching = asyncio.create_task(watch_cluster(system, watch, SystemClock()))
        await asyncio.wait([showing, stopping, watching], return_when=asyncio.FIRST_COMPLETED)
        error = showing.result() if showing.done() else ""
        if detach and not error and showing.done() and not stopping.done():
            progress.notice(f"it stays; stop it with: headrace down --name {name}")
            return ""
        if not error:
            await asyncio.wait([stopping, watching], return_when=asyncio.FIRST_COMPLETED)
        showing.cancel()
        if watching.done():
            return watching.result()
        watching.cancel()
        progress.notice("giving up" if error else "stopping: open requests are finished first")
        await _stop(system, config, stops, progress)
        return error
    finally:
        if not watch.is_lost:  # Ray ends a process that leaves a cluster without a head before it says why
            system.close()


async def _stop(
    system: ClusterSystem, config: Config, stops: asyncio.Queue[None], progress: Progress
) -> None:
    """Drain and remove everything; at once when the user asks again."""
    grace_s = max(endpoint.drain_grace_s for endpoint in config.endpoints.values())
    draining = asyncio.create_task(system.stop(grace_s))
    again = asyncio.create_task(stops.get())
    await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        draining.cancel()
        progress.notice("stopping at once")
        await system.stop(0.0, at_once=True)
    else:
        again.cancel()
        draining.result()


class _Failure:
    """Finds out whether the controller keeps ending, by asking its host now and then."""

    def __init__(self, system: ClusterSystem) -> None:
        self._system = system
        self._asked_s = time.monotonic()

    async def find(self) -> str:
        """Return why there will be no controller; empty: not so."""
        now_s = time.monotonic()
        if now_s - self._asked_s < FAILURE_PERIOD_S:
            return ""
        self._asked_s = now_s
        return await self._system.find_failure(MAX_CONTROLLER_FAILURES)
