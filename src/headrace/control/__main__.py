"""`python -m headrace.control RUN_DIR [SYSTEM]`: the controller process, started and restarted by the
supervisor, or with a SYSTEM by its keeper on a cluster.

Exit status 0: it was asked to end and has drained. Anything else: the supervisor starts it again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path

from setproctitle import setproctitle

from headrace.clock import SystemClock
from headrace.control.app import Controller
from headrace.control.applied import read_config
from headrace.control.process_sources import ProcessSources, cluster_sources
from headrace.errors import HeadraceError
from headrace.fabric.launcher import Launcher
from headrace.fabric.local import LocalLauncher
from headrace.fabric.run_directory import only_controller
from headrace.gateway.process import prepare, process_specs


async def _run(run_directory: Path, system: str) -> None:
    config = read_config(run_directory)
    launcher: Launcher
    if system:
        from headrace.control.cluster_system import connect_launcher

        launcher = await connect_launcher(run_directory, system)
        sources = cluster_sources(config)
    else:
        launcher = await LocalLauncher.connect(run_directory)
        sources = ProcessSources(prepare, process_specs)
    controller = Controller(run_directory, config, launcher, sources, SystemClock())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, controller.stop)
    await controller.run()


def _message_of(error: BaseException) -> str | None:
    """What to say of an error that needs no traceback; None: it is a bug of ours."""
    if isinstance(error, BaseExceptionGroup):
        messages = [_message_of(inner) for inner in error.exceptions]
        return None if None in messages else "; ".join(filter(None, messages))
    return str(error) if isinstance(error, HeadraceError | OSError) else None


def main() -> int:
    setproctitle("headrace: controller")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        run_directory, system = Path(sys.argv[1]), "".join(sys.argv[2:3])
        with only_controller(run_directory):
            asyncio.run(_run(run_directory, system))
    except Exception as error:
        message = _message_of(error)
        if message is None:
            raise
        logging.error("%s", message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
