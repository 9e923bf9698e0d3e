"""What hosts need, in the words of Ray's placement groups and actors. Pure; must not know connections."""

from __future__ import annotations

import math
from typing import Any

from headrace.api.messages import NodeNeeds
from headrace.fabric.node_choice import ACCELERATOR_PREFIX

_ACCELERATOR_SHARE = 0.001


def bundle(needs: NodeNeeds, num_hosts: int) -> dict[str, float]:
    """What each of `num_hosts` hosts gets of what they need together."""
    part = {name: amount / num_hosts for name, amount in needs.resources.items()}
    if memory := part.get("memory"):
        part["memory"] = float(math.ceil(memory))  # whole bytes, says Ray
    accelerator = {f"{ACCELERATOR_PREFIX}{needs.accelerator_type}": _ACCELERATOR_SHARE}
    return {**part, **(accelerator if needs.accelerator_type else {})}


def actor_options(needs: NodeNeeds, num_hosts: int) -> dict[str, Any]:
    """The actor takes all of its bundle, so that Ray shows it the GPUs that it has."""
    rest = bundle(needs, num_hosts)
    options: dict[str, Any] = {"num_cpus": rest.pop("CPU", 0), "num_gpus": rest.pop("GPU", 0)}
    if memory := rest.pop("memory", 0):
        options["memory"] = memory
    return {**options, "resources": rest}
