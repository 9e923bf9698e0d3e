"""The whole native engine over real arithmetic, batched, shared and preempted, against the naive oracle."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.unit.engine.tiny_models import VOCAB_SIZE, huggingface_directory

from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams
from headrace.clock import VirtualClock
from headrace.engine.naive import NaiveModel
from headrace.engine.native import NativeEngine
from headrace.engine.runner import load_runner

BLOCK_SIZE = 8
NUM_BLOCKS = 16
NUM_TOKENS = 24


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_greedy_tokens_are_those_of_the_naive_model_under_preemption_and_sharing(
    tmp_path: Path, architecture: str
) -> None:
    files = huggingface_directory(tmp_path, architecture)
    naive = NaiveModel(files)
    spec = EngineSpec(
        "native",
        "tiny",
        max_running=6,
        token_budget=16,
        block_size=BLOCK_SIZE,
        num_threads=1,
        dtype="float32",
    )
    runner = load_runner(spec, files, lambda _phase: None)
    runner.num_blocks = NUM_BLOCKS  # Fewer than it has: requests must preempt each other.
    engine = NativeEngine(spec, runner, VirtualClock())
    engine.compute_first_step()

    seed = 20
    generator = random.Random(seed)
    shared = [generator.randrange(VOCAB_SIZE) for _ in range(20)]
    prompts = {
        f"r{i}": shared[: generator.choice((0, 12, 20))]
        + [generator.randrange(VOCAB_SIZE) for _ in range(generator.randint(1, 12))]
        for i in range(10)
    }
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    for request_id, prompt in prompts.items():
        engine.submit(GenerationRequest(request_id, prompt, sampling))
    tokens: dict[str, list[int]] = {request_id: [] for request_id in prompts}
    while engine.has_work():
        for output in engine.step().outputs:
            tokens[output.request_id] += output.token_ids
        engine.check_integrity()

    load = engine.load()
    assert load.num_preemptions > 0
    assert load.prefix_hit_tokens > 0
    for request_id, prompt in prompts.items():
        assert tokens[request_id] == naive.generate(prompt, NUM_TOKENS), f"{request_id}, seed {seed}"
