"""Where on a cluster a replica or a gateway may be, from the config. Pure; must not know what runs there."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from headrace.api.config import Config
from headrace.api.endpoint_config import Endpoint
from headrace.api.messages import NodeNeeds, Place, ProcessSpec

SIMULATED_CPUS = 0.1
"""Of a core, for the placement of a replica that computes nothing."""


def gateway_place(config: Config) -> Place | None:
    """Return where on a cluster gateways may be; None: beside the controller."""
    placement = config.gateway.placement
    if placement is None:
        return None
    resources = {"CPU": float(config.gateway.num_threads), **placement.resources}
    return Place([NodeNeeds(resources, placement.labels)], "apart")


def avoiding(spec: ProcessSpec, nodes: Mapping[str, float]) -> ProcessSpec:
    """Return `spec`, kept from `nodes` for so many seconds each, if it may run on several."""
    if spec.place is None or not nodes:
        return spec
    return msgspec.structs.replace(spec, place=msgspec.structs.replace(spec.place, avoided=dict(nodes)))


def place_of(endpoint: Endpoint) -> Place:
    """Return where on a cluster a replica of `endpoint` may be."""
    nodes = endpoint.nodes
    resources = {"CPU": _cpus_of(endpoint), **nodes.resources}
    num_parts = endpoint.native.tensor_parallel if nodes.rank_strategy == "pack" else 1
    base = NodeNeeds(resources, nodes.labels, nodes.accelerator_type, num_parts=num_parts)
    choices = [
        msgspec.structs.replace(
            base,
            labels={**nodes.labels, **choice.labels},
            accelerator_type=choice.accelerator_type or nodes.accelerator_type,
            wait_s=choice.wait_s,
        )
        for choice in nodes.prefer
    ]
    return Place(choices or [base], nodes.strategy)


def _cpus_of(endpoint: Endpoint) -> float:
    """What a replica takes of its node's cores if its section does not say."""
    if endpoint.engine == "simulated":
        return SIMULATED_CPUS
    native = endpoint.native
    return float(native.num_threads or native.tensor_parallel) if endpoint.engine == "native" else 1.0
