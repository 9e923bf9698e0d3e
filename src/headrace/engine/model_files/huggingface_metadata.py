"""From a Hugging Face model directory's JSON files to ModelMetadata. Keys: `transformers` config classes,
versions 4 (rope_theta, rope_scaling) and 5 (rope_parameters).

Must not open safetensors or tokenizer.json.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from headrace.engine.model_files.metadata import (
    Activation,
    GenerationDefaults,
    Hyperparameters,
    ModelMetadata,
    RopeScaling,
    TextMetadata,
)
from headrace.engine.model_files.resolve import ModelFiles
from headrace.errors import ModelError

_MAX_JSON_BYTES = 16 * 1024 * 1024
_MAX_SIZE = 1 << 31
_MAX_LAYERS = 4096
_MAX_WHOLE = 1 << 53
"""Whole numbers up to here are floats exactly; longer ones are no setting of any model."""
_LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM")
_GEMMA3 = "Gemma3ForCausalLM"
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_huggingface_metadata(name: str, directory: Path) -> ModelMetadata:
    """Read config.json, generation_config.json and tokenizer_config.json. Raises ModelError."""
    config = _Section(directory / "config.json", required=True)
    generation = _Section(directory / "generation_config.json")
    tokenizer = _Section(directory / "tokenizer_config.json")
    hyperparameters = _hyperparameters(config)
    tokenizer_json = directory / "tokenizer.json"
    return ModelMetadata(
        name=name,
        hyperparameters=hyperparameters,
        bos_token_id=_first_id(config, "bos_token_id"),
        pad_token_id=_first_id(config, "pad_token_id"),
        eos_token_ids=frozenset(config.ids("eos_token_id")) | frozenset(generation.ids("eos_token_id")),
        bos_token=_token_text(tokenizer, "bos_token"),
        eos_token=_token_text(tokenizer, "eos_token"),
        chat_template=_chat_template(directory, tokenizer),
        defaults=GenerationDefaults(
            temperature=generation.number("temperature"),
            top_p=generation.number("top_p"),
            top_k=generation.integer("top_k"),
            min_p=generation.number("min_p"),
            repetition_penalty=generation.number("repetition_penalty"),
        ),
        tokenizer_json=tokenizer_json if tokenizer_json.is_file() else None,
    )


def read_huggingface_text(files: ModelFiles) -> TextMetadata:
    """Read what turns messages into tokens and back, whatever the architecture. Raises ModelError."""
    if files.format != "huggingface":
        raise ModelError(f"model {files.name!r} is {files.format}; a Hugging Face directory is needed here")
    directory = files.path
    tokenizer_json = directory / "tokenizer.json"
    if not tokenizer_json.is_file():
        raise ModelError(f"{directory}: has no tokenizer.json; the front needs it")
    tokenizer = _Section(directory / "tokenizer_config.json")
    return TextMetadata(
        tokenizer_json=tokenizer_json,
        bos_token=_token_text(tokenizer, "bos_token"),
        eos_token=_token_text(tokenizer, "eos_token"),
        chat_template=files.chat_template or _chat_template(directory, tokenizer),
    )


class _Section:
    """One JSON object with typed access; a wrong type is a ModelError that names file and key."""

    def __init__(self, path: Path, values: dict[str, Any] | None = None, *, required: bool = False) -> None:
        self._path = path
        self.values = _read_object(path, required) if values is None else values

    def error(self, what: str) -> ModelError:
        return ModelError(f"{self._path}: {what}")

    def section(self, key: str) -> _Section | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(f"{key} must be an object")
        return _Section(self._path, value)

    def size(self, key: str, default: int | None = None, at_most: int = _MAX_SIZE) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= at_most:
            raise self.error(f"{key} is {_brief(value)}; it must be a number from 1 to {at_most}")
        return value

    def integer(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is not None and type(value) is not int:
            raise self.error(f"{key} is {_brief(value)}; it must be a whole number")
        return value

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) is int and abs(value) <= _MAX_WHOLE:
            value = float(value)
        if type(value) is not float or not math.isfinite(value):
            raise self.error(f"{key} is {_brief(value)}; it must be a finite number")
        return value

    def positive(self, key: str, default: float) -> float:
        value = self.number(key)
        value = default if value is None else value
        if value <= 0:
            raise self.error(f"{key} is {value}; it must be positive")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.error(f"{key} is {_brief(value)}; it must be true or false")
        return value

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{key} is {_brief(value)}; it must be a string")
        return value

    def ids(self, key: str) -> list[int]:
        """One token id or a list of them."""
        value = self.values.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(item) is not int or not 0 <= item < _MAX_SIZE for item in items):
            raise self.error(f"{key} is {_brief(value)}; it must be a token id or a list of them")
        return items


def _brief(value: Any) -> str:
    """`value` for a message: a hostile one may be megabytes long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _read_object(path: Path, required: bool) -> dict[str, Any]:
    if not path.is_file() and not required:
        return {}
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) > _MAX_JSON_BYTES:
        raise ModelError(f"{path}: larger than {_MAX_JSON_BYTES} bytes; this is not a model's configuration")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must be a JSON object")
    return value


def _first_id(config: _Section, key: str) -> int | None:
    ids = config.ids(key)
    return ids[0] if ids else None


