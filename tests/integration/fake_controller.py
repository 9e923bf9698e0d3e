"""The real controller process, with `fake_processes.py` in the place of fronts and gateway."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path

import msgspec
from setproctitle import setproctitle

from headrace.api.config import Config
from headrace.api.messages import GatewaySpec, ProcessSpec, haproxy_name, relay_name, router_name
from headrace.clock import SystemClock
from headrace.control import essentials, slots
from headrace.control.app import Controller
from headrace.control.applied import read_config
from headrace.control.process_sources import ProcessSources
from headrace.control.specs import replica_process
from headrace.fabric.local import LocalLauncher
from headrace.gateway.paths import GatewayPaths

FAKES = str(Path(__file__).with_name("fake_processes.py"))


def prepare_gateway(spec: GatewaySpec) -> list[ProcessSpec]:
    text = msgspec.json.encode(spec).decode()
    paths = GatewayPaths(spec.run_dir, spec.gateway_id)
    Path(paths.directory).mkdir(exist_ok=True)
    gateway_id = spec.gateway_id
    names = {
        "haproxy": haproxy_name(gateway_id),
        "router": router_name(gateway_id),
        "relay": relay_name(gateway_id),
    }
    return [
        ProcessSpec(name, [sys.executable, FAKES, role, text], log_path=paths.log(f"{name}.log"))
        for role, name in names.items()
    ]


def prepare_replica(
    config: Config, endpoint: str, replica_id: str, run_directory: Path, is_standby: bool
) -> ProcessSpec:
    spec = replica_process(config, endpoint, replica_id, run_directory, is_standby)
    return ProcessSpec(spec.name, [sys.executable, FAKES, "front", spec.argv[-1]], log_path=spec.log_path)


async def run(run_directory: Path) -> None:
    launcher = await LocalLauncher.connect(run_directory)
    sources = ProcessSources(prepare_gateway, prepare_gateway, prepare_replica)
    controller = Controller(run_directory, read_config(run_directory), launcher, sources, SystemClock())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, controller.stop)
    await controller.run()


if __name__ == "__main__":
    setproctitle("headrace: controller")
    # The same decisions at a faster pace: the real pace is checked on a virtual clock.
    slots.FIRST_RESTART_DELAY_S = 0.05
    slots.LOST_AFTER_S = 1.0
    essentials.HUNG_AFTER_S = 3.0
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(message)s")
    asyncio.run(run(Path(sys.argv[1])))
