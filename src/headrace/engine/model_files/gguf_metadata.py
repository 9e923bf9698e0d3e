"""From a GGUF file's key-values to ModelMetadata. Keys: the GGUF specification's and llama.cpp's.

Must not know the byte format (`gguf_header`) or tensors' contents.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

from headrace.engine.model_files.gguf_header import GgufHeader, read_gguf_header
from headrace.engine.model_files.metadata import (
    GenerationDefaults,
    GgufTokenizer,
    Hyperparameters,
    ModelMetadata,
    RopeScaling,
)
from headrace.errors import ModelError

_CONTROL = 3
_END_OF_TURN_NAMES = frozenset(
    {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>"}
)
"""Control tokens that end an answer by their very name; many files name only one of them as eos."""
_MAX_LAYERS = 4096
_GEMMA3_SLIDING_THETA = 10_000.0
_GEMMA3_PATTERN = 6
_GEMMA3_27B_LAYERS = 62

Scalar = TypeVar("Scalar", int, float, str, bool)


def read_gguf_metadata(name: str, path: Path) -> ModelMetadata:
    """Read the metadata of one GGUF file. Raises ModelError."""
    return metadata_from_header(name, read_gguf_header(path))


def metadata_from_header(name: str, header: GgufHeader) -> ModelMetadata:
    """Interpret a header that was read already. Raises ModelError."""
    values = _Values(header)
    tokenizer = _tokenizer(values)
    bos = values.optional("tokenizer.ggml.bos_token_id", int)
    eos = values.optional("tokenizer.ggml.eos_token_id", int)
    ids = {
        "bos": bos,
        "eos": eos,
        "padding": values.optional("tokenizer.ggml.padding_token_id", int),
        "eot": values.optional("tokenizer.ggml.eot_token_id", int),
        "eom": values.optional("tokenizer.ggml.eom_token_id", int),
    }
    for word, token_id in ids.items():
        if token_id is not None and not 0 <= token_id < len(tokenizer.tokens):
            raise values.error(
                f"tokenizer.ggml.{word}_token_id is {token_id}; there are {len(tokenizer.tokens)} tokens"
            )
    eos_ids = {
        token_id for word, token_id in ids.items() if word in ("eos", "eot", "eom") and token_id is not None
    }
    eos_ids |= _ids_named_as_ends(tokenizer)
    return ModelMetadata(
        name=name,
        hyperparameters=_hyperparameters(values, header),
        bos_token_id=bos,
        pad_token_id=ids["padding"],
        eos_token_ids=frozenset(eos_ids),
        bos_token=tokenizer.tokens[bos] if bos is not None else "",
        eos_token=tokenizer.tokens[eos] if eos is not None else "",
        chat_template=values.optional("tokenizer.chat_template", str),
        defaults=GenerationDefaults(
            temperature=values.optional("general.sampling.temp", float),
            top_p=values.optional("general.sampling.top_p", float),
            top_k=values.optional("general.sampling.top_k", int),
            min_p=values.optional("general.sampling.min_p", float),
            repetition_penalty=values.optional("general.sampling.penalty_repeat", float),
        ),
        gguf_tokenizer=tokenizer,
    )


class _Values:
    """Typed access to a header's key-values; a wrong type is a ModelError that names key and file."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header

    def error(self, what: str) -> ModelError:
        return ModelError(f"{self._header.path}: {what}")

    def optional(self, key: str, kind: type[Scalar]) -> Scalar | None:
        value = self._header.values.get(key)
        if value is None:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.error(f"{key} is a {type(value).__name__}; it must be a {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(f"{key} is {value}; it must be finite")
        return value

    def required(self, key: str, kind: type[Scalar]) -> Scalar:
        value = self.optional(key, kind)
        if value is None:
            raise self.error(f"{key} is missing")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A number >= 1. Files may give one per layer: all must agree."""
        value: Any = self._header.values.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self.error(f"{key} is {_brief(value)}; it must be one positive number")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.optional(key, float)
        value = default if value is None else value
        if value is None or value <= 0:
            raise self.error(f"{key} is {value}; it must be a positive number")
        return value

    def items(self, key: str, kind: type[Any]) -> list[Any]:
        value = self._header.values.get(key, [])
        if not isinstance(value, list) or (value and type(value[0]) is not kind):
            raise self.error(f"{key} is {_brief(value)}; it must be an array of {kind.__name__}")
        return value


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _tokenizer(values: _Values) -> GgufTokenizer:
    tokens = values.items("tokenizer.ggml.tokens", str)
    if not tokens:
        raise values.error("tokenizer.ggml.tokens is missing; a GGUF file for serving carries its tokenizer")
    token_types = values.items("tokenizer.ggml.token_type", int)
    scores = values.items("tokenizer.ggml.scores", float)
    for key, items in (("token_type", token_types), ("scores", scores)):
        if items and len(items) != len(tokens):
            raise values.error(f"tokenizer.ggml.{key} has {len(items)} items for {len(tokens)} tokens")
    model = values.required("tokenizer.ggml.model", str)
    add_bos = values.optional("tokenizer.ggml.add_bos_token", bool)
    add_space = values.optional("tokenizer.ggml.add_space_prefix", bool)
    return GgufTokenizer(
        model=model,
        pre_tokenizer=values.optional("tokenizer.ggml.pre", str) or "",
        tokens=tokens,
        token_types=token_types,
        merges=values.items("tokenizer.ggml.merges", str),
        scores=scores,
        # SentencePiece vocabularies begin texts with bos and a space unless the file says otherwise.
        add_bos=(model == "llama") if add_bos is None else add_bos,
        add_eos=bool(values.optional("tokenizer.ggml.add_eos_token", bool)),
        add_space_prefix=(model == "llama") if add_space is None else add_space,
        unknown_token_id=values.optional("tokenizer.ggml.unknown_token_id", int),
    )


def _ids_named_as_ends(tokenizer: GgufTokenizer) -> set[int]:
    types = tokenizer.token_types
    return {
        token_id
        for token_id, token_type in enumerate(types)
        if token_type == _CONTROL and tokenizer.tokens[token_id] in _END_OF_TURN_NAMES
    }


def _hyperparameters(values: _Values, header: GgufHeader) -> Hyperparameters:
    architecture = values.required("general.architecture", str)
    if (values.optional("split.count", int) or 1) > 1:
        raise values.error("it is one part of a split model; join the parts into one file first")
    if architecture == "llama":
        return Hyperparameters(architecture="llama", **_shared(values, header, "llama"))
    if architecture == "gemma3":
        return Hyperparameters(architecture="gemma3", **_shared(values, header, "gemma3"), **_gemma3(values))
    raise values.error(f"architecture {architecture!r} is not supported; llama and gemma3 are")


def _shared(values: _Values, header: GgufHeader, prefix: str) -> dict[str, Any]:
    """What both architectures have, as keyword arguments of Hyperparameters."""
    hidden_size, num_heads = (
        values.size(f"{prefix}.embedding_length"),
        values.size(f"{prefix}.attention.head_count"),
    )
    num_kv_heads = values.size(f"{prefix}.attention.head_count_kv", num_heads)
    head_dim = values.size(f"{prefix}.attention.key_length", max(hidden_size // num_heads, 1))
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise values.error("the tensor token_embd.weight is missing or is no matrix")
    if (num_layers := values.size(f"{prefix}.block_count")) > _MAX_LAYERS:
        raise values.error(f"{prefix}.block_count is {num_layers}; at most {_MAX_LAYERS} are allowed")
    if num_heads % num_kv_heads or head_dim % 2:
        raise values.error(
            f"{num_heads} heads, {num_kv_heads} KV heads of dimension {head_dim}: heads must be a multiple "
            "of KV heads, and the dimension even"
        )
    for key, expected in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if values.size(f"{prefix}.{key}", expected) != expected:
            raise values.error(f"{prefix}.{key} differs from the head dimension {head_dim}; not supported")
    return {
        "vocab_size": embedding.shape[0],
        "context_length": values.size(f"{prefix}.context_length"),
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": values.size(f"{prefix}.feed_forward_length"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "norm_eps": values.positive(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "rope_theta": values.positive(f"{prefix}.rope.freq_base", 1e6 if prefix == "gemma3" else 1e4),
        "rope_scaling": _rope_scaling(values, prefix),
        "is_tied": "output.weight" not in header.tensors,
    }


def _rope_scaling(values: _Values, prefix: str) -> RopeScaling | None:
    # Llama 3's scaling is not here: its files carry the divisors as the tensor rope_freqs.weight.
    kind = values.optional(f"{prefix}.rope.scaling.type", str)
    if kind in (None, "none"):
        return None
    if kind == "linear":
        return RopeScaling("linear", values.positive(f"{prefix}.rope.scaling.factor", 1.0))
    raise values.error(f"{prefix}.rope.scaling.type is {kind!r}; supported are none and linear")


def _gemma3(values: _Values) -> dict[str, Any]:
    """Gemma 3's own, as keyword arguments. The pattern and the sliding theta are llama.cpp's constants,
    because older files do not carry them."""
    num_layers, hidden_size = values.size("gemma3.block_count"), values.size("gemma3.embedding_length")
    num_heads = values.size("gemma3.attention.head_count")
    head_dim = values.size("gemma3.attention.key_length", max(hidden_size // num_heads, 1))
    is_27b = num_layers == _GEMMA3_27B_LAYERS
    return {
        "activation": "gelu_tanh",
        "rope_theta_sliding": values.positive("gemma3.rope.freq_base_swa", _GEMMA3_SLIDING_THETA),
        "sliding_window": values.size("gemma3.attention.sliding_window", 512),
        "is_sliding_by_layer": tuple((layer + 1) % _GEMMA3_PATTERN != 0 for layer in range(num_layers)),
        "attention_scale": (hidden_size / num_heads if is_27b else head_dim) ** -0.5,
        "embedding_scale": hidden_size**0.5,
        "has_qk_norm": True,
        "has_post_norms": True,
    }
