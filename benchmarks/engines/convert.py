"""The same weights in the forms that other engines read: a Hugging Face directory, a GGUF file in Q8_0.

`python -m benchmarks.engines.convert MODEL DIRECTORY` writes the first of a known model or a GGUF file.

Owns the way from a GGUF file, as headrace reads it, to those forms. Must not know engines.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from headrace.engine.model_files.metadata import Hyperparameters, ModelMetadata, read_metadata
from headrace.engine.model_files.resolve import ModelFiles, resolve_model
from headrace.engine.weights.names import expected_shapes, huggingface_name
from headrace.engine.weights.source import open_weights
from headrace.replica.gguf_tokenizer import build_gguf_tokenizer

_Q8 = GGMLQuantizationType.Q8_0
_WRITTEN_ANEW = ("GGUF.", "general.architecture", "general.file_type")
"""Header fields that the writer sets by itself."""


def write_huggingface(files: ModelFiles, directory: Path) -> None:
    """Write config, weights (bfloat16) and tokenizer of a GGUF model. The directory appears when whole."""
    metadata = read_metadata(files)
    parts = directory.with_name(f"{directory.name}.{os.getpid()}")
    parts.mkdir(parents=True)
    h = metadata.hyperparameters
    source = open_weights(files, h)
    state = {}
    for name in expected_shapes(h):
        weight = source.read(name, torch.float32)
        if h.architecture == "gemma3" and name.endswith("norm"):
            weight = weight - 1.0  # GGUF stores 1 + w, checkpoints w
        state[huggingface_name(name, h.has_post_norms)] = weight.to(torch.bfloat16)
    save_file(state, str(parts / "model.safetensors"), metadata={"format": "pt"})
    ids = {
        "bos_token_id": metadata.bos_token_id,
        "eos_token_id": sorted(metadata.eos_token_ids),
        "pad_token_id": metadata.pad_token_id,
    }
    _write(parts / "config.json", {**_config(h), **ids})
    _write(parts / "generation_config.json", ids)
    assert metadata.gguf_tokenizer is not None
    tokenizer = build_gguf_tokenizer(metadata.gguf_tokenizer, metadata.bos_token_id, metadata.eos_token)
    tokenizer.save(str(parts / "tokenizer.json"))
    _write(parts / "tokenizer_config.json", _tokenizer_config(metadata))
    parts.rename(directory)


def write_q8_0(gguf: Path, path: Path) -> None:
    """Write a GGUF file with every matrix in Q8_0: what llama.cpp's own quantiser makes of the same values.
    The file appears when whole."""
    reader = GGUFReader(gguf)
    architecture = str(reader.fields["general.architecture"].contents())
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    writer = GGUFWriter(unfinished, architecture)
    writer.add_file_type(7)  # llama.cpp's LLAMA_FTYPE_MOSTLY_Q8_0
    for name, field in reader.fields.items():
        if not name.startswith(_WRITTEN_ANEW):
            kind = field.types[0]
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
        if len(shape) == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantize(values, _Q8), raw_dtype=_Q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)


def _config(h: Hyperparameters) -> dict[str, Any]:
    """What config.json says of both architectures (`transformers` config classes)."""
    shared = {
        "vocab_size": h.vocab_size,
        "max_position_embeddings": h.context_length,
        "num_hidden_layers": h.num_layers,
        "hidden_size": h.hidden_size,
        "intermediate_size": h.intermediate_size,
        "num_attention_heads": h.num_heads,
        "num_key_value_heads": h.num_kv_heads,
        "head_dim": h.head_dim,
        "rms_norm_eps": h.norm_eps,
        "tie_word_embeddings": h.is_tied,
        "attention_bias": False,
        "dtype": "bfloat16",
    }
    if h.architecture == "llama":
        return shared | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "mlp_bias": False,
            "rope_theta": h.rope_theta,
        }
    sliding = [bool(h.is_sliding_by_layer[layer]) for layer in range(h.num_layers)]
    return shared | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(h.attention_scale**-2),
        "sliding_window": h.sliding_window,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
        "rope_theta": h.rope_theta,
        "rope_local_base_freq": h.rope_theta_sliding,
    }


def _tokenizer_config(metadata: ModelMetadata) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": metadata.bos_token,
        "eos_token": metadata.eos_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.hyperparameters.context_length,
        "chat_template": metadata.chat_template,
    }


def _write(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines.convert", description=__doc__)
    parser.add_argument("model", help="a known model's name, or a .gguf file")
    parser.add_argument("directory", type=Path, help="written; must not exist")
    arguments = parser.parse_args()
    if arguments.directory.exists():
        parser.error(f"{arguments.directory} exists already")
    write_huggingface(resolve_model(arguments.model), arguments.directory)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
