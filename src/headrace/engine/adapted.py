"""`python -m headrace.engine.adapted --fd N --spec JSON`: an engine process around somebody else's engine.

Python imports the main module again in each process that is spawned below this one, as `__mp_main__`, before
anything else happens there: that is where it asks the kernel to die with its parent. So whatever becomes of
this process, nothing that vLLM started outlives it.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.api.messages import EngineSpec
    from headrace.clock import Clock
    from headrace.engine.channel import FrontChannel
    from headrace.engine.process import DrainSignal
    from headrace.engine.start_phases import StartPhases

_SPAWNER = "HEADRACE_SPAWNER_PID"


def run_adapted(
    spec: EngineSpec, channel: FrontChannel, drain: DrainSignal, clock: Clock, phases: StartPhases
) -> None:
    """Start the backend that `spec` names, and run it to its end."""
    import asyncio

    import uvloop

    from headrace.engine.adapter import AdaptedEngine, warm_up
    from headrace.engine.adapter_loop import AdapterLoop
    from headrace.engine.process import say_ready
    from headrace.engine.vllm_backend import start_vllm

    backend = start_vllm(spec, phases.begin)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            phases.begin("loading the adapters")
            runner.run(backend.load_adapters())
            phases.begin("computing the first tokens")
            runner.run(warm_up(backend))
            say_ready(backend.ready, channel, drain, phases)
            engine = AdaptedEngine(backend, clock)
            runner.run(AdapterLoop(engine, channel, drain, clock).run())
    finally:
        backend.close()


def become_spawner() -> None:
    """What is spawned from now on knows by whom."""
    os.environ[_SPAWNER] = str(os.getpid())


def die_with_spawner() -> None:
    """In a spawned process: die with the one that spawned it, or now if that is gone already."""
    from headrace.lifetime import die_with_parent

    die_with_parent()
    spawner = os.environ.get(_SPAWNER, "")
    if spawner != str(os.getppid()) and spawner.isdecimal() and not _is_alive(int(spawner)):
        os._exit(1)  # it died before the kernel was asked
    become_spawner()


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


if __name__ == "__mp_main__":
    die_with_spawner()
if __name__ == "__main__":
    from headrace.engine.process import main

    become_spawner()
    sys.exit(main(run=run_adapted))