def _token_text(tokenizer: _Section, key: str) -> str:
    """A special token's text: a string, or an object with `content`."""
    value = tokenizer.values.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _chat_template(directory: Path, tokenizer: _Section) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, whose value may be a list of named templates."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            with path.open(encoding="utf-8") as file:
                return file.read(_MAX_JSON_BYTES)
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    value = tokenizer.values.get("chat_template")
    if isinstance(value, list):
        named = [item for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = named[-1].get("template") if named else None
    if value is not None and not isinstance(value, str):
        raise tokenizer.error("chat_template must be a string or a list of named templates")
    return value


def _hyperparameters(config: _Section) -> Hyperparameters:
    listed = config.values.get("architectures")
    architecture = listed[0] if isinstance(listed, list) and listed else None
    if architecture in _LLAMA_LIKE:
        return Hyperparameters(architecture="llama", **_shared(config), **_llama(config))
    if architecture == _GEMMA3:
        return Hyperparameters(architecture="gemma3", **_shared(config), **_gemma3(config))
    supported = ", ".join((*_LLAMA_LIKE, _GEMMA3))
    raise config.error(f"architecture {_brief(architecture)} is not supported; supported are {supported}")


def _shared(config: _Section) -> dict[str, Any]:
    """What all architectures have, as keyword arguments of Hyperparameters."""
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    head_dim = config.size("head_dim", max(hidden_size // num_heads, 1))
    if num_heads % num_kv_heads or head_dim % 2:
        raise config.error(
            f"{num_heads} heads, {num_kv_heads} KV heads of dimension {head_dim}: heads must be a multiple "
            "of KV heads, and the dimension even"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.flag(key, False):
            raise config.error(f"{key} is true; linear layers with a bias are not supported")
    if config.values.get("quantization_config") is not None:
        raise config.error("quantization_config is set; quantised checkpoints are supported as .gguf only")
    return {
        "vocab_size": config.size("vocab_size"),
        "context_length": config.size("max_position_embeddings"),
        "num_layers": config.size("num_hidden_layers", at_most=_MAX_LAYERS),
        "hidden_size": hidden_size,
        "intermediate_size": config.size("intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "norm_eps": config.positive("rms_norm_eps", 1e-6),
    }


def _llama(config: _Section) -> dict[str, Any]:
    rope = config.section("rope_parameters") or config.section("rope_scaling")
    window = config.size("sliding_window") if config.values.get("sliding_window") is not None else 0
    return {
        "activation": _activation(config, config.text("hidden_act") or "silu"),
        "rope_theta": _theta(config, rope, 10_000.0),
        "rope_scaling": _rope_scaling(rope),
        "sliding_window": window,
        # Mistral 0.1: every layer slides.
        "is_sliding_by_layer": (True,) * config.size("num_hidden_layers", at_most=_MAX_LAYERS)
        if window
        else (),
        "is_tied": config.flag("tie_word_embeddings", False),
    }


def _gemma3(config: _Section) -> dict[str, Any]:
    """Gemma 3's own (arXiv:2503.19786), as keyword arguments."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.values.get(key) is not None:
            raise config.error(f"{key} is set; soft-capped logits are not supported")
    by_kind = config.section("rope_parameters")
    full = by_kind.section("full_attention") if by_kind else config.section("rope_scaling")
    sliding = by_kind.section("sliding_attention") if by_kind else None
    hidden_size = config.size("hidden_size")
    head_dim = config.size("head_dim", 256)
    return {
        "activation": _activation(config, config.text("hidden_activation") or "gelu_pytorch_tanh"),
        "rope_theta": _theta(config, full, 1_000_000.0),
        "rope_theta_sliding": sliding.positive("rope_theta", 10_000.0)
        if sliding
        else config.positive("rope_local_base_freq", 10_000.0),
        "rope_scaling": _rope_scaling(full),
        "sliding_window": config.size("sliding_window", 4096),
        "is_sliding_by_layer": _sliding_layers(config),
        "attention_scale": config.positive("query_pre_attn_scalar", float(head_dim)) ** -0.5,
        "embedding_scale": hidden_size**0.5,
        "has_qk_norm": True,
        "has_post_norms": True,
        "is_norm_plus_one": True,
        "is_tied": config.flag("tie_word_embeddings", True),
    }


def _sliding_layers(config: _Section) -> tuple[bool, ...]:
    num_layers = config.size("num_hidden_layers", at_most=_MAX_LAYERS)
    kinds = config.values.get("layer_types")
    if kinds is None:
        pattern = config.size("sliding_window_pattern", 6)
        return tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    allowed = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in allowed for kind in kinds):
        raise config.error(f"layer_types must be {num_layers} of {' or '.join(allowed)}")
    return tuple(kind == "sliding_attention" for kind in kinds)


def _activation(config: _Section, name: str) -> Activation:
    if name not in _ACTIVATIONS:
        supported = ", ".join(_ACTIVATIONS)
        raise config.error(f"activation {_brief(name)} is not supported; supported are {supported}")
    return _ACTIVATIONS[name]


def _theta(config: _Section, rope: _Section | None, default: float) -> float:
    if rope is not None and rope.values.get("rope_theta") is not None:
        return rope.positive("rope_theta", default)
    return config.positive("rope_theta", default)


def _rope_scaling(rope: _Section | None) -> RopeScaling | None:
    if rope is None:
        return None
    kind = rope.text("rope_type") or rope.text("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", rope.positive("factor", 1.0))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            rope.positive("factor", 8.0),
            rope.positive("low_freq_factor", 1.0),
            rope.positive("high_freq_factor", 4.0),
            rope.size("original_max_position_embeddings", 8192),
        )
    raise rope.error(f"rope type {_brief(kind)} is not supported; supported are default, linear and llama3")
