"""A real model's keys and values when its engine is killed: what the next engine and a sibling have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.integration.test_engine_process import EngineUnderTest, has_finished, start_engine

from headrace.api.messages import (
    KV_MEMORY_NAME,
    EngineSpec,
    GenerationRequest,
    KvPlace,
    SamplingParams,
    StepBatch,
    StepOutput,
    Submit,
)

pytestmark = pytest.mark.slow
PROMPT = [5 + k * 37 % 900 for k in range(150)]
REQUEST = GenerationRequest("r", PROMPT, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))


@pytest.fixture
def memory() -> Iterator[tuple[int, int]]:
    """Of two replicas."""
    descriptors = os.memfd_create(KV_MEMORY_NAME), os.memfd_create(KV_MEMORY_NAME)
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def continue_in(engine: EngineUnderTest, request: GenerationRequest) -> tuple[list[int], int, int]:
    """Return the tokens, how many prompt tokens were cached, and how many tokens were copied."""
    engine.send(Submit(request))
    outputs: list[StepOutput] = []
    num_imported = 0
    while not has_finished("r")(outputs):
        batch = engine.next_event()
        assert isinstance(batch, StepBatch), batch
        outputs += batch.outputs
        num_imported = batch.load.num_imported_tokens
    return tokens_of(outputs), outputs[0].num_cached_tokens, num_imported


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_killed_engines_work_is_not_done_again(dtype: str, memory: tuple[int, int], tmp_path: Path) -> None:
    spec = EngineSpec(
        "native",
        "smollm2-135m-instruct",
        kv_cache_bytes=32 << 20,
        num_threads=1,
        dtype=dtype,  # type: ignore[arg-type]
        packed_dir=str(tmp_path),
    )
    own, other = (msgspec.structs.replace(spec, kv_descriptor=descriptor) for descriptor in memory)
    with start_engine(spec) as engine:
        engine.wait_ready()
        right, _, _ = continue_in(engine, REQUEST)
    with start_engine(own, pass_fds=memory) as engine:
        engine.wait_ready()
        engine.send(Submit(REQUEST))
        tokens = tokens_of(engine.outputs_until(lambda outputs: len(tokens_of(outputs)) >= 20))
        engine.process.kill()
        tokens += tokens_of([o for e in engine.rest() if isinstance(e, StepBatch) for o in e.outputs])
    num_full = (len(PROMPT) + len(tokens) - 1) // 16 * 16
    resumed = msgspec.structs.replace(REQUEST, resume_from=tokens)
    with start_engine(other, pass_fds=memory) as sibling:
        sibling.wait_ready()
        at_dead = msgspec.structs.replace(resumed, kv_place=KvPlace(os.getpid(), memory[0]))
        rest, num_cached, num_imported = continue_in(sibling, at_dead)
        assert (num_cached, num_imported) == (len(PROMPT), num_full)
        assert tokens + rest == right
    with start_engine(own, pass_fds=memory) as engine:
        engine.wait_ready()
        rest, num_cached, num_imported = continue_in(engine, resumed)
        assert (num_cached, num_imported) == (len(PROMPT), 0), "it begins with what is there"
        assert tokens + rest == right
