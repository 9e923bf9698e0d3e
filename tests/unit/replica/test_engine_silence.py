"""When an engine counts as hung: by what its steps take; starts, first steps and sleep have other limits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.api.messages import EngineLoad, EngineSpec, StepModel
from headrace.replica.engine_silence import KNOWN_AFTER_STEPS, EngineTimeLimits, SilenceWatch

LIMITS = EngineTimeLimits()
SPEC = EngineSpec("native", "m", token_budget=512, max_running=32)
MODEL = StepModel(0.01, 0.0005, 1e-7, 0.001, 1e-7, num_steps=1000)
"""10 ms, and 0.5 ms per prompt token: a full chunk of a long prompt takes 0.3 s and more."""
SLOW = StepModel(0.05, 0.02, 0.0, 0.0, 0.0, num_steps=1000)
"""A large model on a CPU: a full chunk takes 10 s."""


def load_of(model: StepModel | None, **fields: float) -> EngineLoad:
    return EngineLoad(num_total_blocks=1000, num_free_blocks=1000, step_model=model, **fields)  # type: ignore[arg-type]


def watch_of(load: EngineLoad | None) -> SilenceWatch:
    watch = SilenceWatch(SPEC, LIMITS, 0.0)
    watch.heard(0.0, load)
    return watch


def test_with_short_steps_seconds_of_silence_are_a_hang() -> None:
    watch = watch_of(load_of(MODEL, num_running=8, step_s=0.03))
    assert watch.limit_s() == LIMITS.least_silence_s
    checks = [watch.check(0.5 * number) for number in range(1, 12)]
    assert checks == [False] * 10 + [True]
    assert repr(watch) == "SilenceWatch(silent for 5.5 s of 5.0 s)"


def test_a_prompt_that_was_just_sent_may_take_its_time() -> None:
    watch = watch_of(load_of(SLOW))
    assert watch.limit_s() == LIMITS.least_silence_s
    watch.sent(100)
    assert watch.limit_s() > 20 * 100 * SLOW.b
    watch.sent(4000)
    assert watch.limit_s() == LIMITS.silence_s, "never more than before"
    watch.heard(1.0, load_of(SLOW))
    assert watch.limit_s() == LIMITS.least_silence_s


def test_what_attends_to_a_long_context_may_take_longer() -> None:
    long = load_of(StepModel(0.01, 0.0001, 1e-6, 0.0, 0.0, num_steps=1000), num_uncomputed_tokens=500)
    used = EngineLoad(
        num_total_blocks=1000, num_free_blocks=0, num_uncomputed_tokens=500, step_model=long.step_model
    )
    assert watch_of(long).limit_s() == LIMITS.least_silence_s
    assert watch_of(used).limit_s() == LIMITS.silence_s


def test_a_long_step_is_remembered_for_a_while() -> None:
    watch = watch_of(load_of(MODEL, step_s=2.0))
    assert watch.limit_s() == 20.0
    for _ in range(300):
        watch.heard(0.0, load_of(MODEL, step_s=0.02))
    assert watch.limit_s() == LIMITS.least_silence_s


def test_starts_first_steps_and_sleep_have_their_own_limits() -> None:
    assert watch_of(None).limit_s() == LIMITS.start_phase_s
    assert watch_of(load_of(None)).limit_s() == LIMITS.silence_s
    early = StepModel(0.01, 0, 0, 0, 0, num_steps=KNOWN_AFTER_STEPS - 1)
    assert watch_of(load_of(early)).limit_s() == LIMITS.silence_s
    assert watch_of(load_of(MODEL, sleep_level=1)).limit_s() == LIMITS.silence_s
    watch = watch_of(load_of(MODEL))
    watch.is_changing = True
    watch.heard(0.0, load_of(MODEL))
    assert watch.limit_s() == LIMITS.silence_s, "it was perhaps said before the change began"


def test_while_this_process_was_stopped_nobody_was_silent() -> None:
    watch = watch_of(load_of(MODEL))
    assert not watch.check(0.5)
    assert not watch.check(600.0), "a machine that was suspended, say"
    assert watch.silent_s == 1.5
    assert not watch.check(599.0), "a clock that goes back"
    assert watch.silent_s == 1.5


LOADS = st.builds(
    EngineLoad,
    num_running=st.integers(0, 64),
    num_waiting=st.integers(0, 64),
    num_free_blocks=st.integers(0, 1000),
    num_total_blocks=st.just(1000),
    step_s=st.floats(0, 1000),
    num_uncomputed_tokens=st.integers(0, 100_000),
    step_model=st.builds(
        StepModel,
        *[st.floats(0, 1)] * 5,
        num_steps=st.integers(0, 1000),
    ),
)


@given(LOADS, st.lists(st.integers(1, 100_000), max_size=3))
def test_whatever_is_loaded_the_limit_is_between_its_bounds_and_many_steps(
    load: EngineLoad, sent: list[int]
) -> None:
    watch = watch_of(load)
    for num_tokens in sent:
        watch.sent(num_tokens)
    limit_s = watch.limit_s()
    assert LIMITS.least_silence_s <= limit_s <= LIMITS.silence_s
    assert limit_s >= min(LIMITS.silence_s, 10 * load.step_s)
