"""`headrace up`: hold a system in the foreground, and show what its replicas do until it is ready.

Owns what is shown. Must not know how processes are held (`headrace.control.hold`).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.options import DEFAULT_NAME, ConfigPath, Name, Settings, find_run_directory, load

if TYPE_CHECKING:
    from headrace.api.messages import AdminCommand, AdminReply
    from headrace.cli.progress import Progress
    from headrace.fabric.supervisor import Supervisor

POLL_S = 0.1
MAX_CONTROLLER_FAILURES = 4
"""A controller that ends so often in a row before the system was ready will not get better."""


class _Outcome:
    """Why the system ended, when that was not the user's wish."""

    error = ""


def up(
    config: ConfigPath = None,
    settings: Settings = None,
    name: Name = DEFAULT_NAME,
    launcher: Annotated[
        str, typer.Option("--launcher", help="local or ray; as in the config if it is not given.")
    ] = "",
    address: Annotated[
        str, typer.Option("--address", help="host:port of the Ray cluster's head; as ray.address.")
    ] = "",
    detach: Annotated[
        bool,
        typer.Option("--detach", help="With launcher ray: return once it is ready, and leave it running."),
    ] = False,
    ready_timeout: Annotated[
        float,
        typer.Option("--ready-timeout", help="Give up when nothing is ready after so many seconds.", min=1),
    ] = 600.0,
) -> None:
    """Serve. Ctrl-C finishes open requests and stops everything; a second Ctrl-C stops at once."""
    began_s = time.monotonic()
    from headrace.cli.progress import make_progress
    from headrace.control.hold import hold_system
    from headrace.control.identity import open_identity
    from headrace.control.preflight import check_address, check_keys, check_models
    from headrace.errors import ConfigError, HeadraceError

    chosen = [f"launcher={launcher}"] * bool(launcher) + [f"ray.address={address}"] * bool(address)
    checked = check_keys(check_models(load(config, [*(settings or ()), *chosen])))
    if checked.launcher == "ray":
        from headrace.cli.up_cluster import up_cluster

        up_cluster(checked, name, began_s, ready_timeout, detach=detach)
        return
    if detach:
        raise ConfigError("--detach needs launcher ray: on one machine everything ends with `headrace up`")
    directory = find_run_directory(name)
    checked = check_address(checked)
    progress = make_progress(began_s, bool(checked.tenants))
    for note in open_identity(checked).describe_keyless(checked):
        progress.notice(note)
    outcome = _Outcome()

    async def watch(supervisor: Supervisor, run_directory: Path) -> None:
        await _watch(supervisor, run_directory, progress, ready_timeout, outcome)

    try:
        hold_system(checked, directory, watch, progress.notice)
    except OSError as error:
        raise HeadraceError(f"the system cannot be started: {error}") from error
    finally:
        progress.close()
    if outcome.error:
        raise HeadraceError(outcome.error)
    print("stopped", file=sys.stderr)


async def _watch(
    supervisor: Supervisor, run_directory: Path, progress: Progress, limit_s: float, outcome: _Outcome
) -> None:
    """Show progress until ready; stop the system if it cannot get there."""
    from headrace.control.admin import ask_async

    async def ask(command: AdminCommand) -> AdminReply:
        return await ask_async(run_directory, command, limit_s=2.0)

    async def find_failure() -> str:
        has_failed = supervisor.controller_failures >= MAX_CONTROLLER_FAILURES
        return f"the controller keeps ending:\n{supervisor.controller_last_output}" if has_failed else ""

    outcome.error = await show_until_ready(ask, find_failure, progress, limit_s)
    if outcome.error:
        supervisor.stop("giving up")


async def show_until_ready(
    ask: Callable[[AdminCommand], Awaitable[AdminReply]],
    find_failure: Callable[[], Awaitable[str]],
    progress: Progress,
    limit_s: float,
) -> str:
    """Show progress until the system serves. Returns why it cannot get there; empty: it serves.

    find_failure: why there is no controller and will be none; empty: not so.
    """
    from headrace.api.messages import GetStatus, SystemStatus
    from headrace.control.admin import NotRunning
    from headrace.control.serve import describe_unready, hopeless_error

    deadline_s = time.monotonic() + limit_s
    status: SystemStatus | None = None
    while True:
        error = ""
        with contextlib.suppress(NotRunning):
            reply = await ask(GetStatus())
            assert reply.status is not None
            status = reply.status
            progress.show(status)
            if status.is_ready:
                progress.ready(status)
                return ""
            error = hopeless_error(status)
        error = await find_failure() or error
        if not error and time.monotonic() > deadline_s:
            error = f"not ready after {limit_s:.0f} s: {describe_unready(status)}"
            if status is not None and any(endpoint.ready for endpoint in status.endpoints):
                progress.notice(f"{error}; serving with what is ready")
                return ""
        if error:
            return error
        await asyncio.sleep(POLL_S)
