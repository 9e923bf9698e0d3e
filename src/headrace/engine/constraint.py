"""What one request's next token may be: its grammar, and how far the answer has come in it.

Owns the matcher, its mask, and when the answer may end. Turn per token: mask, choose, advance.
Must not know probabilities, other requests, or how grammars are compiled.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # an engine that never meets a grammar does not load the library
    from llguidance import LLMatcher

Float32Row = NDArray[np.float32]
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_BOUNDS_OF_BYTE = np.where(_BITS, np.float32(np.inf), np.float32(-np.inf))
"""[256, 8]: for each byte of a mask, what its eight tokens' logits may be at most."""


class ConstraintError(Exception):
    """The grammar cannot go on: it met a limit, or no token of the vocabulary fits. Says why."""


class TokenMask:
    """The buffers for one mask at a time. All constraints of an engine share them: 0.2 MB stay cached."""

    def __init__(self, num_tokens: int, special_token_ids: Collection[int]) -> None:
        """`num_tokens`: of the logits. `special_token_ids`: a grammar never allows them."""
        num_words = (num_tokens + 31) // 32
        self.words = np.zeros(num_words, np.int32)
        """One bit per token, lowest bit first. Written by the matcher."""
        self._bytes = self.words.view(np.uint8)
        plain = np.full(num_words, -1, np.int32)
        self._plain_bytes = plain.view(np.uint8)
        for token_id in special_token_ids:
            self._plain_bytes[token_id >> 3] &= 0xFF ^ (1 << (token_id & 7))
        self._plain = plain
        self._bounds = np.empty((num_words * 4, 8), np.float32)
        self._bounds_V = self._bounds.reshape(-1)[:num_tokens]

    def apply(self, row_V: Float32Row, end_token_ids: Collection[int]) -> Float32Row:
        """Return the row with minus infinity for tokens whose bit is 0, and for all special ones but
        `end_token_ids`. Takes 12 µs for 49,152 tokens, however many are allowed."""
        self.words &= self._plain
        for token_id in end_token_ids:
            self._bytes[token_id >> 3] |= 1 << (token_id & 7)
        np.take(_BOUNDS_OF_BYTE, self._bytes, axis=0, out=self._bounds, mode="clip")
        return np.minimum(row_V, self._bounds_V)


class Constraint:
    """One generation's place in its grammar. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, token_mask: TokenMask) -> None:
        """`matcher`: at the grammar's beginning; of this constraint alone."""
        self._matcher = matcher
        self._token_mask = token_mask
        self.num_advanced = 0
        """Tokens that were taken: the index of the next one."""

    def __repr__(self) -> str:
        return f"<Constraint after {self.num_advanced} tokens, {'complete' if self.is_complete else 'open'}>"

    @property
    def is_complete(self) -> bool:
        """The answer matches the grammar, and nothing could follow it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def can_end(self) -> bool:
        """The answer matches the grammar, whether or not something could follow it."""
        return bool(self._matcher.is_accepting())

    def mask(self, row_V: Float32Row, end_token_ids: Collection[int]) -> Float32Row:
        """Return the row with minus infinity for forbidden tokens; NaN stays NaN. `end_token_ids`: special
        tokens that end an answer; they are allowed where the answer may end. All may become minus infinity:
        the answer is complete then, or nothing fits (see `can_end`). Raises ConstraintError."""
        token_mask = self._token_mask
        words = token_mask.words
        if self.is_complete:
            words.fill(0)
        else:
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if self._matcher.is_error():
                raise ConstraintError(self._error())
        return token_mask.apply(row_V, end_token_ids if self.can_end else ())

    def advance(self, token_id: int) -> None:
        """Take the chosen token, which `mask` allowed. A token that ends the answer is not given here.
        Raises ConstraintError."""
        if not self._matcher.consume_token(token_id):
            raise ConstraintError(self._error())
        self.num_advanced += 1

    def rollback(self, num_tokens: int) -> None:
        """Take back the last `num_tokens` tokens. Raises ConstraintError."""
        if num_tokens and not self._matcher.rollback(num_tokens):
            raise ConstraintError(self._error())
        self.num_advanced -= num_tokens

    def count_valid(self, token_ids: Sequence[int]) -> int:
        """Return how many of the next tokens, in this order, the grammar would allow. Changes nothing."""
        return int(self._matcher.validate_tokens(list(token_ids)))

    def forced_bytes(self) -> bytes:
        """Return the text that must come next; empty if there is a choice. Its tokens are good drafts."""
        return bytes(self._matcher.compute_ff_bytes())

    def _error(self) -> str:
        first_line = str(self._matcher.get_error()).partition("\n")[0]
        return first_line or "the grammar does not allow this token"
