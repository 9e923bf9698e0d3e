"""The int8 kernels: exact products on every instruction set, and logits that depend on one request alone."""

from __future__ import annotations

import ctypes
import random
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from tests.unit.engine.step_builder import Part, step_input
from tests.unit.engine.tiny_models import VOCAB_SIZE, gguf_file, huggingface_directory

from headrace.api.messages import EngineSpec
from headrace.engine.model_files.metadata import Hyperparameters, read_metadata
from headrace.engine.naive import NaiveModel
from headrace.engine.operations.int8 import Int8Operations, why_not_int8
from headrace.engine.operations.kernel_structures import Matrix
from headrace.engine.operations.kernels import KernelsMissing, Library, load_kernels
from headrace.engine.runner import DecoderRunner, load_runner
from headrace.engine.weights.source import open_weights
from headrace.errors import ModelError

BLOCK_SIZE = 8
INT8_ERROR = 0.15
"""Norm of the error over the norm of the logits, for these 64-wide random models."""
ISA_LEVELS = {"portable": 0, "avx2": 1, "avx512-vnni": 2}


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        return load_kernels()
    except KernelsMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(params=ISA_LEVELS)
def isa(request: pytest.FixtureRequest, library: Library) -> Iterator[str]:
    """Each instruction set that this processor has."""
    library.limit_isa(ISA_LEVELS[request.param])
    if library.isa != request.param:
        library.limit_isa(2)
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.limit_isa(2)


def hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def rotated(x: np.ndarray) -> np.ndarray:
    """As the kernels rotate: blocks of the largest power of two that divides the width, up to 512."""
    width = x.shape[-1]
    size = min(width & -width, 512)
    return (x.reshape(-1, size) @ hadamard(size)).reshape(x.shape)


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / scale).astype(np.int64), scale


