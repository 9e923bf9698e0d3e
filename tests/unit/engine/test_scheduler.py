"""The scheduler's decisions, step by step: order, budget, admission, preemption and its reasons."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from headrace.api.messages import GenerationRequest, SamplingParams
from headrace.engine.kv_cache.block_pool import BlockPool
from headrace.engine.prompt_budget import Streams
from headrace.engine.request import EngineRequest
from headrace.engine.scheduler import Decision, Preemption, Scheduler

BLOCK_SIZE = 8


class World:
    """A scheduler whose sampled tokens are all 1."""

    def __init__(self, num_blocks: int = 64, max_running: int = 4, token_budget: int = 32) -> None:
        self.scheduler = Scheduler(BlockPool(num_blocks), BLOCK_SIZE, max_running, token_budget)
        self._arrivals = 0

    def add(
        self, request_id: str, num_prompt_tokens: int, priority: int = 0, resume_from: tuple[int, ...] = ()
    ) -> EngineRequest:
        self._arrivals += 1
        prompt = [self._arrivals] * num_prompt_tokens
        request = GenerationRequest(request_id, prompt, SamplingParams(max_tokens=999), priority=priority)
        request = msgspec.structs.replace(request, resume_from=list(resume_from))
        state = EngineRequest(request, self._arrivals, frozenset(), 4096)
        self.scheduler.add(state)
        return state

    def step(self) -> Decision:
        decision = self.scheduler.schedule()
        self.scheduler.update(decision)
        for item in decision.scheduled:
            if item.is_sampled:
                item.request.append(1)
        self.scheduler.check_integrity()
        return decision


def parts(decision: Decision) -> list[tuple[str, int]]:
    return [(item.request.request_id, item.num_new_tokens) for item in decision.scheduled]


def test_what_ran_elsewhere_comes_before_new_prompts_but_not_before_a_higher_priority() -> None:
    world = World(token_budget=8)
    world.add("new", 8)
    world.add("high", 4, priority=1)
    world.add("resumed", 6, resume_from=(5, 6))
    assert parts(world.step()) == [("high", 4), ("resumed", 4)]
    assert parts(world.step()) == [("high", 1), ("resumed", 4), ("new", 3)]
    seen: list[Streams] = []
    world.add("again", 3, resume_from=(1,))
    world.scheduler.schedule(lambda streams: seen.append(streams) or 1)  # type: ignore[func-returns-value]
    assert (seen[0].num_prompts, seen[0].num_resumed) == (2, 1)


def test_a_long_prompt_is_computed_in_chunks_next_to_running_requests() -> None:
    world = World(token_budget=16)
    world.add("a", 4)
    world.add("b", 30)
    first = world.step()
    assert parts(first) == [("a", 4), ("b", 12)]
    assert [item.is_sampled for item in first.scheduled] == [True, False]
    assert parts(world.step()) == [("a", 1), ("b", 15)]
    third = world.step()
    assert parts(third) == [("a", 1), ("b", 3)]
    assert third.scheduled[1].is_sampled
    assert third.num_tokens == 4


def test_prompts_together_get_no_more_than_they_may_and_streams_go_on() -> None:
    world = World(token_budget=64)
    stream = world.add("stream", 4)
    world.step()
    prompt = world.add("prompt", 40)
    world.add("next", 9)
    asked: list[Streams] = []

    def allow(num_tokens: int) -> Callable[[Streams], int]:
        return lambda streams: asked.append(streams) or num_tokens  # type: ignore[func-returns-value]

    decision = world.scheduler.schedule(allow(16))
    assert parts(decision) == [("stream", 1), ("prompt", 16)]
    assert decision.num_tokens == 17
    world.scheduler.update(decision)
    stream.append(1)
    decision = world.scheduler.schedule(allow(30))
    assert parts(decision) == [("stream", 1), ("prompt", 24), ("next", 6)]
    world.scheduler.update(decision)
    assert prompt.num_computed_tokens == 40
    assert asked == [Streams(1, 5, 2, 0), Streams(1, 6, 2, 16)]
    assert parts(world.scheduler.schedule(allow(0)))[2] == ("next", 1), "what runs gets a token in every step"


def test_streams_are_not_looked_at_where_no_prompt_can_go_on() -> None:
    def fail(streams: Streams) -> int:
        raise AssertionError(streams)

    world = World(max_running=2)
    world.add("a", 4)
    world.add("b", 4)
    world.step()
    world.add("waits for room", 4)
    assert parts(world.scheduler.schedule(fail)) == [("a", 1), ("b", 1)]


def test_prompts_that_cannot_be_admitted_do_not_count() -> None:
    world = World(max_running=3)
    world.add("a", 4)
    world.step()
    for name in ("b", "c", "d", "e"):
        world.add(name, 4)
    asked: list[Streams] = []
    world.scheduler.schedule(lambda streams: asked.append(streams) or 8)  # type: ignore[func-returns-value]
    assert [streams.num_prompts for streams in asked] == [2]


def test_a_chunk_leaves_a_token_for_each_request_behind_it() -> None:
    world = World(token_budget=8)
    world.add("behind", 4, priority=-1)
    world.step()
    world.add("long", 100)
    assert parts(world.step()) == [("behind", 1), ("long", 7)]
    assert parts(world.step()) == [("long", 7), ("behind", 1)]


def test_waiting_requests_are_admitted_by_priority_then_arrival() -> None:
    world = World(max_running=2)
    for name, priority in (("a", 0), ("b", 0), ("urgent", 5), ("late", -1)):
        world.add(name, 3, priority)
    assert parts(world.step()) == [("urgent", 3), ("a", 3)]
    world.scheduler.remove("a")
    assert parts(world.step()) == [("urgent", 1), ("b", 3)]


def test_the_latest_request_of_the_lowest_priority_is_preempted_with_a_reason() -> None:
    world = World(num_blocks=6, token_budget=64)
    world.add("low", 3, priority=-1)
    world.add("old", 7)
    world.add("new", 7)
    preempted: list[Preemption] = []
    while not preempted:
        preempted = world.step().preempted
    assert preempted == [Preemption("low", "old needs 1 more blocks, 0 of 6 can be had")]
    assert [r.request_id for r in world.scheduler.running] == ["old", "new"]
    assert [r.request_id for r in world.scheduler.waiting] == ["low"]
    assert world.scheduler.num_preemptions == 1


def test_a_preempted_request_comes_back_before_later_ones_and_finds_its_blocks_cached() -> None:
    world = World(num_blocks=6, token_budget=64, max_running=3)
    world.add("a", 16)
    victim = world.add("b", 16)
    while not world.step().preempted:
        pass
    world.add("c", 4)
    assert victim.num_computed_tokens == 0
    world.scheduler.remove("a")
    decision = world.step()
    assert parts(decision)[0] == ("b", 25 - 16), "a took the last of its three full blocks"


def test_admission_leaves_room_for_what_running_requests_still_need() -> None:
    world = World(num_blocks=8, token_budget=16)
    world.add("long", 40)
    world.step()
    world.add("next", 17)
    decisions = [world.step() for _ in range(3)]
    assert all(not decision.preempted for decision in decisions)
    assert [r.request_id for r in world.scheduler.waiting] == ["next"]


def test_a_blocked_request_holds_back_the_ones_behind_it() -> None:
    world = World(num_blocks=8, token_budget=64)
    world.add("running", 30)
    world.step()
    world.add("big", 40)
    world.add("small", 2)
    assert parts(world.step()) == [("running", 1)], "first come, first served: small would starve big"


def test_removing_a_waiting_a_running_and_an_unknown_request_leaves_the_others() -> None:
    world = World(max_running=2)
    for name in "abcd":
        world.add(name, 9)
    world.step()
    for name in ("b", "c", "nobody", "b"):
        world.scheduler.remove(name)
        world.scheduler.check_integrity()
    assert parts(world.step()) == [("a", 1), ("d", 9)]
    assert ("a" in world.scheduler, "b" in world.scheduler) == (True, False)


def test_requests_of_one_step_do_not_share_blocks_that_are_not_computed_yet() -> None:
    world = World()
    first, second = world.add("a", 20), world.add("b", 20)
    second.token_ids[:] = first.token_ids
    world.step()
    assert not set(first.block_table) & set(second.block_table)


def test_the_integrity_check_shows_which_sum_failed() -> None:
    world = World()
    world.add("a", 9)
    world.step()
    world.scheduler.running.clear()
    with pytest.raises(AssertionError, match="references, the block tables hold 0"):
        world.scheduler.check_integrity()
    world = World()
    world.add("a", 9)
    world.scheduler.waiting.clear()
    with pytest.raises(AssertionError, match=r"running 0 \+ waiting 0 = 0, not 1 requests"):
        world.scheduler.check_integrity()


# ---- drafts ----------------


def test_drafts_get_slots_within_the_budget_and_the_end_of_the_answer() -> None:
    world = World(token_budget=10)
    first, second = world.add("a", 4), world.add("b", 4)
    world.step()
    decision = world.scheduler.schedule()
    assert [item.is_decoding for item in decision.scheduled] == [True, True]
    assert world.scheduler.draft_room(decision, first, 20) == 8
    assert world.scheduler.reserve_drafts(decision, 0, 5) == 5
    assert (decision.num_tokens, world.scheduler.draft_room(decision, second, 20)) == (7, 3)
    world.scheduler.set_drafts(decision, 0, 5, [1, 1])
    assert decision.num_tokens == 4
    second.max_total_tokens = len(second.token_ids) + 2
    assert world.scheduler.draft_room(decision, second, 20) == 1, "one token comes without a draft"


def test_accepted_drafts_advance_a_request_and_unused_blocks_go_back() -> None:
    world = World()
    request = world.add("a", 6)
    world.step()
    decision = world.scheduler.schedule()
    assert world.scheduler.reserve_drafts(decision, 0, 20) == 20
    assert len(request.block_table) == 4
    world.scheduler.set_drafts(decision, 0, 20, [1] * 12)
    request.token_ids += [1, 1, 1]  # two drafts were right, and a token of the model's own
    world.scheduler.update(decision, [2])
    world.scheduler.check_integrity()
    assert (request.num_computed_tokens, len(request.token_ids), len(request.block_table)) == (9, 10, 2)
    assert len(request.block_hashes) == 1, "its first block is full of accepted tokens, and findable"
    assert parts(world.step()) == [("a", 1)]


def test_drafts_take_what_blocks_are_left_and_never_preempt() -> None:
    world = World(num_blocks=4)
    world.add("a", 6)
    world.add("b", 6)
    world.step()
    decision = world.scheduler.schedule()
    assert world.scheduler.reserve_drafts(decision, 0, 30) == 1 + 2 * BLOCK_SIZE
    assert world.scheduler.reserve_drafts(decision, 1, 30) == 1, "what is left of its own block"
    world.scheduler.set_drafts(decision, 0, 17, [])
    world.scheduler.set_drafts(decision, 1, 1, [])
    world.scheduler.update(decision)
    assert world.scheduler.num_preemptions == 0
    assert world.scheduler.pool.num_allocatable == 2


def test_a_decoding_request_costs_the_same_at_any_context_length() -> None:
    """Counts the blocks and tokens that a step touches, not seconds."""

    class CountingList(list[int]):
        reads = 0

        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            CountingList.reads += len(range(*key.indices(len(self)))) if isinstance(key, slice) else 1
            return super().__getitem__(key)

        def __iter__(self):  # type: ignore[no-untyped-def]
            CountingList.reads += len(self)
            return super().__iter__()

    reads = []
    for length in (10, 2000):
        world = World(num_blocks=512, token_budget=4096)
        request = world.add("r", length)
        world.step()
        request.token_ids = CountingList(request.token_ids)
        request.block_table = CountingList(request.block_table)
        CountingList.reads = 0
        for _ in range(32):
            world.scheduler.update(world.scheduler.schedule())
            request.append(1)
        reads.append(CountingList.reads)
    assert abs(reads[0] - reads[1]) <= 16, reads
