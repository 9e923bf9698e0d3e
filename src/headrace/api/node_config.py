"""Where a system runs beyond one machine: the cluster, and which of its nodes a replica may be on.

Owns meaning, unit and default of each of these settings. Must not know: how nodes are had.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from headrace.api.section import Section

RESOURCE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]{0,63}")
LABEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,126}")
LABEL_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_resources(resources: dict[str, float]) -> dict[str, float]:
    """Return `resources`. Raises ValueError that says what is allowed."""
    for name, amount in resources.items():
        if not RESOURCE_NAME.fullmatch(name):
            raise ValueError(f"resource name {name!r}: use CPU, GPU, memory, or letters, digits and . _ : -")
        if not math.isfinite(amount) or not 0 < amount <= 1e15:
            raise ValueError(f"resource {name} is {amount}; it must be more than 0")
        if name == "GPU" and amount > 1 and amount != int(amount):
            raise ValueError(f"resource GPU is {amount}; above 1 it must be a whole number")
    return resources


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    """Return `labels`. Raises ValueError that says what is allowed."""
    for name, value in labels.items():
        if not LABEL_NAME.fullmatch(name) or not LABEL_VALUE.fullmatch(value):
            raise ValueError(
                f"label {name}={value}: use letters, digits and . _ / - for names, and no / in values"
            )
    return labels


Resources = Annotated[dict[str, float], AfterValidator(check_resources)]
Labels = Annotated[dict[str, str], AfterValidator(check_labels)]


class Ray(Section):
    """The Ray cluster that launcher ray uses."""

    address: str = "auto"
    """host:port of its head. auto: RAY_ADDRESS, or the cluster that this machine is part of."""

    @field_validator("address")
    @classmethod
    def _check_address(cls, value: str) -> str:
        _, separator, port = value.rpartition(":")
        if value != "auto" and (not separator or not port.isdigit() or not 0 < int(port) <= 65535):
            raise ValueError(f"{value!r} is neither auto nor host:port; write for example 10.0.0.1:6379")
        return value


class NodeChoice(Section):
    """One kind of node. What it does not say is as in the section that it belongs to."""

    labels: Labels = {}
    """Labels that the node must have, in addition."""
    accelerator_type: str = ""
    """Empty: as in the section."""
    wait_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """How long such a node is waited for before the next one of the list is tried; the last one is waited for
    without a limit."""


class NodeSettings(Section):
    """What a node must have to get a replica. Only launcher ray looks at it."""

    resources: Resources = {}
    """Amount of each resource that a replica takes: CPU, GPU, memory (bytes), or a name of the cluster's own.
    Without CPU: the threads of its engine; a simulated engine takes a tenth of one."""
    accelerator_type: str = ""
    """Type of GPU, in Ray's words: H100, L4. Empty: any."""
    labels: Labels = {}
    """Labels that the node must have, each with its value."""
    strategy: Literal["spread", "pack"] = "spread"
    """spread: replicas of one endpoint go to different nodes while there are some. pack: to few nodes."""
    rank_strategy: Literal["strict_pack", "pack"] = "strict_pack"
    """Where the ranks of a replica are (native.tensor_parallel), in the words of Ray's placement groups.
    strict_pack: on one node, where they share memory. pack: on as few nodes as have room. On several they
    meet over TCP, four times per layer and step: for networks that one would use NCCL on."""
    prefer: Annotated[list[NodeChoice], Field(max_length=8)] = []
    """Kinds of nodes in order of preference, such as spot before on-demand."""

    @model_validator(mode="after")
    def _check_accelerator(self) -> NodeSettings:
        if self.accelerator_type and "GPU" not in self.resources:
            raise ValueError(
                f"accelerator_type is {self.accelerator_type}, and resources ask for no GPU; "
                "add resources: {GPU: 1}"
            )
        return self


class GatewayPlacement(Section):
    """The nodes that hold gateways, one on each. Only launcher ray can do that."""

    resources: Resources = {}
    """Amount of each resource that a gateway takes, as for a replica. Without CPU: one core per thread of its
    HAProxy."""
    labels: Labels = {}
    """Labels that the node must have, each with its value."""