def multiply(library: Library, operations: Int8Operations, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x @ weight.T through the kernels."""
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function = library.function("headrace_multiply", [pointer] * 3 + [number] + [pointer] * 2, number)
    workspace = library.function("headrace_workspace_new", [], pointer)()
    packed, scale = operations.pack_matrix(torch.from_numpy(weight))
    matrix = Matrix(packed.data_ptr(), scale.data_ptr(), weight.shape[1], weight.shape[0])
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty((len(x), len(weight)), np.float32)
    team = operations.team.handle
    status = function(team, workspace, ctypes.byref(matrix), len(x), x.ctypes.data, out.ctypes.data)
    library.function("headrace_workspace_free", [pointer])(workspace)
    assert status == 0
    return out


@pytest.mark.parametrize(
    ("out_features", "in_features", "rows"),
    [(96, 64, 5), (33, 48, 13), (7, 640, 30), (64, 32, 25), (40, 256, 12), (33, 1536, 3)],
)
def test_products_are_those_of_integers_on_every_instruction_set(
    isa: str, library: Library, out_features: int, in_features: int, rows: int
) -> None:
    generator = np.random.default_rng(out_features)
    weight = generator.standard_normal((out_features, in_features), np.float32)
    x = generator.standard_normal((rows, in_features), np.float32) * 3
    x[0, 5] = 1000.0  # an outlier
    x[1] = 0.0
    found = multiply(library, Int8Operations(library, 2), weight, x)
    weights, weight_scales = quantized(rotated(weight))
    with np.errstate(invalid="ignore"):
        values, scales = quantized(rotated(x))
    values[1], scales[1] = 0, 0
    expected = (values @ weights.T) * scales * weight_scales.T
    # The few roundings that fall the other way in float32 move a product by one step.
    assert np.abs(found - expected).max() <= np.abs(weight_scales).max() * scales.max() * 127 * 2
    assert np.median(np.abs(found - expected)[2:]) <= 1e-6 * np.abs(expected).max()
    assert (found[1] == 0).all()


def test_instruction_sets_give_the_same_bits(library: Library) -> None:
    generator = np.random.default_rng(0)
    weight, x = (generator.standard_normal((n, 96), np.float32) for n in (70, 19))
    found = {}
    for level in range(3):
        library.limit_isa(level)
        found[library.isa] = multiply(library, Int8Operations(library, 1), weight, x)
    library.limit_isa(2)
    for name, result in found.items():
        assert np.array_equal(result, found["portable"]), name


def test_a_row_has_the_same_bits_among_any_number_of_rows(isa: str, library: Library) -> None:
    generator = np.random.default_rng(0)
    weight, x = (generator.standard_normal((n, 64), np.float32) for n in (70, 40))
    operations = Int8Operations(library, 2)
    expected = np.concatenate([multiply(library, operations, weight, x[i : i + 1]) for i in range(len(x))])
    for num_rows in range(1, len(x) + 1):  # every size of a block, and one to four blocks
        assert np.array_equal(multiply(library, operations, weight, x[:num_rows]), expected[:num_rows]), (
            num_rows
        )


def test_a_row_with_nan_gives_nan_and_harms_no_other(isa: str, library: Library) -> None:
    generator = np.random.default_rng(0)
    weight, x = (generator.standard_normal((n, 64), np.float32) for n in (40, 6))
    x[2, 9], x[4, 60] = np.nan, np.inf
    found = multiply(library, Int8Operations(library, 2), weight, x)
    assert np.isnan(found).all(1).tolist() == [False, False, True, False, True, False]


@cache
def tiny(architecture: str) -> Path:
    path = Path(mkdtemp(prefix="headrace-test-"))
    huggingface_directory(path, architecture)
    return path


def load(architecture: str, num_threads: int = 1) -> DecoderRunner:
    from headrace.engine.model_files.resolve import ModelFiles

    spec = EngineSpec(
        "native",
        "tiny",
        dtype="int8",
        kv_cache_bytes=4 << 20,
        block_size=BLOCK_SIZE,
        num_threads=num_threads,
    )
    return load_runner(
        spec, ModelFiles("tiny", "huggingface", tiny(architecture)), on_phase=lambda phase: None
    )


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


@pytest.mark.slow
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_int8_stays_near_float32(architecture: str) -> None:
    from headrace.engine.model_files.resolve import ModelFiles

    tokens = prompt(60, seed=0)
    expected = NaiveModel(ModelFiles("tiny", "huggingface", tiny(architecture))).logits(tokens)[-1]
    found = load(architecture).execute(step_input([Part(tokens, 0, 60, list(range(8)))], BLOCK_SIZE))[0]
    assert float((found - expected).norm() / expected.norm()) < INT8_ERROR


@pytest.mark.slow
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_logits_are_the_same_bits_alone_in_a_batch_chunked_cached_and_on_other_threads(
    architecture: str,
) -> None:
    mine, table = prompt(45, seed=1), [3, 1, 4, 15, 9, 2]
    runner = load(architecture)
    expected = runner.execute(step_input([Part(mine, 0, 45, table)], BLOCK_SIZE))[0].clone()

    others = [
        (prompt(n, seed=n), [20 + 20 * i + j for j in range(20)]) for i, n in enumerate((7, 30, 5, 150))
    ]
    everyone = [Part(tokens, 0, len(tokens), blocks) for tokens, blocks in others]
    for num_threads in (1, 2, 3):
        runner = load(architecture, num_threads)
        batched = runner.execute(
            step_input([*everyone[:2], Part(mine, 0, 45, table), *everyone[2:]], BLOCK_SIZE)
        )
        assert torch.equal(batched[2], expected), f"in a batch, {num_threads} threads"

    for chunks in ([1] * 9 + [36], [44, 1], [8, 8, 8, 21]):
        runner, start = load(architecture), 0
        for index, size in enumerate(chunks):
            partners = everyone[: index % 5]  # computed again and again, in their own blocks
            parts = [*partners, Part(mine, start, start + size, table)]
            logits = runner.execute(step_input(parts, BLOCK_SIZE))[-1]
            start += size
        assert torch.equal(logits, expected), f"in chunks of {chunks}"

    # A prefix of 24 tokens that another request computed, as the prefix cache shares it.
    runner = load(architecture)
    runner.execute(step_input([Part(mine[:24] + prompt(3, seed=8), 0, 27, [*table[:3], 60])], BLOCK_SIZE))
    cached = runner.execute(step_input([Part(mine, 24, 45, table)], BLOCK_SIZE))[0]
    assert torch.equal(cached, expected), "after a cached prefix"


@pytest.mark.slow
def test_packed_weights_can_be_read_only_mapped_memory(tmp_path: Path, library: Library) -> None:
    files = gguf_file(tmp_path / "m.gguf")
    h = read_metadata(files).hyperparameters
    operations = Int8Operations(library, 1)
    packed = operations.pack(h, open_weights(files, h).read)
    mapped = {}
    for name, tensor in packed.items():
        path = tmp_path / name
        tensor.numpy().tofile(path)
        shape = tuple(tensor.shape)
        array = np.memmap(path, tensor.numpy().dtype, "r", shape=shape)
        with warnings.catch_warnings():  # torch has no read-only tensors
            warnings.simplefilter("ignore")
            mapped[name] = torch.from_numpy(array)
    batch = step_input([Part([5, 6, 7], 0, 3, [0])], BLOCK_SIZE)
    results = []
    for tensors in (packed, mapped):
        blocks = operations.load(h, tensors, max_context_tokens=64)
        step = blocks.prepare(batch)
        caches = blocks.new_kv_caches(2, BLOCK_SIZE)
        step = blocks.prepare(batch)
        x = blocks.embed(step)
        for layer in range(h.num_layers):
            x = blocks.mlp(layer, blocks.attend(layer, x, step, caches[layer]))
        results.append(blocks.head(x).clone())
    assert torch.equal(*results)


@pytest.mark.slow
def test_packed_weights_of_another_shape_are_refused(tmp_path: Path, library: Library) -> None:
    files = gguf_file(tmp_path / "m.gguf")
    h = read_metadata(files).hyperparameters
    operations = Int8Operations(library, 1)
    packed = operations.pack(h, open_weights(files, h).read)
    with pytest.raises(ModelError, match=r"layers\.1\.down is missing"):
        operations.load(h, {k: v for k, v in packed.items() if k != "layers.1.down"}, 64)
    with pytest.raises(ModelError, match=r"layers\.0\.o is .* must be"):
        operations.load(h, packed | {"layers.0.o": packed["layers.0.o"][:1]}, 64)


def test_sizes_that_int8_cannot_have_are_named() -> None:
    sizes = Hyperparameters("llama", 96, 256, 2, 64, 100, 4, 2, 16, 1e-5, 1e4)
    assert why_not_int8(sizes) == "intermediate_size is 100; int8 needs a multiple of 16, at most 65536"
