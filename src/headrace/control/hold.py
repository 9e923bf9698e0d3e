"""Holds one running system in this process: run directory, supervisor, signals. For `headrace up` and serve.

Owns the order of begin and end. Must not know: what is shown to the user meanwhile.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from setproctitle import setproctitle

from headrace.api.config import Config
from headrace.control.applied import write_config
from headrace.control.specs import controller_process
from headrace.fabric.run_directory import RunDirectory
from headrace.fabric.supervisor import Supervisor

Watch = Callable[[Supervisor, Path], Coroutine[Any, Any, None]]
"""Runs beside the system and may stop it; it is cancelled at the end."""


def hold_system(config: Config, directory: Path, watch: Watch, on_notice: Callable[[str], None]) -> None:
    """Run the system of `config` until it is stopped; nothing of it is left afterwards.

    SIGINT, SIGTERM or SIGHUP drain it, a second one kills it. Raises RunDirectoryError or OSError.
    """
    run_directory = RunDirectory.create(directory)
    try:
        write_config(run_directory.path, config)
        setproctitle("headrace: up")
        asyncio.run(_run(run_directory.path, watch, on_notice))
    finally:
        run_directory.remove()


async def _run(run_directory: Path, watch: Watch, on_notice: Callable[[str], None]) -> None:
    supervisor = Supervisor(run_directory, controller_process(run_directory), on_notice)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, supervisor.stop, "stopping: open requests are finished first")
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch(supervisor, run_directory))
        await supervisor.run()
        watching.cancel()
