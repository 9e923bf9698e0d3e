"""What the front knows of its model: tokenizer and chat template, loaded without weights.

Must not know requests or the engine process.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from headrace.api.messages import EngineSpec
from headrace.engine.model_files.resolve import ModelFiles
from headrace.errors import ModelError
from headrace.replica.chat import SIMULATED_TEMPLATE, ChatTemplate
from headrace.replica.tokenizer import ByteTokenizer, ModelTokenizer, TextTokenizer, load_tokenizer_json

_LONG_TEXT_CHARACTERS = 8192
"""Above it, tokenizing takes milliseconds and goes to a thread (the library lets go of the interpreter)."""
_NUM_THREADS = 2


@dataclass(frozen=True, slots=True)
class TextModel:
    """A model's text side."""

    tokenizer: TextTokenizer
    chat_template: ChatTemplate | None
    """None: a base model, which knows no chat."""


def load_text_model(spec: EngineSpec) -> TextModel:
    """Load tokenizer and chat template of the model in `spec`. Raises ModelError."""
    if spec.kind == "simulated":
        return TextModel(ByteTokenizer(), ChatTemplate(SIMULATED_TEMPLATE))
    from headrace.engine.model_files.metadata import read_metadata
    from headrace.engine.model_files.resolve import resolve_model

    if spec.kind == "vllm":
        return _load_foreign(resolve_model(spec.model))
    metadata = read_metadata(resolve_model(spec.model))
    if metadata.gguf_tokenizer is not None:
        from headrace.replica.gguf_tokenizer import build_gguf_tokenizer

        tokenizer = build_gguf_tokenizer(metadata.gguf_tokenizer, metadata.bos_token_id, metadata.eos_token)
    elif metadata.tokenizer_json is not None:
        tokenizer = load_tokenizer_json(metadata.tokenizer_json)
    else:
        raise ModelError(
            f"model {metadata.name!r} has no tokenizer; it needs tokenizer.json beside its weights"
        )
    source = metadata.chat_template
    template = ChatTemplate(source, metadata.bos_token, metadata.eos_token) if source else None
    return TextModel(ModelTokenizer(tokenizer), template)


def _load_foreign(files: ModelFiles) -> TextModel:
    """Load a model's text side, whatever its architecture."""
    from headrace.engine.model_files.huggingface_metadata import read_huggingface_text

    text = read_huggingface_text(files)
    template = (
        ChatTemplate(text.chat_template, text.bos_token, text.eos_token) if text.chat_template else None
    )
    return TextModel(ModelTokenizer(load_tokenizer_json(text.tokenizer_json)), template)


class PromptEncoder:
    """Tokenizes prompts; long ones in a thread, so that running streams are not held up.

    Its queue is bounded by the requests that the front accepts.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenize")

    async def encode(
        self, text: str, *, add_special_tokens: bool, num_characters_in_all: int = 0
    ) -> list[int]:
        """Return the ids of `text`, one of several texts with `num_characters_in_all`.
        Raises InvalidRequest."""
        if max(len(text), num_characters_in_all) <= _LONG_TEXT_CHARACTERS:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    def close(self) -> None:
        """End the threads; running work is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
