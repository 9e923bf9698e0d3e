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

from headrace.engine.model_files.vocabulary import decoder_kinds_of, spelling_of
from headrace.errors import InvalidRequest, ModelError
from headrace.replica.text import TokenBytes

SIMULATED_END = 256
"""The simulated engine's end token; the ids below are bytes."""


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
        decoder = tokenizer.decoder
        state: dict[str, Any] | None = None if decoder is None else json.loads(decoder.__getstate__())
        self._spelling = spelling_of(decoder_kinds_of(state))
        self._added = tokenizer.get_added_tokens_decoder()

    def __missing__(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            data = b"" if added.special else str(added.content).encode()
        else:
            piece = self._tokenizer.id_to_token(token_id)
            data = b"" if piece is None else self._spelling.spell(piece)
        self[token_id] = data
        return data


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
