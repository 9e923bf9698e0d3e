"""What a model's files say about it, without torch and without touching the weights.

Owns the dataclasses that engine and front share. `read_metadata` is the only door.
Must not know tensors' contents, templates' languages or how text becomes tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from headrace.engine.model_files.resolve import ModelFiles
from headrace.errors import ModelError

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    linear: all divided by `factor`. llama3: low frequencies divided by `factor`, high ones kept, those
    between blended (Llama 3.1's release code; `transformers` calls it rope_type llama3).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The shape of a decoder, whichever file format it came from. One decoder reads these differences."""

    architecture: Literal["llama", "gemma3"]
    vocab_size: int
    """Rows of the embedding; may exceed the tokenizer's vocabulary."""
    context_length: int
    """Tokens that the model was trained for."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    """Base of the rotary frequencies of layers with full attention."""
    activation: Activation = "silu"
    rope_theta_sliding: float = 0.0
    """The same for layers with sliding attention; 0: as rope_theta."""
    rope_scaling: RopeScaling | None = None
    """For layers with full attention only."""
    sliding_window: int = 0
    """A token of a sliding layer sees this many tokens, itself included. 0: no layer slides."""
    is_sliding_by_layer: tuple[bool, ...] = ()
    """One per layer, or empty: none slides."""
    attention_scale: float = 0.0
    """Factor on q·k. 0: head_dim ** -0.5."""
    embedding_scale: float = 1.0
    has_qk_norm: bool = False
    has_post_norms: bool = False
    """RMS norms also after attention and after the MLP, before each is added (Gemma)."""
    is_norm_plus_one: bool = False
    """Norm weights mean 1 + w. Gemma in safetensors; GGUF files store the sum already."""
    is_tied: bool = True
    """The output head is the embedding."""


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """The tokenizer that a GGUF file carries, as it stands there."""

    model: str
    """`gpt2` (byte-level BPE with merges) or `llama` (SentencePiece with scores)."""
    pre_tokenizer: str
    """llama.cpp's name of the splitting rule, for example `smollm`; empty when absent."""
    tokens: list[str] = field(repr=False)
    token_types: list[int] = field(repr=False)
    """1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte. Empty when absent."""
    merges: list[str] = field(repr=False)
    scores: list[float] = field(repr=False)
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    unknown_token_id: int | None


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling that the model's authors recommend; None where they say nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """All that engine and front need to know of a model before its weights."""

    name: str
    hyperparameters: Hyperparameters
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: frozenset[int]
    """Every id that ends an answer: end of text and end of turn."""
    bos_token: str
    """The text of bos_token_id, for chat templates; empty when there is none."""
    eos_token: str
    chat_template: str | None = field(repr=False)
    """Jinja source, untrusted: render it sandboxed. None: a base model."""
    defaults: GenerationDefaults
    gguf_tokenizer: GgufTokenizer | None = field(default=None, repr=False)
    """Set for GGUF files."""
    tokenizer_json: Path | None = None
    """Set for Hugging Face directories: the file for `tokenizers.Tokenizer.from_file`."""


@dataclass(frozen=True, slots=True)
class TextMetadata:
    """What a front needs of a model whose architecture is another engine's business."""

    tokenizer_json: Path
    bos_token: str
    eos_token: str
    chat_template: str | None = field(repr=False)
    """Jinja source, untrusted, as in ModelMetadata."""


def read_metadata(files: ModelFiles) -> ModelMetadata:
    """Read what the files of a model say about it, in well under 0.3 s.

    Raises ModelError when a file is missing, damaged or hostile, or the architecture is not supported.
    """
    metadata = _read_files(files)
    return replace(metadata, chat_template=files.chat_template) if files.chat_template else metadata


def _read_files(files: ModelFiles) -> ModelMetadata:
    # Each format's reader is imported only when needed: the front starts with one of them.
    if files.format == "gguf":
        from headrace.engine.model_files.gguf_metadata import read_gguf_metadata

        return read_gguf_metadata(files.name, files.path)
    if files.format == "huggingface":
        from headrace.engine.model_files.huggingface_metadata import read_huggingface_metadata

        return read_huggingface_metadata(files.name, files.path)
    raise ModelError(f"model {files.name!r} is {files.format}: it has no files to read")
