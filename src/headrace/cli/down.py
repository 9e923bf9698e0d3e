"""`headrace down`: end a running system, on this machine or on a cluster.

Must not know how systems are held.
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from headrace.cli.options import DEFAULT_NAME, Address, Name, find_local_run_directory

POLL_S = 0.1


def down(
    name: Name = DEFAULT_NAME,
    address: Address = "",
    now: Annotated[bool, typer.Option("--now", help="On a cluster: do not wait for open requests.")] = False,
    limit: Annotated[
        float, typer.Option("--limit", help="Longest drain in seconds, as the config's drain_grace_s.", min=0)
    ] = 30.0,
) -> None:
    """Finish open requests, then stop everything of a running system."""
    local = find_local_run_directory(name)
    if local is not None and not address:
        _down_local(name, limit)
    else:
        import asyncio

        asyncio.run(_down_cluster(name, address, limit, now=now))
    typer.echo("stopped")


def _down_local(name: str, limit_s: float) -> None:
    from headrace.api.messages import Shutdown
    from headrace.control.admin import ask
    from headrace.control.drain import MARGIN_S
    from headrace.control.essentials import GATEWAY_GRACE_S
    from headrace.errors import HeadraceError

    path = find_local_run_directory(name)
    assert path is not None
    ask(path, Shutdown())
    deadline_s = time.monotonic() + limit_s + 2 * MARGIN_S + GATEWAY_GRACE_S
    while path.is_dir():
        if time.monotonic() > deadline_s:
            raise HeadraceError(f"{name!r} has not ended yet; see {path}/logs, or press Ctrl-C where it runs")
        time.sleep(POLL_S)


async def _down_cluster(name: str, address: str, limit_s: float, *, now: bool) -> None:
    from headrace.control.admin import NotRunning
    from headrace.control.cluster_system import ClusterSystem

    system = await ClusterSystem.connect(name, address or "auto")
    try:
        if not await system.is_there():
            raise NotRunning(f"no system called {name!r} is running on the cluster at {system.address}")
        await system.stop(limit_s, at_once=now)
    finally:
        system.close()
