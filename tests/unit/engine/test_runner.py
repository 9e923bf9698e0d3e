"""The runner as the engine sees it: loading, limits, and the real model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.engine.step_builder import Part, step_input
from tests.unit.engine.tiny_models import gguf_file, huggingface_directory

from headrace.api.messages import EngineSpec
from headrace.engine.model_files.metadata import Hyperparameters, read_metadata
from headrace.engine.model_files.resolve import ModelFiles, resolve_model
from headrace.engine.naive import NaiveModel
from headrace.engine.operations import mkldnn_linear, select
from headrace.engine.operations.kernels import KernelsMissing, Library, load_kernels
from headrace.engine.operations.memory import LayerMemory
from headrace.engine.operations.select import select_operations
from headrace.engine.runner import DecoderRunner, load_runner
from headrace.engine.weights.names import expected_shapes, huggingface_name
from headrace.engine.weights.source import open_weights
from headrace.errors import ConfigError, ModelError
from headrace.units import GIB

CAPITAL_OF_ITALY_IS = [504, 3575, 282, 7158, 314]
"""`The capital of Italy is` in SmolLM2's tokens."""


def load(files: ModelFiles, **fields: Any) -> DecoderRunner:
    fields = {"kv_cache_bytes": 8 << 20, "num_threads": 1} | fields
    return load_runner(EngineSpec("native", "m", **fields), files, on_phase=lambda phase: None)


def test_a_runner_says_what_it_serves(tmp_path: Path) -> None:
    files = gguf_file(tmp_path / "m.gguf")
    phases: list[str] = []
    spec = EngineSpec("native", "m", block_size=8, kv_cache_bytes=1 << 20, num_threads=1, dtype="float32")
    runner = load_runner(spec, files, phases.append)
    assert phases == ["reading metadata", "packing weights", "loading weights", "allocating KV memory"]
    assert (runner.vocab_size, runner.max_context_tokens, runner.block_size) == (96, 256, 8)
    # 3 layers, keys and values, 2 heads of 16 floats: 768 bytes per token.
    assert runner.num_blocks == (1 << 20) // (768 * 8)
    assert runner.eos_token_ids == {0, 2}
    assert (runner.architecture, runner.path) == ("llama", "float32, 1 thread")
    assert repr(runner) == "<DecoderRunner llama float32, 1 thread, 170 blocks of 8>"


def test_the_context_is_the_least_of_setting_model_and_memory(tmp_path: Path) -> None:
    files = gguf_file(tmp_path / "m.gguf")
    assert load(files).max_context_tokens == 256
    assert load(files, max_context_tokens=100).max_context_tokens == 100
    assert load(files, max_context_tokens=10_000).max_context_tokens == 256
    assert load(files, kv_cache_bytes=16 * 384 * 5, dtype="bfloat16").max_context_tokens == 80


def test_memory_refused_by_the_system_is_the_same_error_as_memory_that_is_not_free(tmp_path: Path) -> None:
    class FullMachine:
        """A decoder where the system gives no memory, though some is free (ulimit -v)."""

        def new_kv_caches(self, num_blocks: int, block_size: int, memory: LayerMemory) -> list[torch.Tensor]:
            raise MemoryError

    files = gguf_file(tmp_path / "m.gguf")
    metadata = read_metadata(files)
    operations = select_operations("float32", "auto", 1, metadata.hyperparameters)
    spec = EngineSpec("native", "m", kv_cache_bytes=8 << 20)
    with pytest.raises(ConfigError, match=r"the KV cache takes 8\.0 MiB and .* set kv_cache_mb to at most"):
        DecoderRunner(metadata, lambda: FullMachine(), spec, operations)  # type: ignore[arg-type, return-value]


