"""Which node a process goes to, and why it has to wait for one. Pure.

Must not know: how places are had.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import msgspec

from headrace.api.messages import NodeNeeds, NodeState, Place

ACCELERATOR_PREFIX = "accelerator_type:"
"""A node with an accelerator offers a resource of this name and its type."""
_EPSILON = 1e-6
_SHOWN_NODES = 3


def choose_node(
    nodes: Sequence[NodeState],
    needs: NodeNeeds,
    strategy: Literal["spread", "pack", "apart"],
    num_same: Mapping[str, int],
) -> str:
    """Return the id of the node to ask for; empty: none has room now, whoever comes next will do.

    num_same: processes of the same family by node id. Among nodes with as many, spread takes the emptier one
    and pack the fuller one. apart is spread: those that it must not be are in `needs`.
    """
    sign = -1 if strategy == "pack" else 1
    fitting = [
        node for node in nodes if node.is_alive and _is_right(node, needs) and _has(node.available, needs)
    ]
    fitting.sort(
        key=lambda node: (sign * num_same.get(node.node_id, 0), -sign * _free_ratio(node), node.node_id)
    )
    return fitting[0].node_id if fitting else ""


def kept_apart(place: Place, needs: NodeNeeds, num_same: Mapping[str, int]) -> NodeNeeds:
    """Return `needs` with the nodes that it must not be, because one of its family is there."""
    if place.strategy != "apart":
        return needs
    return msgspec.structs.replace(
        needs, other_than=sorted(node for node, count in num_same.items() if count)
    )


def label_selector(
    needs: NodeNeeds, avoids: Collection[str] = (), num_bundles: int = 1
) -> list[dict[str, str]] | None:
    """Return what a node's labels must be, in Ray's words; None: anything. Ray gives every node its id as a
    label, and takes `!in(a,b)` for none of these. avoids: ids of nodes that it must not be, either."""
    nodes = sorted({*needs.other_than, *avoids})
    others = {"ray.io/node-id": f"!in({','.join(nodes)})"} if nodes else {}
    labels = {**others, **needs.labels}
    return [labels] * num_bundles if labels else None


def explain_wait(nodes: Sequence[NodeState], needs: NodeNeeds, avoided: Collection[str] = ()) -> str:
    """Say what is asked, why no node gives it now, and what would. avoided: ids of nodes that go away or are
    silent."""
    leaving = [node for node in nodes if node.node_id in avoided]
    part = _part_of(needs)
    text = _explain_wait([node for node in nodes if node not in leaving], needs)
    would = [n.node_id[:8] for n in leaving if n.is_alive and _is_right(n, needs) and _has(n.total, part)]
    if not would:
        return text
    more = f" and {len(would) - _SHOWN_NODES} more" if len(would) > _SHOWN_NODES else ""
    names = ", ".join(would[:_SHOWN_NODES])
    return f"{text}. Nothing is put on nodes that go away or do not answer: {names}{more}"


def _explain_wait(nodes: Sequence[NodeState], needs: NodeNeeds) -> str:
    asked = describe_needs(needs)
    alive = [node for node in nodes if node.is_alive]
    right = [node for node in alive if _is_right(node, needs)]
    if full := _large_enough(right, needs):
        return f"waits for room: {asked} is asked, and {_describe_free(full, needs)}"
    if right:
        return (
            f"waits for a node: {asked} is asked, and no node has that much"
            f"{', nor have several together' * (needs.num_parts > 1)}; "
            f"{_describe_largest(right, needs)}. Ask for no more than that, or add such a node to the cluster"
        )
    if any(_is_right(node, msgspec.structs.replace(needs, other_than=[])) for node in alive):
        return (
            f"waits for a node: {asked} is asked, and each of the {len(needs.other_than)} nodes that would "
            "do has one already. Add such a node to the cluster, or ask for fewer"
        )
    what = "none" if not alive else f"none of the {len(alive)} nodes"
    return (
        f"waits for a node: {asked} is asked, and {what} has {_describe_kind(needs)}. Ask for what there is "
        f"({_describe_labels(alive)}), or add such a node to the cluster"
    )


def _large_enough(nodes: Sequence[NodeState], needs: NodeNeeds) -> list[NodeState]:
    """The nodes that would do if nothing else was there: each alone, or together where it may be divided."""
    part = _part_of(needs)
    some = [node for node in nodes if _has(node.total, part)]
    num_fitting = sum(_num_parts_on(node, part) for node in some)
    return some if num_fitting >= needs.num_parts else []


def _num_parts_on(node: NodeState, part: NodeNeeds) -> int:
    return min(
        (int((node.total.get(name, 0.0) + _EPSILON) / amount) for name, amount in part.resources.items()),
        default=part.num_parts,
    )


def describe_needs(needs: NodeNeeds) -> str:
    """Return `CPU 1, GPU 2 on H100 with market=spot`."""
    amounts = ", ".join(f"{name} {amount:g}" for name, amount in sorted(needs.resources.items()))
    if needs.num_parts > 1:
        amounts += f" in {needs.num_parts} parts"
    kind = _describe_kind(needs)
    return f"{amounts} with {kind}" if kind else amounts


def _describe_kind(needs: NodeNeeds) -> str:
    kinds = [f"{name}={value}" for name, value in sorted(needs.labels.items())]
    return ", ".join([*([needs.accelerator_type] if needs.accelerator_type else []), *kinds])


def _is_right(node: NodeState, needs: NodeNeeds) -> bool:
    """Whether it is of the kind asked for, with or without room."""
    if node.node_id in needs.other_than:
        return False
    if needs.accelerator_type and f"{ACCELERATOR_PREFIX}{needs.accelerator_type}" not in node.total:
        return False
    return all(node.labels.get(name) == value for name, value in needs.labels.items())


def _has(amounts: Mapping[str, float], needs: NodeNeeds) -> bool:
    return all(amounts.get(name, 0.0) + _EPSILON >= amount for name, amount in needs.resources.items())


def _part_of(needs: NodeNeeds) -> NodeNeeds:
    """What one node must have at least to get some of it."""
    part = {name: amount / needs.num_parts for name, amount in needs.resources.items()}
    return msgspec.structs.replace(needs, resources=part)


def _free_ratio(node: NodeState) -> float:
    """Part of what it has of the scarcest of CPU and GPU that is free."""
    return min(
        (node.available.get(name, 0.0) / node.total[name] for name in ("CPU", "GPU") if node.total.get(name)),
        default=0.0,
    )


def _describe_free(nodes: Sequence[NodeState], needs: NodeNeeds) -> str:
    parts = [
        f"{node.node_id[:8]} has "
        + ", ".join(
            f"{name} {node.available.get(name, 0.0):g} of {node.total.get(name, 0.0):g}"
            for name in sorted(needs.resources)
        )
        for node in nodes[:_SHOWN_NODES]
    ]
    more = f" and {len(nodes) - _SHOWN_NODES} more are full" if len(nodes) > _SHOWN_NODES else ""
    return f"free on {'; '.join(parts)}{more}"


def _describe_largest(nodes: Sequence[NodeState], needs: NodeNeeds) -> str:
    most = {name: max(node.total.get(name, 0.0) for node in nodes) for name in sorted(needs.resources)}
    return "the most that one has is " + ", ".join(f"{name} {amount:g}" for name, amount in most.items())


def _describe_labels(nodes: Sequence[NodeState]) -> str:
    """The kinds of nodes that there are, without the labels that Ray gives every node."""
    labels = {
        f"{name}={value}"
        for node in nodes
        for name, value in node.labels.items()
        if not name.startswith("ray.io/")
    }
    accelerators = {
        name.removeprefix(ACCELERATOR_PREFIX)
        for node in nodes
        for name in node.total
        if name.startswith(ACCELERATOR_PREFIX)
    }
    return ", ".join([*sorted(accelerators), *sorted(labels)][:8]) or "no labels and no accelerators"
