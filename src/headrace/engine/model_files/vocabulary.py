"""The bytes that each token of a model stands for, read from its files without a tokenizer.

Owns how pieces of byte-level and of SentencePiece-like vocabularies spell bytes.
Must not know how text becomes tokens, nor grammars.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from headrace.engine.model_files.metadata import GgufTokenizer, ModelMetadata
from headrace.errors import ModelError

_GGUF_UNKNOWN, _GGUF_CONTROL, _GGUF_USER_DEFINED = 2, 3, 4
_SPACE_MARK = "▁"
_BYTE_PIECE_CHARACTERS = len("<0xNN>")


class PieceSpelling:
    """Spells a vocabulary's pieces as bytes."""

    def __init__(self, *, is_byte_level: bool) -> None:
        self._stand_ins = _byte_level_alphabet() if is_byte_level else {}

    def spell(self, piece: str) -> bytes:
        """Return the bytes of `piece`: each stand-in its byte; `<0x0A>` one byte; `▁` a space."""
        if self._stand_ins:
            try:
                # One byte per character, and no loop in Python: a vocabulary has 50 to 260 thousand pieces.
                return piece.translate(self._stand_ins).encode("latin-1")
            except UnicodeEncodeError:
                return b"".join([self._spell_character(c) for c in piece])
        if len(piece) == _BYTE_PIECE_CHARACTERS and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()

    def _spell_character(self, character: str) -> bytes:
        byte = self._stand_ins.get(ord(character))
        return character.encode() if byte is None else bytes([byte])


def spelling_of(decoder_kinds: Collection[str]) -> PieceSpelling:
    """Return how a tokenizer spells whose decoder has these parts (`tokenizers` names them). Raises
    ModelError."""
    if "ByteLevel" in decoder_kinds:
        return PieceSpelling(is_byte_level=True)
    if "ByteFallback" in decoder_kinds or "Metaspace" in decoder_kinds:
        return PieceSpelling(is_byte_level=False)
    raise ModelError(
        f"the tokenizer's decoder is {'+'.join(sorted(decoder_kinds)) or 'none'}; "
        "supported are ByteLevel, ByteFallback and Metaspace"
    )


def decoder_kinds_of(decoder: Mapping[str, Any] | None) -> set[str]:
    """Return the names of the parts of tokenizer.json's `decoder`."""
    if decoder is None:
        return set()
    return {part["type"] for part in decoder.get("decoders", [decoder])}


def read_token_bytes(metadata: ModelMetadata) -> list[bytes]:
    """Return the bytes of each token id, as long as the model's logits: empty for special tokens, and for ids
    that the tokenizer does not have.

    49,152 tokens of a GGUF file take about 20 ms. Raises ModelError.
    """
    num_tokens = metadata.hyperparameters.vocab_size
    if metadata.gguf_tokenizer is not None:
        return _of_gguf(metadata.gguf_tokenizer, num_tokens)
    if metadata.tokenizer_json is not None:
        return _of_tokenizer_json(metadata.tokenizer_json, num_tokens)
    raise ModelError(f"model {metadata.name!r} has no tokenizer; it needs tokenizer.json beside its weights")


def _of_gguf(source: GgufTokenizer, num_tokens: int) -> list[bytes]:
    if source.model not in ("gpt2", "llama"):
        raise ModelError(f"the tokenizer is of kind {source.model!r}; supported are gpt2 and llama")
    spelling = PieceSpelling(is_byte_level=source.model == "gpt2")
    token_bytes = [spelling.spell(piece) for piece in source.tokens]
    for token_id, kind in enumerate(source.token_types[: len(token_bytes)]):
        if kind == _GGUF_USER_DEFINED:
            token_bytes[token_id] = source.tokens[token_id].encode()
        elif kind in (_GGUF_UNKNOWN, _GGUF_CONTROL):
            token_bytes[token_id] = b""
    return _fit(token_bytes, num_tokens)


def _of_tokenizer_json(path: Path, num_tokens: int) -> list[bytes]:
    try:
        state = msgspec.json.decode(path.read_bytes())
        spelling = spelling_of(decoder_kinds_of(state["decoder"]))
        token_bytes = [b""] * num_tokens
        for piece, token_id in _pieces(state["model"]["vocab"]):
            if token_id < num_tokens:
                token_bytes[token_id] = spelling.spell(piece)
        for token in state.get("added_tokens", ()):
            if token["id"] < num_tokens:
                token_bytes[token["id"]] = b"" if token["special"] else token["content"].encode()
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: its vocabulary cannot be read: {type(error).__name__}: {error}") from error
    return token_bytes


def _pieces(vocabulary: Any) -> Any:
    """Yield (piece, token id): BPE's vocabulary is a map, Unigram's a list of [piece, score]."""
    if isinstance(vocabulary, dict):
        return vocabulary.items()
    return ((piece, token_id) for token_id, (piece, _score) in enumerate(vocabulary))


def _fit(token_bytes: list[bytes], num_tokens: int) -> list[bytes]:
    missing = num_tokens - len(token_bytes)
    return token_bytes + [b""] * missing if missing > 0 else token_bytes[:num_tokens]


def _byte_level_alphabet() -> dict[int, int]:
    """From the printable stand-in of each byte in byte-level BPE vocabularies to the byte (GPT-2,
    `bytes_to_unicode`): bytes that print stand for themselves; the others follow from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + place: byte for place, byte in enumerate(others)}