def test_kv_memory_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_mb"):
        load(gguf_file(tmp_path / "m.gguf"), kv_cache_bytes=10**6 * GIB)


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    files = huggingface_directory(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has neither"):
        load(files)


SIZES = Hyperparameters("llama", 96, 256, 2, 64, 96, 4, 2, 16, 1e-5, 1e4)


def no_kernels() -> Library:
    raise KernelsMissing("no compiled kernels: a reason")


def test_without_kernels_auto_is_bfloat16_where_the_processor_has_it_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(select, "load_kernels", no_kernels)
    monkeypatch.setattr(mkldnn_linear, "is_available", lambda: False)
    assert select_operations("auto", "auto", 1, SIZES).arithmetic == "float32"
    assert select_operations("bfloat16", "auto", 1, SIZES).description == "bfloat16, 1 thread"
    monkeypatch.setattr(mkldnn_linear, "is_available", lambda: True)
    path = "bfloat16 mkldnn, 2 threads; no compiled kernels: a reason"
    assert select_operations("auto", "auto", 2, SIZES).description == path
    assert select_operations("float32", "auto", 1, SIZES).arithmetic == "float32"
    with pytest.raises(ConfigError, match=r"dtype is int8; .* no compiled kernels: a reason"):
        select_operations("int8", "auto", 1, SIZES)
    with pytest.raises(ConfigError, match="kv_dtype is int8; with bfloat16 mkldnn, 1 thread; no compiled"):
        select_operations("auto", "int8", 1, SIZES)


def test_with_kernels_auto_is_int8_where_model_and_processor_fit() -> None:
    try:
        library = load_kernels()
    except KernelsMissing as missing:
        pytest.skip(str(missing))
    assert select_operations("int8", "auto", 2, SIZES).description == f"int8 {library.isa}, 2 threads"
    odd = replace(SIZES, intermediate_size=100)
    assert "intermediate_size is 100; int8 needs" in select_operations("auto", "auto", 1, odd).description
    library.limit_isa(0)
    try:
        assert "int8 is slower here" in select_operations("auto", "auto", 1, SIZES).description
        assert select_operations("int8", "auto", 1, SIZES).description == "int8 portable, 1 thread"
    finally:
        library.limit_isa(2)


def greedy(runner: DecoderRunner, prompt: list[int], num_tokens: int) -> list[int]:
    blocks = list(range(-(-(len(prompt) + num_tokens) // runner.block_size)))
    tokens, start = list(prompt), 0
    for _ in range(num_tokens):
        batch = step_input([Part(tokens, start, len(tokens), blocks)], runner.block_size)
        start = len(tokens)
        tokens.append(int(runner.execute(batch)[0].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_italy() -> None:
    files = resolve_model("smollm2-135m-instruct")
    runner = load(files, kv_cache_bytes=16 << 20, num_threads=1)
    tokenizer = read_metadata(files).gguf_tokenizer
    assert tokenizer is not None
    texts = [tokenizer.tokens[token] for token in CAPITAL_OF_ITALY_IS]
    assert texts == ["The", "Ġcapital", "Ġof", "ĠItaly", "Ġis"]
    answer = "".join(tokenizer.tokens[token] for token in greedy(runner, CAPITAL_OF_ITALY_IS, 3))
    assert "ĠRome" in answer


@pytest.mark.slow
def test_smollm2_agrees_with_transformers_on_the_same_weights() -> None:
    import transformers

    files = resolve_model("smollm2-135m-instruct")
    h = read_metadata(files).hyperparameters
    source = open_weights(files, h)
    config = transformers.LlamaConfig(
        vocab_size=h.vocab_size,
        hidden_size=h.hidden_size,
        intermediate_size=h.intermediate_size,
        num_hidden_layers=h.num_layers,
        num_attention_heads=h.num_heads,
        num_key_value_heads=h.num_kv_heads,
        max_position_embeddings=h.context_length,
        rms_norm_eps=h.norm_eps,
        rope_theta=h.rope_theta,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    weights = {
        huggingface_name(name, has_post_norms=False): source.read(name, torch.float32)
        for name in expected_shapes(h)
    }
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True)
    tokens = CAPITAL_OF_ITALY_IS + np.random.default_rng(0).integers(0, h.vocab_size, 60).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, -1]
    batch = step_input([Part(tokens, 0, len(tokens), [4, 2, 0, 1, 3])], 16)
    exact = load(files, dtype="float32", kv_cache_bytes=16 << 20, num_threads=1).execute(batch)[0]
    # Logits span about ±20; float32 sums in another order differ by about 1e-4.
    assert (exact - expected).abs().max() < 2e-3
    rounded = load(files, dtype="bfloat16", kv_cache_bytes=16 << 20, num_threads=1).execute(batch)[0]
    assert (rounded - expected).norm() / expected.norm() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_greedy_tokens_are_those_of_the_naive_model(tmp_path: Path, architecture: str) -> None:
    files = huggingface_directory(tmp_path, architecture)
    prompt = list(range(3, 20))
    assert greedy(load(files, dtype="float32"), prompt, 25) == NaiveModel(files).generate(prompt, 25)
