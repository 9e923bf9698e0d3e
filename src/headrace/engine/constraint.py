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


class ConstraintError(Exception):
    """The grammar cannot go on: it met a limit, or no token of the vocabulary fits. Says why."""


class MaskWords:
    """How a vocabulary's masks lie in memory: a bit per token, lowest bit first, in words of 32."""

    def __init__(self, num_tokens: int, special_token_ids: Collection[int]) -> None:
        """`num_tokens`: of the logits. `special_token_ids`: a grammar never allows them."""
        self.num_tokens = num_tokens
        self.special_token_ids = frozenset(special_token_ids)
        self.plain = np.full((num_tokens + 31) // 32, -1, np.int32)
        """Allows all tokens but the special ones."""
        plain_bytes = self.plain.view(np.uint8)
        for token_id in special_token_ids:
            plain_bytes[token_id >> 3] &= 0xFF ^ (1 << (token_id & 7))


class Constraint:
    """One generation's place in its grammar, and the mask of its next token. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, mask_words: MaskWords, num_advanced: int = 0) -> None:
        """`matcher`: of this constraint alone; it has taken `num_advanced` tokens."""
        self._matcher = matcher
        self._mask_words = mask_words
        self._words = np.zeros(len(mask_words.plain), np.int32)
        self._bytes = self._words.view(np.uint8)
        self.mask_address = self._words.ctypes.data
        """Where `compute_mask` leaves the mask's words."""
        self.num_advanced = num_advanced
        """Tokens that were taken: the index of the next one."""
        self.is_complete = self._find_complete()
        """The answer matches the grammar, and nothing could follow it."""

    def __repr__(self) -> str:
        return f"<Constraint after {self.num_advanced} tokens, {'complete' if self.is_complete else 'open'}>"

    @property
    def can_end(self) -> bool:
        """The answer matches the grammar, whether or not something could follow it."""
        return bool(self._matcher.is_accepting())

    def compute_mask(self, end_token_ids: Collection[int]) -> None:
        """Find out which tokens may come next. `end_token_ids`: special tokens that end an answer; they are
        allowed where the answer may end. None may be left: the answer is complete then, or nothing fits (see
        `can_end`). Raises ConstraintError."""
        words = self._words
        if self.is_complete:
            words.fill(0)
        else:
            self._matcher.unsafe_compute_mask_ptr(self.mask_address, words.nbytes)
            if self._matcher.is_error():
                raise ConstraintError(self._error())
            np.bitwise_and(words, self._mask_words.plain, out=words)
        if end_token_ids and self.can_end:
            for token_id in end_token_ids:
                self._bytes[token_id >> 3] |= 1 << (token_id & 7)

    def apply(self, row_V: Float32Row) -> Float32Row:
        """Return the row with minus infinity for tokens that the computed mask forbids."""
        bits = np.unpackbits(self._bytes, count=self._mask_words.num_tokens, bitorder="little")
        return np.where(bits, row_V, np.float32(-np.inf))

    def advance(self, token_id: int) -> None:
        """Take the chosen token, which the mask allowed. A token that ends the answer is not given here.
        Raises ConstraintError."""
        if not self._matcher.consume_token(token_id):
            raise ConstraintError(self._error())
        self.num_advanced += 1
        self.is_complete = self._find_complete()

    def try_advance(self, token_id: int) -> bool:
        """Take a token if the grammar allows it, and say whether it does; no mask is needed. False for all
        special tokens, and where the grammar cannot go on: `compute_mask` says why."""
        if token_id in self._mask_words.special_token_ids or not self._matcher.try_consume_tokens([token_id]):
            return False
        self.num_advanced += 1
        self.is_complete = self._find_complete()
        return True

    def rollback(self, num_tokens: int) -> None:
        """Take back the last `num_tokens` tokens. Raises ConstraintError."""
        if num_tokens and not self._matcher.rollback(num_tokens):
            raise ConstraintError(self._error())
        self.num_advanced -= num_tokens
        self.is_complete = self._find_complete()

    def count_valid(self, token_ids: Sequence[int]) -> int:
        """Return how many of the next tokens, in this order, the grammar would allow. Changes nothing."""
        return int(self._matcher.validate_tokens(list(token_ids)))

    def forced_bytes(self) -> bytes:
        """Return the text that must come next; empty if there is a choice. Its tokens are good drafts."""
        return bytes(self._matcher.compute_ff_bytes())

    def _find_complete(self) -> bool:
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def _error(self) -> str:
        first_line = str(self._matcher.get_error()).partition("\n")[0]
        return first_line or "the grammar does not allow this token"
