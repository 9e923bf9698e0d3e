"""Several ranks compute one model: the same bits in int8, the same tokens in float32."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.engine.rank_rig import Ranks, rank_sizes
from tests.unit.engine.step_builder import Part, step_input
from tests.unit.engine.test_shard import SMOLLM2
from tests.unit.engine.tiny_models import huggingface_directory

from headrace.api.messages import EngineSpec
from headrace.engine.operations.exchange import Exchange
from headrace.engine.operations.kernels import Library
from headrace.engine.operations.shard import cut
from headrace.engine.operations.shared_memory import SharedMemory
from headrace.engine.runner import DecoderRunner, load_runner
from headrace.errors import EngineDead, OutOfMemory

BLOCK_SIZE = 8
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole KV groups": ("llama", {}),
    "uneven KV groups": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}),
    "one KV head": ("gemma3", {"num_key_value_heads": 1}),
    "untied, an odd vocabulary": ("llama", {"tie_word_embeddings": False, "vocab_size": 85}),
}


def spec(num_ranks: int, dtype: str) -> EngineSpec:
    return EngineSpec(
        "native",
        "m",
        tensor_parallel=num_ranks,
        dtype=dtype,  # type: ignore[arg-type]
        block_size=BLOCK_SIZE,
        token_budget=64,
        max_running=8,
        kv_cache_bytes=1 << 20,
        num_threads=num_ranks,
    )


def logits_of(runner: DecoderRunner | Ranks, seed: int) -> list[torch.Tensor]:
    """Steps of three requests: prompts in chunks, then decodes in a batch, one row of some not sampled."""
    generator = np.random.default_rng(seed)
    tokens = [generator.integers(0, 85, 60).tolist() for _ in range(3)]
    tables = [list(range(first, first + 8)) for first in (1, 9, 17)]
    steps: list[list[tuple[int, int, int]]] = [
        [(0, 0, 30)],
        [(0, 30, 31), (1, 0, 17), (2, 0, 5)],
        [(0, 31, 32), (1, 17, 40), (2, 5, 6)],
        [(0, 32, 33), (1, 40, 41), (2, 6, 7)],
    ]
    found = []
    for step in steps:
        parts = [Part(tokens[row], start, end, tables[row]) for row, start, end in step]
        found.append(runner.execute(step_input(parts, BLOCK_SIZE)).clone())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("has_links", [False, True], ids=["shared memory", "TCP"])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("model", MODELS)
def test_int8_logits_are_the_same_bits_with_any_number_of_ranks(
    library: Library, tmp_path: Path, model: str, num_ranks: int, has_links: bool
) -> None:
    architecture, changes = MODELS[model]
    files = huggingface_directory(tmp_path, architecture, **(changes | {"hidden_size": 96}))
    alone = load_runner(spec(1, "int8"), files, lambda _: None)
    ranks = Ranks(files, spec(num_ranks, "int8"), has_links=has_links)
    for expected, found in zip(logits_of(alone, 1), logits_of(ranks, 1), strict=True):
        assert expected.shape == found.shape
        assert torch.equal(expected, found)
    ranks.close()


@pytest.mark.slow
@pytest.mark.parametrize("has_links", [False, True], ids=["shared memory", "TCP"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["uneven KV groups", "one KV head"])
def test_float_logits_are_those_of_one_rank_but_for_rounding(
    library: Library, tmp_path: Path, model: str, dtype: str, has_links: bool
) -> None:
    architecture, changes = MODELS[model]
    files = huggingface_directory(tmp_path, architecture, **changes)
    alone = load_runner(spec(1, dtype), files, lambda _: None)
    ranks = Ranks(files, spec(2, dtype), has_links=has_links)
    for expected, found in zip(logits_of(alone, 2), logits_of(ranks, 2), strict=True):
        error = float((expected - found).norm() / expected.norm())
        assert error < (1e-5 if dtype == "float32" else 0.05)
    ranks.close()


def meeting_place(
    library: Library, watched: list[int], limit_s: float
) -> tuple[SharedMemory, list[Exchange]]:
    """Two ranks' doors in one process."""
    memory = SharedMemory(rank_sizes(SMOLLM2))
    return memory, [Exchange(library, memory, shard, watched, limit_s) for shard in cut(SMOLLM2, 2)]


def test_ranks_read_what_others_wrote_before_they_met(library: Library) -> None:
    _, (first, second) = meeting_place(library, [], 20.0)
    found: list[torch.Tensor] = []

    def other() -> None:
        for _ in range(300):
            found.append(second.gather("output", range(1, 3), torch.full((2, 2), 7.0), 3).clone())
            second.meet()

    thread = threading.Thread(target=other)
    thread.start()
    for index in range(300):
        own = torch.full((2, 1), float(index))
        rows = first.gather("output", range(1), own, 3).tolist()
        assert rows == [[index, 7.0, 7.0]] * 2
        first.meet()
    thread.join(20)
    assert [rows[0, 0] for rows in found] == list(range(300))


def test_a_rank_that_does_not_come_is_named_when_the_limit_is_over(library: Library) -> None:
    _, (first, _) = meeting_place(library, [], 0.02)
    with pytest.raises(EngineDead, match=r"rank 1 has not come within 0\.02 s: it hangs"):
        first.meet()


def test_a_lost_rank_ends_the_meeting_of_who_watches_it_and_of_all_others(library: Library) -> None:
    ours, theirs = socket.socketpair()
    memory, (first, _) = meeting_place(library, [ours.fileno()], 20.0)
    begin_s = time.monotonic()
    closing = threading.Timer(0.02, theirs.close)
    closing.start()
    with pytest.raises(EngineDead, match="a rank was lost"):
        first.meet()
    # Nobody watches for it: it was told.
    unwatching = Exchange(library, memory, cut(SMOLLM2, 3)[2], [], 20.0)
    with pytest.raises(EngineDead, match="a rank was lost"):
        unwatching.meet()
    assert time.monotonic() - begin_s < 10
    ours.close()


def test_shared_memory_of_another_size_is_refused() -> None:
    memory = SharedMemory({"a": 10, "b": 5000})
    assert memory.num_bytes == 3 * 4096
    copy = SharedMemory({"a": 10, "b": 5000}, os.dup(memory.descriptor))
    memory.array("b", np.int32)[:3] = [1, 2, 3]
    assert copy.array("b", np.int32)[:4].tolist() == [1, 2, 3, 0]
    with pytest.raises(ValueError, match="12288 bytes and should have 4096"):
        SharedMemory({"a": 10}, os.dup(memory.descriptor))
    with pytest.raises(OutOfMemory, match="ranks cannot share"):
        SharedMemory({"a": 1 << 62})
