"""The scaler on a virtual clock: counts follow demand within bounds, without nonsense, with their reasons."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.control.scaling_world import BATCH, NO_DEMAND, ScalingWorld, changes, endpoint

from headrace.api.messages import EndpointDemand
from headrace.control.scaling import EndpointScaler, ScaledReplica, ScalingObservation
from headrace.policy.scaling_metrics import MetricReading


def numbers(world: ScalingWorld) -> dict[str, float]:
    return {number.name: number.value for number in world.decision.numbers}


def test_without_demand_the_minimum_runs_and_the_reason_says_so() -> None:
    world = ScalingWorld(endpoint(replicas={"min": 2, "max": 4}))
    decision = world.tick()
    assert (decision.count, decision.reason) == (2, "replicas.min is 2")


@pytest.mark.slow
def test_the_count_follows_a_steady_load_at_the_target_utilization() -> None:
    world = ScalingWorld()
    world.run(240, world.replicas_worth(4.0))
    assert numbers(world)["demand"] == pytest.approx(4.0, rel=0.15)
    assert world.decision.count in (5, 6)  # 4 / 0.8 with some noise
    assert "full replicas arrives" in world.decision.reason or "sufficed" in world.decision.reason


def test_a_step_of_load_is_answered_by_one_decision_once_it_is_seen() -> None:
    world = ScalingWorld(start_s=20.0)
    world.run(120, world.replicas_worth(1.0), noise=False)
    before = world.decision.count
    counts = world.run(20, world.replicas_worth(6.0), noise=False)
    assert before == 2
    assert counts[-1] >= 8
    # The level is a mean over a few seconds: within them the whole step is seen and asked for.
    assert counts[20] >= 8


def test_a_single_burst_asks_for_little() -> None:
    world = ScalingWorld(start_s=60.0)
    world.run(240, world.replicas_worth(2.0), noise=False)
    before = world.decision.count
    world.arrive(world.replicas_worth(4.0))  # one second's worth of four more replicas
    counts = world.run(60, world.replicas_worth(2.0), noise=False)
    assert max(counts) <= before + 1


def test_growing_demand_is_met_before_it_comes() -> None:
    world = ScalingWorld(start_s=60.0)
    world.run(200, world.replicas_worth(1.0), noise=False)
    world.run(400, lambda t: world.replicas_worth(1.0 + t / 100), noise=False)
    assert numbers(world)["forecast"] == pytest.approx(5.0 + 0.6, abs=0.4)
    assert world.num_ready >= 6  # 5 / 0.8


def test_demand_that_falls_takes_replicas_only_after_the_window() -> None:
    config = endpoint(scaling={"target_utilization": 0.8, "down_after_s": 120})
    world = ScalingWorld(config, start_s=20.0)
    world.run(200, world.replicas_worth(6.0), noise=False)
    before = world.decision.count
    early = world.run(110, world.replicas_worth(1.0), noise=False)
    assert set(early) == {before}
    assert "stay until fewer have sufficed for 120 s" in world.decision.reason
    world.run(40, world.replicas_worth(1.0), noise=False)
    assert world.decision.count == 2


def test_a_start_that_takes_long_keeps_replicas_as_long() -> None:
    config = endpoint(scaling={"target_utilization": 0.8, "down_after_s": 10})
    world = ScalingWorld(config, start_s=100.0)
    world.run(400, world.replicas_worth(3.0), noise=False)
    before = world.decision.count
    assert world.scaler.start_s == pytest.approx(100.0, abs=1.0)
    assert set(world.run(95, world.replicas_worth(0.5), noise=False)) == {before}


@pytest.mark.slow
@pytest.mark.parametrize("load", [1.57, 3.2])
def test_constant_load_with_noise_does_not_flap(load: float) -> None:
    world = ScalingWorld(start_s=20.0, seed=round(load * 100))
    world.run(600, world.replicas_worth(load))
    assert changes(world.run(3600, world.replicas_worth(load))) <= 12


def test_at_zero_held_requests_start_one_at_once() -> None:
    world = ScalingWorld(endpoint(replicas={"min": 0, "max": 4}), is_measured=False)
    assert world.tick().count == 0
    world.demand = msgspec.structs.replace(world.demand, num_held=1, arrived=1)
    assert world.tick().count == 1
    assert "held" in world.decision.reason


def test_zero_comes_only_by_idleness_in_the_gateways_view() -> None:
    config = endpoint(replicas={"min": 0, "max": 4}, scaling={"idle_to_zero_s": 30, "down_after_s": 1})
    world = ScalingWorld(config)
    world.run(60, world.replicas_worth(1.0), noise=False)
    world.demand = msgspec.structs.replace(world.demand, num_in_flight=1)
    assert 0 not in world.run(120, 0.0)  # one answer still streams
    world.demand = msgspec.structs.replace(world.demand, num_in_flight=0)
    assert 0 not in world.run(29, 0.0)
    world.is_complete = False
    assert 0 not in world.run(60, 0.0)
    assert "while a gateway is silent" in world.decision.reason
    world.is_complete = True
    assert world.tick().count == 0


def test_a_request_that_only_its_replica_told_of_yet_keeps_the_endpoint_from_zero() -> None:
    config = endpoint(replicas={"min": 0, "max": 4}, scaling={"idle_to_zero_s": 30, "down_after_s": 1})
    world = ScalingWorld(config)
    world.run(60, world.replicas_worth(1.0), noise=False)
    world.run(29, 0.0)
    world.num_open = 1  # bound after the router's last word
    assert 0 not in world.run(5, 0.0)
    assert world.decision.reason == "had requests 0 s ago"
    world.num_open = 0
    assert 0 not in world.run(29, 0.0)
    assert 0 in world.run(2, 0.0)


def test_before_anything_is_measured_open_requests_ask_by_the_engines_batch() -> None:
    world = ScalingWorld(is_measured=False)
    world.demand = msgspec.structs.replace(world.demand, num_held=40, num_in_flight=BATCH)
    assert world.tick().count == math.ceil((40 + BATCH) / (BATCH * 0.8))
    assert "nothing is measured yet" in world.decision.reason


def test_held_requests_that_wait_too_long_ask_for_more_but_at_most_twice_what_serves() -> None:
    world = ScalingWorld(start_s=10.0)
    world.run(120, world.replicas_worth(1.5), noise=False)
    before = world.num_ready
    world.demand = msgspec.structs.replace(
        world.demand, num_held=5000, oldest_held_s=3.0, held_prompt_tokens=5000 * 500.0
    )
    world.tick()
    assert world.decision.count == 2 * before
    assert "held for 3.0 s" in world.decision.reason
    for _ in range(5):  # what it asked for is on its way: it does not ask again for the same
        world.tick()
    assert world.decision.count == 2 * before


def test_a_little_that_is_held_asks_for_no_more_than_clears_it() -> None:
    world = ScalingWorld(start_s=10.0)
    world.run(120, world.replicas_worth(1.5), noise=False)
    before = world.decision.count
    world.demand = msgspec.structs.replace(
        world.demand, num_held=5, oldest_held_s=3.0, held_prompt_tokens=2500.0
    )
    assert world.tick().count == before


def test_replicas_on_standby_spare_the_forecast_of_a_whole_start() -> None:
    config = endpoint(replicas={"min": 1, "max": 16, "standby": 2})
    world = ScalingWorld(config, start_s=60.0)
    world.standby = [0.0, 0.0]
    decision = world.tick()
    assert (decision.count, decision.standby) == (1, 2)
    world.run(200, world.replicas_worth(1.0), noise=False)
    world.run(200, lambda t: world.replicas_worth(1.0 + t / 100), noise=False)
    with_standby = world.decision.count
    alone = ScalingWorld(start_s=60.0)
    alone.run(200, alone.replicas_worth(1.0), noise=False)
    alone.run(200, lambda t: alone.replicas_worth(1.0 + t / 100), noise=False)
    assert with_standby < alone.decision.count
    assert numbers(world)["standby"] == 2


def test_serving_and_standby_together_stay_within_the_maximum() -> None:
    world = ScalingWorld(endpoint(replicas={"min": 3, "max": 4, "standby": 2}))
    decision = world.tick()
    assert (decision.count, decision.standby) == (3, 1)


def test_promotions_are_measured_from_the_word_to_the_report() -> None:
    scaler = EndpointScaler(endpoint())
    for now_s, phase, promoted_s in ((1.0, "standby", None), (2.0, "standby", 2.0), (2.4, "ready", 2.0)):
        replica = ScaledReplica("chat-1", phase, 0.0, None, promoted_s)  # type: ignore[arg-type]
        scaler.observe(ScalingObservation({}, [replica]), now_s)
    assert scaler.promotion_s == pytest.approx(0.4)


def test_a_restarted_scaler_takes_nothing_away_before_it_has_watched() -> None:
    world = ScalingWorld(start_s=20.0)
    world.started = [0.0] * 5
    counts = world.run(55, world.replicas_worth(0.5), noise=False)
    assert set(counts) == {5}
    world.run(10, world.replicas_worth(0.5), noise=False)
    assert world.decision.count < 5


def test_a_lower_minimum_of_the_user_takes_effect_at_once() -> None:
    world = ScalingWorld(endpoint(replicas={"min": 3, "max": 4}))
    world.run(5, 0.0)
    world.scaler.configure(endpoint(replicas={"min": 1, "max": 4}))
    assert world.tick().count == 1
    world.scaler.configure(endpoint(replicas={"min": 0, "max": 4}))
    world.scaler.end()
    assert world.tick().count == 0


def ended_world(**demand: int) -> ScalingWorld:
    """An endpoint in use, which a user takes to zero now."""
    config = endpoint(replicas={"min": 0, "max": 4}, scaling={"idle_to_zero_s": 30, "down_after_s": 1})
    world = ScalingWorld(config, start_s=2.0)
    world.run(20, world.replicas_worth(0.5), noise=False)
    world.demand = msgspec.structs.replace(world.demand, **demand)
    assert world.tick().count == 1
    world.scaler.end()
    return world


def test_a_users_zero_comes_at_once_and_late_news_of_what_was_before_brings_nothing_back() -> None:
    world = ended_world(num_in_flight=3)
    assert world.tick().count == 0
    assert world.decision.reason == "a user took it to zero; 3 open requests may finish"
    world.arrive(2)  # they came just before, or went to the replica while it was told to leave
    assert world.tick().count == 0
    world.demand = msgspec.structs.replace(world.demand, num_in_flight=0)
    assert set(world.run(100, 0.0)) == {0}


def test_after_a_users_zero_a_held_request_starts_it_as_one_at_any_zero_and_idleness_ends_it() -> None:
    world = ended_world(num_in_flight=1)
    world.run(5, 0.0)
    world.demand = msgspec.structs.replace(world.demand, num_held=1, arrived=world.demand.arrived + 1)
    assert world.tick().count == 1
    world.demand = msgspec.structs.replace(world.demand, num_held=0, num_in_flight=1)
    assert set(world.run(60, 0.0)) == {1}, "it is in use again: an open request keeps it"
    world.demand = msgspec.structs.replace(world.demand, num_in_flight=0)
    assert set(world.run(29, 0.0)) == {1}
    assert world.run(3, 0.0)[-1] == 0


def test_what_is_held_when_a_user_takes_it_to_zero_is_served_first() -> None:
    world = ended_world(num_in_flight=4, num_held=2)
    assert set(world.run(10, 0.0)) == {1}
    world.demand = msgspec.structs.replace(world.demand, num_held=1)
    assert set(world.run(10, 0.0)) == {1}
    world.demand = msgspec.structs.replace(world.demand, num_held=0)
    assert world.tick().count == 0
    later = ended_world(num_held=1)
    later.demand = msgspec.structs.replace(later.demand, num_held=2)  # one more: it is in use
    later.tick()
    later.demand = msgspec.structs.replace(later.demand, num_held=0)
    assert set(later.run(25, 0.0)) == {1}


def test_a_user_who_wants_replicas_again_ends_the_zero() -> None:
    world = ended_world()
    assert world.tick().count == 0
    world.scaler.configure(endpoint(replicas={"min": 1, "max": 4}))
    assert world.tick().count == 1
    world.scaler.configure(endpoint(replicas={"min": 0, "max": 4}, scaling={"idle_to_zero_s": 30}))
    world.demand = msgspec.structs.replace(world.demand, num_in_flight=1)
    assert set(world.run(5, 0.0)) == {1}


def test_a_custom_metric_is_a_lower_bound_and_shown() -> None:
    world = ScalingWorld()
    world.metrics = [MetricReading("jobs", 10.0, 60.0, 45.0, 1.0)]
    assert world.tick().count == 5
    assert world.decision.reason == "metric jobs: 45 at 10 per replica"
    assert numbers(world)["metric jobs"] == 4.5


@pytest.mark.parametrize(
    ("value", "age_s", "word"),
    [
        (None, 1.0, "no such file"),
        (math.nan, 1.0, "finite"),
        (math.inf, 1.0, "finite"),
        (-1.0, 1.0, "finite"),
        (50.0, 61.0, "61 s old"),
        (50.0, math.nan, "old"),
        (1e300, 1.0, "would need"),
    ],
)
def test_a_metric_that_cannot_be_believed_asks_for_nothing_and_says_why(
    value: float | None, age_s: float, word: str
) -> None:
    world = ScalingWorld()
    error = "no such file" if value is None else ""
    world.metrics = [MetricReading("jobs", 10.0, 60.0, value, age_s, error)]
    assert world.tick().count == 1
    note = next(number.note for number in world.decision.numbers if number.name == "metric jobs")
    assert note.startswith("ignored: ")
    assert word in note


def test_the_last_changes_are_kept_newest_first_with_their_reasons() -> None:
    world = ScalingWorld()
    for count in range(2, 30):
        world.metrics = [MetricReading("jobs", 1.0, 60.0, float(count), 1.0)]
        world.tick()
    lines = world.decision.history
    assert len(lines) <= 16
    assert "15 -> 16" in lines[0]
    assert "replicas.max is 16" in world.decision.reason
    explanation = world.decision.explanation("chat")
    assert explanation.decision == "chat: 16 replicas"
    assert explanation.history == list(lines)


def test_a_router_that_restarts_counts_from_zero_without_a_burst_or_a_gap() -> None:
    world = ScalingWorld()
    world.run(120, world.replicas_worth(2.0), noise=False)
    before = world.decision.count
    world.demand, world.router = NO_DEMAND, "g1/2"
    assert set(world.run(30, world.replicas_worth(2.0), noise=False)) == {before}
    world.demand = NO_DEMAND  # the same name with lower counters
    assert set(world.run(30, world.replicas_worth(2.0), noise=False)) == {before}


def test_the_first_sight_of_a_long_running_router_is_no_burst() -> None:
    world = ScalingWorld()
    world.arrive(1_000_000)
    assert set(world.run(20, 0.0)) == {1}


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_moves_no_count(jump_s: float) -> None:
    config = endpoint(replicas={"min": 0, "max": 16})
    world = ScalingWorld(config)
    world.run(240, world.replicas_worth(2.0), noise=False)
    before = world.decision.count
    world.started = [started_s + jump_s for started_s in world.started]
    world.now_s += jump_s
    assert set(world.run(50, world.replicas_worth(2.0), noise=False)) == {before}


floats = st.floats(allow_nan=True, allow_infinity=True, width=32)
counters = st.integers(-(1 << 70), 1 << 70)


@st.composite
def nonsense(draw: st.DrawFn) -> EndpointDemand:
    values: dict[str, Any] = {
        name: draw(counters)
        for name in ("num_held", "num_in_flight", "arrived", "finished", "aborted", "refused", "failed")
    }
    values |= {
        name: draw(counters) for name in ("prompt_tokens", "cached_tokens", "output_tokens", "measured")
    }
    values |= {
        name: draw(floats)
        for name in ("oldest_held_s", "arrived_prompt_tokens", "engine_s", "held_prompt_tokens")
    }
    return EndpointDemand(endpoint="chat", **values)


@given(
    steps=st.lists(st.tuples(nonsense(), floats, st.sampled_from(["g1/1", "g1/2", "g2/1"])), max_size=12),
    minimum=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_no_nonsense_in_gives_nonsense_out(
    steps: list[tuple[EndpointDemand, float, str]], minimum: int
) -> None:
    world = ScalingWorld(endpoint(replicas={"min": minimum, "max": 5}))
    world.run(5, world.replicas_worth(1.0))
    for demand, now_s, router in steps:
        world.scaler.observe(ScalingObservation({router: demand}, world.replicas()), now_s)
        decision = world.scaler.decide(now_s)
        assert minimum <= decision.count <= 5
        assert 0 <= decision.standby <= 5
        assert decision.reason
        assert all(math.isfinite(number.value) for number in decision.numbers)


@given(low=st.floats(0.0, 8.0), extra=st.floats(0.0, 8.0), start_s=st.sampled_from([3.0, 20.0, 60.0]))
@settings(max_examples=15, deadline=None)
def test_more_demand_never_means_fewer_replicas(low: float, extra: float, start_s: float) -> None:
    counts = []
    for load in (low, low + extra):
        world = ScalingWorld(endpoint(replicas={"min": 0, "max": 64}), start_s=start_s)
        world.run(60, world.replicas_worth(load), noise=False)
        counts.append(world.decision.count)
        assert 0 <= world.decision.count <= 64
    assert counts[0] <= counts[1]


@pytest.mark.slow
def test_an_slo_lowers_the_utilization_as_far_as_waits_ask_for_it() -> None:
    scaling = {"target_utilization": 1.0}
    counts = {}
    for ttft_ms in (0, 30_000, 600):
        world = ScalingWorld(endpoint(scaling=scaling, slo={"ttft_ms": ttft_ms, "itl_ms": 50}))
        world.run(200, world.replicas_worth(3.0))
        counts[ttft_ms] = numbers(world).get("slo_utilization", 1.0)
    assert counts[600] < counts[30_000] < 1.0 + 1e-9
    assert counts[0] == 1.0


def test_an_slo_that_a_prompt_alone_takes_leaves_a_tenth_for_waiting() -> None:
    world = ScalingWorld(endpoint(slo={"ttft_ms": 10, "itl_ms": 50}))
    world.run(60, world.replicas_worth(1.0), noise=False)
    assert numbers(world)["wait_slack"] == pytest.approx(0.001)
    assert 1 <= world.decision.count <= 16


def test_replicas_with_far_more_open_than_fills_them_ask_for_more_and_full_ones_do_not() -> None:
    world = ScalingWorld()
    world.run(120, world.replicas_worth(2.0), noise=False)
    ready = world.num_ready
    world.demand = msgspec.structs.replace(world.demand, num_in_flight=BATCH * ready)
    assert world.tick().count == ready
    world.demand = msgspec.structs.replace(world.demand, num_in_flight=2 * BATCH * ready)
    assert world.tick().count == 2 * ready
    assert "requests are open" in world.decision.reason


def test_before_any_observation_the_minimum_is_wanted() -> None:
    decision = EndpointScaler(endpoint(replicas={"min": 2, "max": 4})).decide(5.0)
    assert (decision.count, decision.reason) == (2, "nothing was observed yet")


@pytest.mark.slow
def test_long_runs_keep_their_windows_bounded() -> None:
    world = ScalingWorld()
    for step in range(9000):
        world.arrive(5 + step % 7)
        world.tick(1.0)
    assert len(world.scaler._window._times) <= 4097
    assert len(world.scaler._keeper._needs) <= 32 * 16 + 1


@pytest.mark.slow
def test_with_an_slo_the_room_for_growth_is_learned_and_explained() -> None:
    config = endpoint(scaling={"down_after_s": 20}, slo={"ttft_ms": 2000, "itl_ms": 50})
    world = ScalingWorld(config, start_s=10.0)
    world.run(100, world.replicas_worth(3.2))
    assert numbers(world)["target_utilization"] == 0.7, "until enough was seen"
    assert world.decision.count >= 5
    world.run(500, world.replicas_worth(3.2))
    assert numbers(world)["target_utilization"] == 1.0
    assert numbers(world)["margin"] <= 0.1, "steady demand needs little"
    assert world.decision.count == 4
    assert "within the SLO" in world.decision.reason
    assert numbers(world)["shadow_cost"] == pytest.approx(4 / 3.2, rel=0.1)


def test_a_target_utilization_of_the_users_stays_the_most_with_an_slo_too() -> None:
    config = endpoint(
        scaling={"down_after_s": 10, "target_utilization": 0.5}, slo={"ttft_ms": 2000, "itl_ms": 50}
    )
    world = ScalingWorld(config, start_s=5.0)
    world.run(150, world.replicas_worth(2.9), noise=False)
    assert numbers(world)["target_utilization"] == 0.5
    assert world.decision.count == 6


def test_what_was_asked_for_in_a_hurry_goes_a_start_after_nothing_is_held_any_more() -> None:
    world = ScalingWorld(endpoint(scaling={"down_after_s": 120, "target_utilization": 0.8}), start_s=5.0)
    world.run(130, world.replicas_worth(1.4), noise=False)
    assert world.decision.count == 2
    world.demand = msgspec.structs.replace(
        world.demand, num_held=400, oldest_held_s=6.0, held_prompt_tokens=200_000
    )
    world.tick()
    assert world.decision.count == 4
    assert "is held for" in world.decision.reason
    world.demand = msgspec.structs.replace(world.demand, num_held=0, oldest_held_s=0.0, held_prompt_tokens=0)
    counts = world.run(25, world.replicas_worth(1.4), noise=False)
    assert counts[2] == 4
    assert counts[-1] == 2, "long before down_after_s"
