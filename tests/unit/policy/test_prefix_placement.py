"""Placement by cost: cached prefixes against load, sessions, and what happens before anything is measured."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.policy.fake_replica import FakeReplica

from headrace.policy.placement import CacheChanges, Placement, has_room, load_of
from headrace.policy.prefix_placement import PrefixPlacer
from headrace.policy.prompt import PREFIX_BYTES, PromptHead

HASHES = tuple(range(100, 111))
PROMPT = PromptHead(HASHES, num_bytes=PREFIX_BYTES[11], max_output_tokens=32)
OTHER = PromptHead(tuple(range(500, 511)), num_bytes=PREFIX_BYTES[11], max_output_tokens=32)
PREFILL_S = PREFIX_BYTES[11] * 0.25 * 1e-4
"""Of the whole prompt, with a quarter of a token per byte: 0.128 s."""


def fleet(*loads: int, **fields: Any) -> list[FakeReplica]:
    costs = {"prefill_token_s": 1e-4, "decode_token_s": 1e-3, "max_running": 32, **fields}
    return [FakeReplica(f"r{index}", load, load, **costs) for index, load in enumerate(loads)]


def placer_with(**held: tuple[int, ...]) -> PrefixPlacer:
    placer = PrefixPlacer()
    for name, hashes in held.items():
        placer.report(FakeReplica(name), CacheChanges(1, list(hashes), []), 0.0)
    return placer


def test_a_request_goes_where_its_prefix_is_cached() -> None:
    placement = placer_with(r1=HASHES).place(fleet(0, 2, 0), PROMPT, 0.0)
    assert (placement.replica_id, placement.reason) == ("r1", "prefix")
    assert placement.cached_ratio == 1.0
    assert placement.scores["r0"] > placement.scores["r1"] > 0


def test_a_hot_prefix_is_computed_again_where_there_is_less_to_do() -> None:
    placement = placer_with(r1=HASHES).place(fleet(0, 20, 0, step_per_request_s=2e-4), PROMPT, 0.0)
    assert placement.replica_id in ("r0", "r2")
    assert (placement.reason, placement.cached_ratio) == ("spread", 0.0)
    assert placement.prefill_s == PREFILL_S


def test_prompts_under_way_count_as_work_until_they_are_computed() -> None:
    placer = PrefixPlacer()
    replicas = fleet(0, 0)
    first = placer.place(replicas, PROMPT, 0.0)
    placer.bound(first, PROMPT, 0.0)
    replicas[0].num_in_flight = 1  # its prompt is not computed yet
    replicas[1].num_in_flight = 2  # two short ones
    assert first.replica_id == "r0"
    assert placer.place(replicas, OTHER, 0.0).replica_id == "r1"
    assert placer.place(replicas, OTHER, PREFILL_S).replica_id == "r0"


def test_prompts_that_a_replica_reports_as_uncomputed_count_as_work() -> None:
    placer = placer_with(r1=HASHES)
    replicas = fleet(0, 1, 1)
    replicas[1].num_uncomputed_tokens = 2000
    placer.report(replicas[1], CacheChanges(1, [], []), 5.0)
    assert placer.place(replicas, PROMPT, 5.0).reason == "spread"
    assert placer.place(replicas, PROMPT, 5.2).replica_id == "r1", "they are computed by now"
    replicas[1].num_uncomputed_tokens = 0
    placer.report(replicas[1], CacheChanges(1, [], []), 5.0)
    assert placer.place(replicas, PROMPT, 5.0).replica_id == "r1"


def test_the_part_that_is_cached_counts() -> None:
    placer = placer_with(r0=HASHES[:4], r1=HASHES[:9], r2=HASHES[6:])
    placement = placer.place(fleet(0, 0, 0), PROMPT, 0.0)
    assert (placement.replica_id, placement.cached_ratio) == ("r1", 0.7)


def test_what_was_bound_attracts_the_next_of_its_kind_before_any_report() -> None:
    placer = PrefixPlacer()
    replicas = fleet(0, 0, 0)
    placer.bound(placer.place(replicas, PROMPT, 0.0), PROMPT, 0.0)
    replicas[0].num_assigned = 1
    placement = placer.place(replicas, PROMPT, 1.0)
    assert (placement.replica_id, placement.reason) == ("r0", "prefix")


def test_full_memory_costs_what_must_be_computed_again() -> None:
    replicas = fleet(0, 0, num_free_tokens=10_000)
    replicas[0].num_free_tokens = 100
    assert PrefixPlacer().place(replicas, PROMPT, 0.0).replica_id == "r1"


def test_a_replica_without_room_is_not_chosen_for_its_prefix() -> None:
    placement = placer_with(r1=HASHES).place(fleet(3, 34, 5), PROMPT, 0.0)
    assert placement.replica_id == "r0"
    assert PrefixPlacer().place(fleet(34, 34), PROMPT, 0.0).reason == "no_room"
    assert PrefixPlacer().place([], PROMPT, 0.0).reason == "no_replica"


def test_idle_replicas_take_turns_though_their_measured_costs_differ_a_little() -> None:
    replicas = fleet(0, 0, 0)
    replicas[1].prefill_token_s *= 1.01
    placer = PrefixPlacer()
    for number in range(9):
        prompt = PromptHead((number,), 300)
        chosen = placer.place(replicas, prompt, float(number)).replica_id
        next(replica for replica in replicas if replica.replica_id == chosen).num_assigned += 1
    assert [replica.num_assigned for replica in replicas] == [3, 3, 3]


def test_a_session_goes_back_beyond_the_hashed_head() -> None:
    placer = placer_with(r0=HASHES, r1=HASHES)
    long = PromptHead(HASHES, 100_000, "joe")
    placer.bound(Placement("r1", "prefix", {}), long, 0.0)
    placement = placer.place(fleet(0, 1), long, 60.0)
    assert (placement.replica_id, placement.reason) == ("r1", "session")
    assert placement.cached_ratio == 1.0


def test_a_session_whose_head_was_evicted_goes_anywhere() -> None:
    placer = placer_with(r0=HASHES, r1=HASHES)
    long = PromptHead(HASHES, 100_000, "joe")
    placer.bound(Placement("r1", "prefix", {}), long, 0.0)
    placer.report(FakeReplica("r1"), CacheChanges(1, [], list(HASHES[1:])), 0.0)
    assert placer.place(fleet(0, 0), long, 60.0).replica_id == "r0"


def test_a_session_counts_where_the_replica_says_nothing_of_its_cache() -> None:
    placer = PrefixPlacer()
    prompt = PromptHead(HASHES, 8_000, "joe")
    placer.bound(Placement("r2", "prefix", {}), prompt, 0.0)
    placement = placer.place(fleet(0, 0, 1), PromptHead(HASHES, 9_000, "joe"), 60.0)
    assert (placement.replica_id, placement.reason) == ("r2", "session")
    assert placer.place(fleet(0, 0, 1), PromptHead(HASHES, 9_000, "ann"), 60.0).replica_id == "r0"


def test_sessions_are_bounded() -> None:
    placer = PrefixPlacer(max_sessions=10)
    for number in range(100):
        placer.bound(Placement("r0", "prefix", {}), PromptHead((), 5_000, f"s{number}"), 0.0)
    assert "10 sessions" in repr(placer)


def test_without_measured_costs_load_decides_and_the_prefix_within_a_small_window() -> None:
    unmeasured = {"prefill_token_s": 0.0, "decode_token_s": 0.0}
    placer = placer_with(r1=HASHES)
    assert placer.place(fleet(3, 4, 3, **unmeasured), PROMPT, 0.0).replica_id == "r1"
    placement = placer.place(fleet(3, 5, 3, **unmeasured), PROMPT, 0.0)
    assert (placement.replica_id, placement.reason) == ("r0", "spread")
    assert placement.scores == {"r0": 3, "r1": 5, "r2": 3}


def test_one_measured_replica_speaks_for_the_others() -> None:
    replicas = fleet(0, 0, prefill_token_s=0.0)
    replicas[0].prefill_token_s = 1e-4
    assert placer_with(r1=HASHES).place(replicas, PROMPT, 0.0).replica_id == "r1"


def test_the_tokens_of_a_byte_are_learned_and_nonsense_is_not() -> None:
    placer = PrefixPlacer()
    for _ in range(200):
        placer.finished(1000, 500)
        placer.finished(0, 500)
        placer.finished(1000, 10**9)
        placer.finished(10, 9)
    assert abs(placer.tokens_per_byte - 0.5) < 0.01


REPLICAS = st.lists(
    st.builds(
        FakeReplica,
        replica_id=st.sampled_from([f"r{index}" for index in range(6)]),
        num_in_flight=st.integers(0, 40),
        num_open=st.integers(0, 40),
        max_running=st.sampled_from([0, 8, 32]),
        num_waiting=st.integers(0, 3),
        num_free_tokens=st.integers(-1, 10_000),
        prefill_token_s=st.sampled_from([0.0, 1e-9, 1e-4, 9.9]),
        decode_token_s=st.sampled_from([0.0, 1e-9, 1e-3, 9.9]),
    ),
    max_size=6,
    unique_by=lambda replica: replica.replica_id,
)


@given(REPLICAS, st.lists(st.integers(0, 5), max_size=5), st.integers(0, 10**9), st.sampled_from(["", "s"]))
def test_the_choice_always_has_room_and_is_found_if_there_is_any(
    replicas: list[FakeReplica], hashes: list[int], num_bytes: int, session: str
) -> None:
    placer = placer_with(r0=(0, 1, 2), r1=(0, 1), r4=(3,))
    placer.bound(Placement("r2", "prefix", {}), PromptHead((5,), 4_000, "s"), 0.0)
    placement = placer.place(replicas, PromptHead(tuple(hashes), num_bytes, session), 1.0)
    able = {replica.replica_id for replica in replicas if has_room(replica, load_of(replica))}
    assert (placement.replica_id in able) if able else placement.replica_id is None
    assert 0.0 <= placement.cached_ratio <= 1.0
