"""Tiny random models on disk, for tests: Hugging Face directories written by `transformers`, and GGUF files
written by `gguf.GGUFWriter` the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.weights.names import gguf_name, huggingface_name

VOCAB_SIZE = 96
TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def transformers_model(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of `transformers`, eager attention, float32."""
    import transformers

    if architecture == "llama":
        config = transformers.LlamaConfig(**(TINY | {"tie_word_embeddings": True} | changes))
        kind = transformers.LlamaForCausalLM
    else:
        sizes = {"sliding_window": 8, "query_pre_attn_scalar": 24, "num_hidden_layers": 4}
        pattern = {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
        }
        config = transformers.Gemma3TextConfig(**(TINY | sizes | pattern | changes))
        kind = transformers.Gemma3ForCausalLM
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms away from their neutral value, and logits that differ clearly.
            parameter.normal_(0.0 if "norm" not in name or architecture == "gemma3" else 1.0, 0.2)
    return model


def huggingface_directory(path: Path, architecture: str = "llama", **changes: Any) -> ModelFiles:
    """Write a tiny model as config.json and safetensors."""
    transformers_model(architecture, **changes).save_pretrained(path)
    return ModelFiles(path.name, "huggingface", path)


def gguf_file(
    path: Path, architecture: str = "llama", quantization: str = "F32", **changes: Any
) -> ModelFiles:
    """Write the same tiny model as a GGUF file; matrices in `quantization` where their rows allow it."""
    model = transformers_model(architecture, **changes)
    config, tensors = model.config, dict(model.named_parameters())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    add_tokenizer(writer)
    for canonical in _canonical_names(config, architecture):
        weight = tensors[huggingface_name(canonical, architecture == "gemma3")].detach().numpy()
        writer_add(writer, canonical, _as_llama_cpp(weight, canonical, config, architecture), quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles(path.stem, "gguf", path)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """A tokenizer of VOCAB_SIZE tokens: three control tokens, then made-up words."""
    tokens = ["<unk>", "<s>", "<|im_end|>"] + [f"word{i}" for i in range(VOCAB_SIZE - 3)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (VOCAB_SIZE - 3))
    writer.add_token_merges(["w o", "wo rd"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")


def writer_add(writer: gguf.GGUFWriter, canonical: str, weight: np.ndarray, quantization: str) -> None:
    kind = gguf.GGMLQuantizationType[quantization]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if weight.ndim == 1 or weight.shape[-1] % block or quantization == "F32":
        writer.add_tensor(gguf_name(canonical), np.ascontiguousarray(weight, np.float32))
    else:
        writer.add_tensor(gguf_name(canonical), gguf.quantize(weight, kind), raw_dtype=kind)


def _as_llama_cpp(weight: np.ndarray, canonical: str, config: Any, architecture: str) -> np.ndarray:
    """llama.cpp's converter interleaves llama's rotary pairs, and adds 1 to Gemma's norms."""
    part = canonical.rpartition(".")[2]
    if architecture == "gemma3":
        return weight + 1.0 if part.endswith("norm") else weight
    if part in ("q", "k"):
        heads = config.num_attention_heads if part == "q" else config.num_key_value_heads
        split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
        return split.swapaxes(1, 2).reshape(weight.shape)
    return weight


def _canonical_names(config: Any, architecture: str) -> list[str]:
    parts = ["attention_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down"]
    if architecture == "gemma3":
        parts += ["q_norm", "k_norm", "post_attention_norm", "post_mlp_norm"]
    layers = [f"layers.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in parts]
    return ["embedding", *layers, "final_norm"] + ([] if config.tie_word_embeddings else ["output"])
