"""The native engine's time: every nanosecond is a request's or idle, whatever happens to the requests."""

from __future__ import annotations

import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.engine.test_native import Arrival, greedy, workloads

from headrace.api.messages import EngineSpec
from headrace.clock import VirtualClock
from headrace.engine.fake_runner import FakeRunner
from headrace.engine.native import NativeEngine
from headrace.engine.protocol import StepInput
from headrace.engine.request import EngineRequest
from headrace.errors import InvalidRequest

NS = 1_000_000_000


class TimedRunner(FakeRunner):
    """Takes 1 ms and 10 µs per token for a step, give or take a third."""

    def __init__(self, clock: VirtualClock, num_blocks: int = 64) -> None:
        super().__init__(num_blocks)
        self._clock = clock
        self._noise = random.Random(2)

    def execute(self, batch: StepInput) -> torch.Tensor:
        self._clock.advance((1e-3 + 1e-5 * len(batch.token_ids_T)) * self._noise.uniform(0.66, 1.33))
        return super().execute(batch)


def timed_engine(clock: VirtualClock, num_blocks: int = 64) -> NativeEngine:
    spec = EngineSpec("native", "fake", max_running=4, token_budget=20, block_size=8)
    return NativeEngine(spec, TimedRunner(clock, num_blocks), clock)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(arrivals=workloads(), num_blocks=st.sampled_from([7, 64]))
def test_the_shares_ever_given_are_the_busy_time_after_every_step(
    arrivals: list[Arrival], num_blocks: int
) -> None:
    clock = VirtualClock(3.0)
    engine = timed_engine(clock, num_blocks)
    requests: dict[str, EngineRequest] = {}
    for step in range(400):
        clock.advance(0.002 if step % 5 == 0 else 0.0)
        for arrival in arrivals:
            request_id = arrival.request.request_id
            if arrival.at_step == step:
                try:
                    engine.submit(arrival.request)
                except InvalidRequest:
                    continue
                requests[request_id] = engine._scheduler._requests[request_id]
            if arrival.abort_after is not None and arrival.at_step + arrival.abort_after == step:
                engine.abort(request_id)
        if engine.has_work():
            for output in engine.step().outputs:
                assert output.engine_ns == requests[output.request_id].engine_ns > 0
        load = engine.load()
        assert load.busy_ns == sum(request.engine_ns for request in requests.values())
        if not engine.has_work():
            assert load.busy_ns + load.idle_ns == clock.now_ns() - 3 * NS


def test_time_in_which_an_aborted_request_was_the_only_one_is_idle_but_for_its_steps() -> None:
    clock = VirtualClock()
    engine = timed_engine(clock)
    engine.submit(greedy("a", [1, 2, 3], 50))
    engine.step()
    busy_ns = engine.load().busy_ns
    clock.advance(1.0)
    engine.abort("a")
    load = engine.load()
    assert (load.busy_ns, load.busy_ns + load.idle_ns) == (busy_ns, clock.now_ns())


def test_what_happens_between_two_steps_is_paid_by_the_next_ones_requests() -> None:
    clock = VirtualClock()
    engine = timed_engine(clock)
    engine.submit(greedy("a", [1, 2, 3], 50))
    first = engine.step().outputs[0].engine_ns
    clock.advance(0.5)
    second = engine.step().outputs[0].engine_ns
    assert second - first > NS // 2
    assert engine.load().idle_ns == 0


def test_the_time_before_ready_is_nobodys() -> None:
    clock = VirtualClock()
    engine = timed_engine(clock)
    clock.advance(2.0)
    engine.compute_first_step()
    assert (engine.load().busy_ns, engine.load().idle_ns) == (0, 0)


def test_a_long_prompt_pays_more_than_the_streams_beside_it() -> None:
    clock = VirtualClock()
    engine = timed_engine(clock, num_blocks=256)
    for name in "abc":
        engine.submit(greedy(name, [1, 2, 3], 200))
    for _ in range(100):
        engine.step()
    before = {output.request_id: output.engine_ns for output in engine.step().outputs}
    engine.submit(greedy("long", list(range(1, 60)) * 3, 5))
    after: dict[str, int] = {}
    while "long" not in after:
        after.update({output.request_id: output.engine_ns for output in engine.step().outputs})
    assert after["long"] > 2 * max(after[name] - before[name] for name in "abc")
