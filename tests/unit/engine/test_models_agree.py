"""Logits agree with `transformers` on the same weights, and the paged path with the naive oracle."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engine.step_builder import Part, step_input
from tests.unit.engine.tiny_models import VOCAB_SIZE, gguf_file, huggingface_directory, transformers_model

from headrace.api.messages import EngineSpec
from headrace.engine.model_files.metadata import read_metadata
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.models.decoder import Decoder
from headrace.engine.naive import NaiveModel
from headrace.engine.operations.cpu import CpuPrimitives
from headrace.engine.operations.interface import Operations
from headrace.engine.operations.reference import ReferencePrimitives
from headrace.engine.operations.torch_blocks import TorchOperations
from headrace.engine.runner import DecoderRunner, load_runner
from headrace.engine.weights.source import open_weights

BLOCK_SIZE = 8
TOLERANCE = 2e-4
"""Largest difference of float32 logits, which span about ±20 in these models."""
BFLOAT16_ERROR = 0.1
"""Norm of the error over the norm of the logits: 0.03 to 0.06 for these 64-wide random models; a wrong key or
position gives about 1."""
ARCHITECTURES = ["llama", "gemma3"]
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def load(files: ModelFiles, dtype: Any = "float32", **settings: Any) -> DecoderRunner:
    fields = {"kv_cache_bytes": 4 << 20, "block_size": BLOCK_SIZE, "num_threads": 1} | settings
    spec = EngineSpec(kind="native", model="tiny", dtype=dtype, **fields)
    return load_runner(spec, files, on_phase=lambda phase: None)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def whole(token_ids: list[int], blocks: list[int]) -> Any:
    return step_input([Part(token_ids, 0, len(token_ids), blocks)], BLOCK_SIZE)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.dtype == torch.float32
    difference = (found - expected).abs().max().item()
    assert difference <= tolerance, f"logits differ by {difference}, allowed are {tolerance}"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"rope_parameters": LLAMA3_SCALING}),
        ("gemma3", {}),
    ],
    ids=["llama", "llama untied", "llama3 rope", "gemma3"],
)
def test_logits_agree_with_transformers(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    files = huggingface_directory(tmp_path, architecture, **changes)
    token_ids = prompt(40)
    with torch.no_grad():
        expected = transformers_model(architecture, **changes)(torch.tensor([token_ids])).logits[0]
    assert_close(NaiveModel(files).logits(token_ids), expected)
    logits = load(files).execute(whole(token_ids, [7, 3, 11, 2, 5]))
    assert_close(logits[0], expected[-1])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gguf_file_gives_the_same_logits_as_the_directory_it_came_from(
    tmp_path: Path, architecture: str
) -> None:
    # A converted Gemma 3 slides in five layers of six: the file does not say which.
    changes = (
        {}
        if architecture == "llama"
        else {"layer_types": ["sliding_attention"] * 4, "query_pre_attn_scalar": 16}
    )
    directory = huggingface_directory(tmp_path / "directory", architecture, **changes)
    file = gguf_file(tmp_path / "model.gguf", architecture, **changes)
    token_ids = prompt(20)
    assert_close(NaiveModel(file).logits(token_ids), NaiveModel(directory).logits(token_ids), 1e-5)


@cache
def tiny(architecture: str) -> tuple[NaiveModel, dict[str, DecoderRunner]]:
    """A model of each architecture, loaded once: hypothesis calls the test many times."""
    files = huggingface_directory(Path(mkdtemp(prefix="headrace-test-")), architecture)
    return NaiveModel(files), {"cpu": load(files), "bfloat16": load(files, "bfloat16")}


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    """Up to four requests: their tokens, and the lengths of the chunks they are computed in."""
    shared = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=BLOCK_SIZE, max_size=3 * BLOCK_SIZE))
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        own = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20))
        tokens = (shared if draw(st.booleans()) else []) + own
        chunks = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
        requests.append((tokens, chunks))
    return requests


def run_chunked(
    runner: DecoderRunner, requests: list[tuple[list[int], list[int]]], seed: int
) -> list[torch.Tensor]:
    """Compute all requests step by step, in shuffled blocks; full blocks with equal prefixes are shared."""
    blocks = list(range(runner.num_blocks))
    random.Random(seed).shuffle(blocks)
    shared: dict[tuple[int, ...], int] = {}
    tables: list[list[int]] = []
    done = []
    for tokens, _ in requests:
        table, cached = [], 0
        for start in range(0, len(tokens), BLOCK_SIZE):
            key = tuple(tokens[: start + BLOCK_SIZE])
            is_full = len(key) == start + BLOCK_SIZE
            if is_full and key in shared and cached == start and len(tokens) > start + BLOCK_SIZE:
                cached = start + BLOCK_SIZE
            table.append(shared.setdefault(key, blocks.pop()) if is_full and cached > start else blocks.pop())
            if is_full:
                shared.setdefault(key, table[-1])
        tables.append(table)
        done.append(cached)
    logits: list[list[torch.Tensor]] = [[] for _ in requests]
    step = 0
    # A request that shares blocks starts once their owner, which comes first, has filled them.
    while any(at < len(tokens) for at, (tokens, _) in zip(done, requests)):
        parts, members = [], []
        for index, (tokens, chunks) in enumerate(requests):
            owners_ready = (
                all(done[i] == len(requests[i][0]) for i in range(index)) or done[index] % BLOCK_SIZE
            )
            waits = (
                bool(set(tables[index]) & {b for i in range(index) for b in tables[i]}) and not owners_ready
            )
            if done[index] < len(tokens) and not waits:
                end = min(done[index] + chunks[step % len(chunks)], len(tokens))
                parts.append(Part(tokens, done[index], end, tables[index]))
                members.append(index)
                done[index] = end
        for index, row in zip(members, runner.execute(step_input(parts, BLOCK_SIZE)).clone()):
            logits[index].append(row)
        step += 1
    return [rows[-1] for rows in logits]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=40, deadline=None)
@given(requests=workloads(), seed=st.integers(0, 2**16))
def test_the_paged_runner_gives_what_the_naive_model_gives(
    architecture: str, requests: list[tuple[list[int], list[int]]], seed: int
) -> None:
    naive, runners = tiny(architecture)
    found = run_chunked(runners["cpu"], requests, seed)
    for (tokens, _), logits in zip(requests, found):
        assert_close(logits, naive.logits(tokens)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_stays_near_float32(architecture: str) -> None:
    naive, runners = tiny(architecture)
    tokens = prompt(60)
    expected = naive.logits(tokens)[-1]
    found = runners["bfloat16"].execute(whole(tokens, list(range(8))))[0]
    assert relative_error(found, expected) < BFLOAT16_ERROR


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "operations",
    [
        TorchOperations(ReferencePrimitives(torch.float32)),
        TorchOperations(CpuPrimitives(torch.float32, 1, is_packed=False)),
    ],
    ids=["reference", "cpu"],
)
def test_operations_keep_the_contract(tmp_path: Path, architecture: str, operations: Operations) -> None:
    files = huggingface_directory(tmp_path, architecture)
    h = read_metadata(files).hyperparameters
    with torch.inference_mode():
        packed = operations.pack(h, open_weights(files, h).read)
        decoder = Decoder(h.num_layers, operations.load(h, packed, max_context_tokens=64))
        caches = decoder.new_kv_caches(16, BLOCK_SIZE)
        tokens, other = prompt(30), prompt(9, seed=1)
        naive = NaiveModel(files)
        steps = [
            [Part(tokens, 0, 17, [4, 1, 9, 3]), Part(other, 0, 8, [0, 8])],
            [Part(other, 8, 9, [0, 8]), Part(tokens, 17, 29, [4, 1, 9, 3], is_sampled=False)],
            [Part(tokens, 29, 30, [4, 1, 9, 3])],
        ]
        expected = [[tokens[:17], other[:8]], [other], [tokens]]
        for parts, prefixes in zip(steps, expected):
            batch = step_input(parts, BLOCK_SIZE)
            logits = decoder.forward(batch, caches)
            assert logits.shape == (len(prefixes), VOCAB_SIZE)
            for row, prefix in zip(logits, prefixes):
                assert_close(row, naive.logits(prefix)[-1])


@pytest.mark.slow
def test_a_step_that_samples_nothing_gives_no_logits_and_still_fills_its_blocks() -> None:
    naive, runners = tiny("llama")
    tokens = prompt(12)
    first = step_input([Part(tokens, 0, 11, [5, 6], is_sampled=False)], BLOCK_SIZE)
    assert runners["cpu"].execute(first).shape == (0, VOCAB_SIZE)
    logits = runners["cpu"].execute(step_input([Part(tokens, 11, 12, [5, 6])], BLOCK_SIZE))
    assert_close(logits[0], naive.logits(tokens)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["cpu", "bfloat16"])
def test_decodes_of_very_different_lengths_do_not_disturb_each_other(precision: str) -> None:
    naive, runners = tiny("llama")
    runner = runners[precision]
    lengths = [1, 3, 8, 9, 64, 200, 17, 250]
    blocks = iter(random.Random(3).sample(range(runner.num_blocks), 100))
    requests = [(prompt(n, seed=n), [next(blocks) for _ in range(-(-n // BLOCK_SIZE))]) for n in lengths]
    for tokens, table in requests:
        if len(tokens) > 1:
            runner.execute(step_input([Part(tokens, 0, len(tokens) - 1, table)], BLOCK_SIZE))
    parts = [Part(tokens, len(tokens) - 1, len(tokens), table) for tokens, table in requests]
    logits = runner.execute(step_input(parts, BLOCK_SIZE))
    for row, (tokens, _) in zip(logits, requests):
        expected = naive.logits(tokens)[-1]
        assert relative_error(row, expected) < (1e-5 if precision == "cpu" else BFLOAT16_ERROR)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["cpu", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_has_the_same_bits_whoever_its_partners_are(architecture: str, precision: str) -> None:
    runner = tiny(architecture)[1][precision]
    mine = (prompt(20, seed=1), [0, 1, 2])
    others = [
        (prompt(n, seed=n), [10 + 40 * i + j for j in range(-(-n // BLOCK_SIZE))])
        for i, n in enumerate((7, 30, 5, 150))
    ]
    for tokens, table in [mine, *others]:
        runner.execute(step_input([Part(tokens, 0, len(tokens) - 1, table)], BLOCK_SIZE))

    def decode(*requests: tuple[list[int], list[int]]) -> torch.Tensor:
        parts = [Part(tokens, len(tokens) - 1, len(tokens), table) for tokens, table in requests]
        return runner.execute(step_input(parts, BLOCK_SIZE)).clone()

    with_short = decode(mine, others[0], others[2])
    with_long = decode(others[1], mine, others[3])
    assert torch.equal(with_short[0], with_long[1])


@pytest.mark.slow
def test_prefill_longer_than_a_slice_of_queries_agrees_with_the_naive_model() -> None:
    for architecture in ARCHITECTURES:
        naive, runners = tiny(architecture)
        tokens = prompt(200)
        blocks = random.Random(1).sample(range(100), 25)
        runners["cpu"].execute(step_input([Part(tokens, 0, 30, blocks, is_sampled=False)], BLOCK_SIZE))
        logits = runners["cpu"].execute(step_input([Part(tokens, 30, 200, blocks)], BLOCK_SIZE))
        assert relative_error(logits[0], naive.logits(tokens)[-1]) < 1e-5
