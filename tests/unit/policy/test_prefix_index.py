"""The prefix index: it says what was reported or is expected, and keeps its bounds whatever is reported."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headrace.policy.prefix_index import EXPECTED_S, PrefixIndex


def test_each_replica_holds_as_many_leading_blocks_as_it_reported() -> None:
    index = PrefixIndex()
    index.report("a", 1, [10, 11, 12, 13], [])
    index.report("b", 1, [10, 11, 99], [])
    index.report("c", 1, [11, 12, 13], [])
    assert index.match([10, 11, 12, 77], 0.0) == {"a": 3, "b": 2}
    assert index.match([10, 11, 99], 0.0) == {"a": 2, "b": 3}
    assert index.match([5], 0.0) == {}
    assert index.match([], 0.0) == {}


def test_an_eviction_ends_a_prefix_where_it_was() -> None:
    index = PrefixIndex()
    index.report("a", 1, [1, 2, 3, 4], [])
    index.report("a", 1, [], [3, 4])
    assert index.match([1, 2, 3, 4], 0.0) == {"a": 2}
    index.report("a", 1, [3], [])
    assert index.match([1, 2, 3, 4], 0.0) == {"a": 3}


def test_what_is_bound_counts_for_a_while_and_for_good_once_reported() -> None:
    index = PrefixIndex()
    index.expect("a", [1, 2, 3], 100.0)
    assert index.match([1, 2, 3], 100.0) == {"a": 3}
    index.report("a", 1, [1, 2], [])
    assert index.match([1, 2, 3], 100.0 + EXPECTED_S - 0.1) == {"a": 3}
    assert index.match([1, 2, 3], 101.0 + EXPECTED_S) == {"a": 2}


def test_another_epoch_voids_what_was_said_before() -> None:
    index = PrefixIndex()
    index.report("a", 1, [1, 2], [])
    index.report("b", 1, [1, 2], [])
    index.report("a", 2, [7], [])
    assert index.match([1, 2], 0.0) == {"b": 2}
    assert index.match([7], 0.0) == {"a": 1}


def test_a_replica_that_is_gone_holds_nothing_and_its_place_is_used_again() -> None:
    index = PrefixIndex()
    for name in ("a", "b", "c"):
        index.report(name, 1, [1], [])
    index.forget("b")
    index.forget("never there")
    assert index.match([1], 0.0) == {"a": 1, "c": 1}
    index.report("d", 1, [2], [])
    assert index.match([2], 0.0) == {"d": 1}
    index.check_integrity()


def test_a_replica_that_reports_nonsense_harms_itself_alone() -> None:
    index = PrefixIndex(max_per_replica=100)
    index.report("good", 1, [1, 2, 3], [])
    for turn in range(50):
        index.report("bad", turn, list(range(1000 * turn, 1000 * turn + 500)), [1, 2, 3, -5, 2**70])
    index.check_integrity()
    assert index.match([1, 2, 3], 0.0) == {"good": 3}
    assert len(index) <= 103


def test_the_newest_stay_when_a_bound_is_met() -> None:
    index = PrefixIndex(max_per_replica=4)
    index.report("a", 1, [1, 2, 3, 4], [])
    index.expect("a", [1], 0.0)  # of use again
    index.report("a", 1, [5, 6], [])
    held = {number for number in range(1, 7) if index.match([number], 0.0)}
    assert held == {1, 4, 5, 6}


def test_many_replicas_share_one_bound() -> None:
    index = PrefixIndex(max_in_all=80)
    for number in range(8):
        index.report(f"r{number}", 1, list(range(1000 * number, 1000 * number + 80)), [])
        index.check_integrity()
    assert len(index) <= 80


class IndexMachine(RuleBasedStateMachine):
    """Whatever comes in whatever order: both directions agree, and nothing unsaid is found."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(max_per_replica=12, max_in_all=40, expected_s=3.0)
        self.now_s = 0.0
        self.ever_said: dict[str, set[int]] = {}

    names = st.sampled_from("abcdef")
    hashes = st.lists(st.integers(0, 20), max_size=15)

    @rule(name=names, epoch=st.integers(0, 2), added=hashes, removed=hashes)
    def report(self, name: str, epoch: int, added: list[int], removed: list[int]) -> None:
        self.index.report(name, epoch, added, removed)
        self.ever_said.setdefault(name, set()).update(added)

    @rule(name=names, hashes=hashes)
    def expect(self, name: str, hashes: list[int]) -> None:
        self.index.expect(name, hashes, self.now_s)
        self.ever_said.setdefault(name, set()).update(hashes)

    @rule(name=names)
    def forget(self, name: str) -> None:
        self.index.forget(name)
        self.ever_said.pop(name, None)

    @rule(seconds=st.floats(0.0, 2.0), hashes=hashes)
    def match(self, seconds: float, hashes: list[int]) -> None:
        self.now_s += seconds
        for name, num in self.index.match(hashes, self.now_s).items():
            assert 0 < num <= len(hashes)
            assert self.ever_said[name] >= set(hashes[:num])

    @invariant()
    def both_directions_agree(self) -> None:
        self.index.check_integrity()


TestIndexMachine: Any = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
