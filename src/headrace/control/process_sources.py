"""Where the controller's specs of processes come from: one machine, a cluster with the gateways beside the
controller, or a cluster with gateways on nodes of their own.

Must not know: when what is started.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.api.config import Config
from headrace.api.messages import GatewaySpec, ProcessSpec
from headrace.control.specs import (
    cluster_replica_process,
    durable_process,
    placed_durable_process,
    replica_process,
)
from headrace.gateway.placed import placed_specs
from headrace.gateway.process import prepare, process_specs


@dataclass(frozen=True, slots=True)
class ProcessSources:
    """Where specs of processes come from; tests put programs of their own in their place."""

    prepare_gateway: Callable[[GatewaySpec], list[ProcessSpec]]
    """For a fresh start: writes one gateway's files and returns the specs of its processes."""
    gateway_processes: Callable[[GatewaySpec], list[ProcessSpec]]
    """The same specs without touching the files, which hold the running replicas."""
    prepare_replica: Callable[[Config, str, str, Path, bool], ProcessSpec] = replica_process
    """Config, endpoint, replica id, run directory, whether it is to be a standby."""
    prepare_durable: Callable[[Config, str, str, str, Path], ProcessSpec] = durable_process
    """Config, endpoint, durable front's id, gateway's id, run directory."""


def cluster_sources(config: Config) -> ProcessSources:
    """Return the sources of a system on a cluster, with its gateways beside the controller or elsewhere."""
    if config.gateway.placement is None:
        return ProcessSources(prepare, process_specs, cluster_replica_process)
    return ProcessSources(placed_specs, placed_specs, cluster_replica_process, placed_durable_process)
