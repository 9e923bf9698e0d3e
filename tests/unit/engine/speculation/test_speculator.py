"""Guesses for a whole batch: within its cost, learned from all requests, and none where a row is too dear."""

from __future__ import annotations

from collections.abc import Sequence

from tests.unit.engine.speculation.scripted_proposer import ConstantProposer

from headrace.api.messages import GenerationRequest, SamplingParams
from headrace.engine.kv_cache.block_pool import BlockPool
from headrace.engine.request import EngineRequest
from headrace.engine.scheduler import Scheduler
from headrace.engine.speculation.speculator import Speculator
from headrace.engine.speculation.verify import Verified


class World:
    """A scheduler and a speculator that guesses token 1; a step takes what the test says, and a row of it."""

    def __init__(self, num_requests: int, step_s: float, row_s: float) -> None:
        self.scheduler = Scheduler(BlockPool(256), 8, 64, 512)
        self.speculator = Speculator(ConstantProposer(1), 4)
        self.coefficients = (step_s, row_s, 0.0, row_s, 0.0)
        self._arrivals = 0
        for _ in range(num_requests):
            self.add()
        self.step(0)

    def add(self, temperature: float = 0.0) -> EngineRequest:
        self._arrivals += 1
        sampling = SamplingParams(max_tokens=100_000, temperature=temperature)
        request = GenerationRequest(str(self._arrivals), [5, 6, 7], sampling)
        state = EngineRequest(request, self._arrivals, frozenset(), 100_000)
        self.scheduler.add(state)
        return state

    def step(self, num_right: int) -> list[int]:
        """One step in which `num_right` guesses of each request are right; return how many each made."""
        decision = self.scheduler.schedule()
        self.speculator.add_drafts(decision, self.scheduler, self.coefficients)
        verified = [
            self._verify(item.request, item.draft_token_ids, num_right) for item in decision.scheduled
        ]
        self.scheduler.update(decision, [result.num_accepted for result in verified])
        self.scheduler.check_integrity()
        self.speculator.observe(verified)
        for item in decision.scheduled:  # so that the answers never end
            item.request.max_total_tokens = len(item.request.token_ids) + 100
        if self._arrivals and len(self.scheduler.running[0].token_ids) > 1500:
            for request in list(self.scheduler.running):
                self.scheduler.remove(request.request_id)
                self.add()
        return [len(item.draft_token_ids) for item in decision.scheduled]

    def _verify(self, request: EngineRequest, drafts: Sequence[int], num_right: int) -> Verified:
        num_accepted = min(num_right, len(drafts))
        tokens = [1] * num_accepted + [2]
        request.token_ids += tokens
        return Verified(request, drafts, tokens, num_accepted=num_accepted)


def test_where_rows_are_cheap_right_guesses_are_made_and_counted() -> None:
    world = World(2, step_s=5e-3, row_s=1e-4)
    numbers = [world.step(4) for _ in range(20)]
    assert numbers[-1] == [4, 4]
    assert world.speculator.num_accepted_tokens == world.speculator.num_draft_tokens > 100


def test_where_a_row_costs_a_token_nothing_is_guessed() -> None:
    """Thirty requests whose step is as long as its rows are many: a right guess gains nothing."""
    world = World(30, step_s=1e-5, row_s=3e-4)
    for _ in range(100):
        assert sum(world.step(1)) == 0


def test_requests_whose_guesses_are_wrong_stop_and_try_again_now_and_then() -> None:
    world = World(4, step_s=5e-3, row_s=3e-4)
    for _ in range(60):
        world.step(0)
    num_guesses = sum(sum(world.step(0)) for _ in range(400))
    assert 4 <= num_guesses <= 0.05 * 4 * 400


def test_while_nothing_is_measured_a_row_counts_as_a_small_part_of_a_step() -> None:
    world = World(2, step_s=0.0, row_s=0.0)
    assert world.step(0) == [4, 4]


def test_a_long_context_makes_guesses_dearer() -> None:
    world = World(1, step_s=5e-3, row_s=1e-4)
    world.step(4)
    assert world.step(4) == [4]
    world.coefficients = (5e-3, 1e-4, 1e-3, 1e-4, 0.0)
    assert world.step(4) == [0]


def test_what_some_requests_learn_the_next_ones_begin_with() -> None:
    world = World(8, step_s=5e-3, row_s=1e-4)
    assert world.step(0) == [4] * 8
    for _ in range(80):
        world.step(0)
    late = world.add()
    world.step(0)
    numbers = world.step(0)
    assert numbers[-1] < 4, f"{late!r} trusts guesses that all others found wrong"


def test_sampled_answers_begin_with_less_trust_than_greedy_ones() -> None:
    world = World(1, step_s=5e-3, row_s=5e-4)
    greedy, sampled = world.add(0.0), world.add(0.8)
    world.step(0)
    world.step(0)
    assert greedy.draft_controller is not None
    assert sampled.draft_controller is not None
    outlook = [0.5] * 8
    assert sampled.draft_controller.expect(outlook)[0] < greedy.draft_controller.expect(outlook)[0]
