"""Metadata of both formats: what engine and front read from it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
from tests.unit.engine.tiny_models import TINY, VOCAB_SIZE, add_tokenizer, gguf_file

from headrace.engine.model_files.metadata import RopeScaling, read_metadata
from headrace.engine.model_files.resolve import SIMULATED_MODEL, ModelFiles, resolve_model
from headrace.errors import ModelError


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def huggingface(path: Path, **changes: Any) -> ModelFiles:
    write_json(
        path / "config.json",
        {"architectures": ["LlamaForCausalLM"]} | TINY | {"rms_norm_eps": 1e-5} | changes,
    )
    return ModelFiles("tiny", "huggingface", path)


def test_the_default_model_is_read_fast_and_whole() -> None:
    files = resolve_model("smollm2-135m-instruct")
    start = time.process_time()
    metadata = read_metadata(files)
    assert time.process_time() - start < 0.3
    h = metadata.hyperparameters
    assert (h.num_layers, h.hidden_size, h.num_heads, h.num_kv_heads, h.head_dim) == (30, 576, 9, 3, 64)
    assert (h.vocab_size, h.context_length, h.rope_theta, h.is_tied) == (49152, 8192, 100_000.0, True)
    assert metadata.eos_token_ids == {0, 2}
    assert (metadata.bos_token, metadata.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert metadata.chat_template is not None
    assert "<|im_start|>" in metadata.chat_template
    tokenizer = metadata.gguf_tokenizer
    assert tokenizer is not None
    assert (len(tokenizer.tokens), len(tokenizer.merges), tokenizer.pre_tokenizer) == (49152, 48900, "smollm")
    assert (tokenizer.add_bos, tokenizer.add_space_prefix) == (False, False)


@pytest.mark.slow
def test_reading_metadata_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from headrace.engine.model_files.metadata import read_metadata; "
        "from headrace.engine.model_files.resolve import resolve_model; "
        "read_metadata(resolve_model('smollm2-135m-instruct')); "
        "print(sorted({'torch', 'numpy', 'gguf'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"


def test_a_control_token_named_end_of_turn_ends_an_answer_even_when_eos_is_another(tmp_path: Path) -> None:
    metadata = read_metadata(gguf_file(tmp_path / "m.gguf"))
    assert metadata.eos_token_ids == {0, 2}
    assert metadata.gguf_tokenizer is not None
    assert metadata.gguf_tokenizer.add_bos


def test_gemma_differs_in_data_only(tmp_path: Path) -> None:
    h = read_metadata(
        gguf_file(tmp_path / "m.gguf", "gemma3", num_hidden_layers=7, layer_types=None)
    ).hyperparameters
    assert h.is_sliding_by_layer == (True,) * 5 + (False, True)
    assert (h.activation, h.has_qk_norm, h.has_post_norms, h.is_norm_plus_one) == (
        "gelu_tanh",
        True,
        True,
        False,
    )
    assert (h.rope_theta, h.rope_theta_sliding) == (1_000_000.0, 10_000.0)
    assert h.embedding_scale == 8.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; llama and gemma3 are"),
        ({"llama.block_count": "three"}, "llama.block_count is 'three'"),
        ({"llama.block_count": 100_000}, "at most 4096"),
        ({"llama.attention.head_count_kv": 3}, "multiple of KV heads"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "must be finite"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'; supported are none and linear"),
        ({"tokenizer.ggml.eot_token_id": 5000}, "eot_token_id is 5000; there are 96 tokens"),
        ({"split.count": 3}, "one part of a split model"),
        ({"llama.rope.dimension_count": 8}, "differs from the head dimension"),
    ],
)
def test_unsupported_values_of_a_gguf_file_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    values: dict[str, Any] = {
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    architecture = change.pop("general.architecture", "llama")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (values | change).items():
        add[type(value)](key, value)
    add_tokenizer(writer)
    import numpy as np

    writer.add_tensor("token_embd.weight", np.zeros((VOCAB_SIZE, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=message):
        read_metadata(ModelFiles("m", "gguf", tmp_path / "m.gguf"))


def test_a_directory_gives_ids_template_and_defaults_of_all_its_files(tmp_path: Path) -> None:
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 7], "temperature": 0.6, "top_k": 20})
    write_json(
        tmp_path / "tokenizer_config.json",
        {
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "chat_template": [{"name": "default", "template": "T"}],
        },
    )
    metadata = read_metadata(huggingface(tmp_path, eos_token_id=5))
    assert metadata.eos_token_ids == {2, 5, 7}
    assert (metadata.bos_token, metadata.eos_token, metadata.chat_template) == ("<s>", "</s>", "T")
    assert (metadata.defaults.temperature, metadata.defaults.top_k, metadata.defaults.top_p) == (
        0.6,
        20,
        None,
    )
    assert metadata.tokenizer_json is None
    (tmp_path / "chat_template.jinja").write_text("J")
    assert read_metadata(huggingface(tmp_path)).chat_template == "J"


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, 7e4, None),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            1e4,
            RopeScaling("linear", 2.0),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            1e4,
            RopeScaling("llama3", 32.0),
        ),
    ],
)
def test_rope_is_read_in_the_words_of_transformers_4_and_5(
    tmp_path: Path, changes: dict[str, Any], theta: float, scaling: RopeScaling | None
) -> None:
    h = read_metadata(huggingface(tmp_path, **changes)).hyperparameters
    assert (h.rope_theta, h.rope_scaling) == (theta, scaling)


def test_every_layer_of_an_early_mistral_slides(tmp_path: Path) -> None:
    h = read_metadata(
        huggingface(tmp_path, architectures=["MistralForCausalLM"], sliding_window=32)
    ).hyperparameters
    assert (h.sliding_window, h.is_sliding_by_layer) == (32, (True,) * 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported"),
        ({"architectures": None}, "None is not supported"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "from 1 to 4096"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
        ({"rope_theta": float("inf")}, "finite"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"quantization_config": {}}, "quantised checkpoints are supported as .gguf"),
        ({"num_key_value_heads": 3}, "multiple of KV heads"),
    ],
)
def test_unsupported_values_of_config_json_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read_metadata(huggingface(tmp_path, **changes))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"[" * 100_000, b'{"a": "\xff"}'])
def test_a_damaged_config_json_is_a_model_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_metadata(ModelFiles("m", "huggingface", tmp_path))


def test_the_simulated_model_has_no_metadata() -> None:
    with pytest.raises(ModelError, match="no files"):
        read_metadata(resolve_model(SIMULATED_MODEL))
