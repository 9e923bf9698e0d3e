"""Text to token ids and back, for one model.

Owns the mapping only. Must not know chat templates, requests or streams (`headrace.replica.text` decodes
streams from `token_bytes`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from headrace.errors import InvalidRequest, ModelError
from headrace.replica.text import TokenBytes

SIMULATED_END = 256
"""The simulated engine's end token; the ids below are bytes."""
_SPACE_MARK = "▁"


class TextTokenizer(Protocol):
    """What the front needs of a tokenizer."""

    token_bytes: TokenBytes
    """For streams: special tokens are empty."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of `text`; special tokens: those that the model wants around any text."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of whole `token_ids`, special tokens included."""
        ...


class ByteTokenizer:
    """The simulated engine's: every byte is a token."""

    def __init__(self) -> None:
        self.token_bytes: TokenBytes = {**{i: bytes([i]) for i in range(SIMULATED_END)}, SIMULATED_END: b""}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(_to_utf8(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join([self.token_bytes[token_id] for token_id in token_ids]).decode("utf-8", "replace")


class ModelTokenizer:
    """A `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.token_bytes: TokenBytes = TokenBytesTable(tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        _to_utf8(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text


class TokenBytesTable(dict[int, bytes]):
    """The bytes of each token, filled as tokens are met. Ids that the tokenizer does not have are empty:
    a model's embedding may have more rows than its tokenizer has tokens.

    Raises ModelError if the tokenizer's decoder is of no known kind.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        kinds = _decoder_kinds(tokenizer)
        self._is_byte_level = "ByteLevel" in kinds
        if not self._is_byte_level and not kinds & {"ByteFallback", "Metaspace"}:
            raise ModelError(
                f"the tokenizer's decoder is {'+'.join(sorted(kinds)) or 'none'}; "
                "supported are ByteLevel, ByteFallback and Metaspace"
            )
        self._byte_of = _byte_level_alphabet() if self._is_byte_level else {}
        self._added = tokenizer.get_added_tokens_decoder()

    def __missing__(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            data = b"" if added.special else str(added.content).encode()
        else:
            piece = self._tokenizer.id_to_token(token_id)
            data = b"" if piece is None else self._piece_bytes(piece)
        self[token_id] = data
        return data

    def _piece_bytes(self, piece: str) -> bytes:
        if self._is_byte_level:
            return b"".join([self._byte_of.get(c) or c.encode() for c in piece])
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()


def load_tokenizer_json(path: Path) -> Tokenizer:
    """Read a Hugging Face tokenizer.json. Raises ModelError."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise ModelError(f"{path}: not a tokenizer that can be read: {error}") from error


def _to_utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text has half of a surrogate pair at character {error.start}; send whole characters"
        ) from None


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    """Return the names of the decoder's parts."""
    if tokenizer.decoder is None:
        return set()
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    parts = state.get("decoders", [state])
    return {part["type"] for part in parts}


def _byte_level_alphabet() -> dict[str, bytes]:
    """The printable stand-in of each byte in byte-level BPE vocabularies (GPT-2, `bytes_to_unicode`).

    Bytes that print stand for themselves; the others follow from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = {chr(byte): bytes([byte]) for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins.update({chr(0x100 + place): bytes([byte]) for place, byte in enumerate(others)})
    return stand_ins
