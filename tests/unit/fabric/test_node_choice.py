"""Which node a process is sent to, and what is said while there is none."""

from __future__ import annotations

import pytest

from headrace.api.messages import NodeNeeds, NodeState, Place
from headrace.fabric.node_choice import choose_node, explain_wait, kept_apart, label_selector

NEEDS = NodeNeeds({"CPU": 2.0})


def node(name: str, total: float, free: float, **labels: str) -> NodeState:
    return NodeState(name, "10.0.0.1", True, {"CPU": total}, {"CPU": free}, labels)


def test_spread_takes_the_node_with_fewest_of_the_family_and_pack_the_one_with_most() -> None:
    nodes = [node("a", 8, 4), node("b", 8, 6), node("c", 8, 8)]
    num_same = {"a": 2, "b": 1}
    assert choose_node(nodes, NEEDS, "spread", num_same) == "c"
    assert choose_node(nodes, NEEDS, "pack", num_same) == "a"


def test_with_as_many_of_the_family_spread_takes_the_emptier_and_pack_the_fuller_node() -> None:
    nodes = [node("a", 8, 4), node("b", 8, 8)]
    assert choose_node(nodes, NEEDS, "spread", {}) == "b"
    assert choose_node(nodes, NEEDS, "pack", {}) == "a"


def test_nodes_without_room_without_the_labels_or_gone_are_not_asked() -> None:
    gone = NodeState("gone", "10.0.0.1", False, {"CPU": 8.0}, {"CPU": 8.0}, {"market": "spot"})
    nodes = [node("full", 8, 1, market="spot"), node("other", 8, 8, market="owned"), gone]
    needs = NodeNeeds({"CPU": 2.0}, {"market": "spot"})
    assert choose_node(nodes, needs, "spread", {}) == ""
    assert choose_node([*nodes, node("right", 2, 2, market="spot")], needs, "spread", {}) == "right"


def test_an_accelerator_type_is_looked_for_among_what_nodes_offer() -> None:
    total = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:H100": 1.0}
    nodes = [node("a", 8, 8), NodeState("g", "10.0.0.2", True, total, total)]
    assert choose_node(nodes, NodeNeeds({"GPU": 1.0}, {}, "H100"), "spread", {}) == "g"
    assert choose_node(nodes, NodeNeeds({"GPU": 1.0}, {}, "L4"), "spread", {}) == ""


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (NodeNeeds({"CPU": 2.0}), ["waits for room", "CPU 2 is asked", "aaaaaaaa has CPU 1 of 4"]),
        (NodeNeeds({"CPU": 64.0}), ["CPU 64 is asked", "the most that one has is CPU 4", "add such a node"]),
        (NodeNeeds({"GPU": 1.0}), ["GPU 1 is asked", "the most that one has is GPU 0"]),
        (NodeNeeds({"CPU": 1.0}, {"zone": "b"}), ["none of the 1 nodes has zone=b", "zone=a"]),
        (NodeNeeds({"GPU": 1.0}, {}, "H100"), ["none of the 1 nodes has H100"]),
    ],
)
def test_a_wait_says_what_is_asked_what_there_is_and_what_would_fit(
    needs: NodeNeeds, words: list[str]
) -> None:
    text = explain_wait([node("aaaaaaaabbbb", 4, 1, zone="a")], needs)
    assert [word for word in words if word not in text] == []


def test_a_cluster_without_nodes_says_so() -> None:
    assert "none has zone=b" in explain_wait([], NodeNeeds({"CPU": 1.0}, {"zone": "b"}))


def test_apart_is_never_where_one_of_the_family_is() -> None:
    nodes = [node("a", 8, 8), node("b", 8, 4), node("c", 8, 1)]
    place = Place([NEEDS], "apart")
    needs = kept_apart(place, NEEDS, {"a": 1})
    assert choose_node(nodes, needs, "apart", {"a": 1}) == "b"
    assert label_selector(needs) == [{"ray.io/node-id": "!in(a)"}]
    assert kept_apart(place, NEEDS, {"b": 2, "a": 1, "c": 0}).other_than == ["a", "b"]
    assert kept_apart(Place([NEEDS]), NEEDS, {"a": 1}) == NEEDS
    assert label_selector(NEEDS) is None


def test_one_that_must_be_apart_says_that_the_nodes_are_taken() -> None:
    needs = NodeNeeds({"CPU": 1.0}, {"zone": "a"}, other_than=["a", "b"])
    nodes = [node("a", 8, 8, zone="a"), node("b", 8, 8, zone="a"), node("c", 8, 8, zone="b")]
    assert "each of the 2 nodes that would do has one already" in explain_wait(nodes, needs)


def test_what_may_be_divided_waits_for_room_on_several_nodes_or_says_what_one_has() -> None:
    nodes = [node("aaaaaaaabbbb", 4, 1), node("ccccccccdddd", 2, 2)]
    halves = NodeNeeds({"CPU": 4.0}, num_parts=2)
    assert "CPU 4 in 2 parts is asked, and free on" in explain_wait(nodes, halves)
    assert "waits for room" in explain_wait(nodes[1:] * 2, halves)
    text = explain_wait(nodes[1:], halves)
    assert "no node has that much, nor have several together; the most that one has is CPU 2" in text
    assert "no node has that much; " in explain_wait(nodes, NodeNeeds({"CPU": 8.0}))
