"""Engines of two ranks, each a process: the tokens of one rank, and an end of all when one is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.integration.test_engine_process import EngineUnderTest, has_finished, request, start_engine
from tests.unit.engine.tiny_models import huggingface_directory

from headrace.api.messages import (
    EngineFailed,
    EngineSpec,
    EngineStarting,
    GenerationRequest,
    SamplingParams,
    Submit,
)
from headrace.clock import SystemClock
from headrace.engine.model_files.resolve import ModelFiles, resolve_model
from headrace.engine.native import NativeEngine
from headrace.engine.workers.group import WorkerGroup
from headrace.engine.workers.local import start_local_rank
from headrace.engine.workers.parallel_runner import load_any_runner
from headrace.errors import EngineDead
from headrace.units import MIB

# Each rank imports torch.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("library")]
DEADLINE_S = 60.0
SMOLLM2 = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return huggingface_directory(tmp_path_factory.mktemp("tiny"))


def settle(is_so: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


# ---- the tokens of one rank


def smollm2(num_ranks: int, packed: Path) -> EngineSpec:
    return EngineSpec(
        "native",
        SMOLLM2,
        tensor_parallel=num_ranks,
        num_threads=num_ranks,
        dtype="int8",
        max_running=4,
        token_budget=64,
        max_context_tokens=256,
        kv_cache_bytes=3 * MIB,  # 16 blocks of 16 tokens for three requests that want 20
        packed_dir=str(packed),
    )


def engine_of(spec: EngineSpec) -> tuple[NativeEngine, WorkerGroup | None]:
    group = WorkerGroup(spec, start_local_rank) if spec.tensor_parallel > 1 else None
    runner = load_any_runner(spec, resolve_model(spec.model), lambda _phase: None, group)
    return NativeEngine(spec, runner, SystemClock()), group


def generate(engine: NativeEngine, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    for request_id, prompt in prompts.items():
        sampling = SamplingParams(max_tokens=48, temperature=0.8, seed=7, ignore_eos=True)
        engine.submit(GenerationRequest(request_id, prompt, sampling))
    tokens: dict[str, list[int]] = {request_id: [] for request_id in prompts}
    while engine.has_work():
        for output in engine.step().outputs:
            assert not output.error, output
            tokens[output.request_id] += output.token_ids
        engine.check_integrity()
    return tokens


def test_two_ranks_give_the_tokens_of_one_through_chunks_preemption_shared_prefixes_and_sleep(
    packed: Path,
) -> None:
    shared = list(range(2000, 2060))
    prompts = {f"r{i}": shared + [504, 3575, 282, 7158, 314 + i] * (4 + i) for i in range(3)}
    alone, _ = engine_of(smollm2(1, packed))
    expected = generate(alone, prompts)
    assert alone.load().num_preemptions > 0
    engine, group = engine_of(smollm2(2, packed))
    assert group is not None
    assert engine.describe().num_total_blocks == alone.describe().num_total_blocks
    assert engine.describe().path.endswith(", 1 thread in each of 2 ranks")
    assert generate(engine, prompts) == expected
    assert engine.load().num_preemptions == alone.load().num_preemptions
    assert engine.load().prefix_hit_tokens == alone.load().prefix_hit_tokens > 0
    for level in (1, 2):
        engine.sleep(level)  # type: ignore[arg-type]
        engine.wake()
        assert generate(engine, {f"{level}{name}": prompt for name, prompt in prompts.items()}) == {
            f"{level}{name}": tokens for name, tokens in expected.items()
        }
    group.close()
    names = sorted(path.name for path in packed.glob("*.packed"))
    assert len(names) == 3, f"one file for the whole model, and one for each of two ranks: {names}"


# ---- an end of all when one is lost


def tiny_spec(files: ModelFiles, **settings: object) -> EngineSpec:
    fields = {"tensor_parallel": 2, "num_threads": 2, "dtype": "float32", "kv_cache_bytes": MIB}
    return EngineSpec("native", str(files.path), **(fields | settings))  # type: ignore[arg-type]


def rank_of(engine: EngineUnderTest) -> psutil.Process:
    """The process of rank 1, as soon as there is one."""
    parent = psutil.Process(engine.process.pid)
    settle(lambda: bool(parent.children()), "no rank was started")
    (child,) = parent.children()
    return child


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def failure(engine: EngineUnderTest) -> EngineFailed:
    """What the engine says last; it ends, and its rank with it."""
    last = engine.rest()[-1]
    assert isinstance(last, EngineFailed), last
    assert engine.process.wait(DEADLINE_S) == 1
    return last


def test_a_rank_that_is_killed_in_a_step_ends_the_engine_at_once_and_says_so(tiny: ModelFiles) -> None:
    with start_engine(tiny_spec(tiny)) as engine:
        engine.wait_ready()
        rank = rank_of(engine)
        engine.send(Submit(GenerationRequest("r", [5, 6], SamplingParams(max_tokens=250, ignore_eos=True))))
        engine.outputs_until(lambda outputs: len(outputs) > 5)
        rank.kill()
        failed = failure(engine)
    assert failed.retryable
    assert f"rank 1 was lost: pid {rank.pid} ended with signal 9" in failed.error


def test_a_rank_that_is_killed_while_nothing_runs_is_missed_with_the_next_heartbeat(tiny: ModelFiles) -> None:
    with start_engine(tiny_spec(tiny)) as engine:
        engine.wait_ready()
        rank_of(engine).kill()
        assert "rank 1 was lost" in failure(engine).error


def test_a_rank_that_is_killed_during_start_ends_the_start(tiny: ModelFiles) -> None:
    with start_engine(tiny_spec(tiny)) as engine:
        assert isinstance(engine.next_event(), EngineStarting)
        rank_of(engine).kill()
        failed = failure(engine)
    assert failed.retryable
    assert "rank 1 was lost" in failed.error


def test_ranks_die_with_their_engine_even_stopped_ones(tiny: ModelFiles) -> None:
    with start_engine(tiny_spec(tiny)) as engine:
        engine.wait_ready()
        rank = rank_of(engine)
        rank.suspend()
        engine.process.kill()
        settle(lambda: is_gone(rank), "the rank lives on")


def test_a_drained_engine_takes_its_rank_along(tiny: ModelFiles) -> None:
    with start_engine(tiny_spec(tiny)) as engine:
        engine.wait_ready()
        rank = rank_of(engine)
        os.kill(rank.pid, signal.SIGTERM)  # a whole group is told to end: a rank waits for its engine
        engine.send(request("r", 5, [5, 6]))
        engine.outputs_until(has_finished("r"))
        engine.process.send_signal(signal.SIGTERM)
        assert engine.process.wait(DEADLINE_S) == 0
        assert is_gone(rank)


def test_more_ranks_than_heads_are_refused_with_what_is_allowed(tiny: ModelFiles) -> None:
    with start_engine(tiny_spec(tiny, tensor_parallel=5)) as engine:
        failed = failure(engine)
    assert not failed.retryable
    assert "tensor_parallel is 5; this model has 4 heads on 2 KV heads: it must be 1 to 2" in failed.error


def test_a_hung_rank_ends_the_step_within_the_limit(tiny: ModelFiles) -> None:
    spec = tiny_spec(tiny)
    group = WorkerGroup(spec, start_local_rank, meeting_limit_s=0.5)
    runner = load_any_runner(spec, tiny, lambda _phase: None, group)
    engine = NativeEngine(spec, runner, SystemClock())
    engine.compute_first_step()
    (rank,) = [each for each in psutil.Process().children() if "rank 1" in " ".join(each.cmdline())]
    rank.suspend()
    engine.submit(GenerationRequest("r", [5, 6], SamplingParams(max_tokens=5)))
    begin_s = time.monotonic()
    with pytest.raises(EngineDead, match=r"rank 1 has not come within 0\.5 s: it hangs"):
        engine.step()
    assert time.monotonic() - begin_s < 10
    group.close()
    assert is_gone(rank)
