"""From a grammar's text to a request's constraint, for one model.

Owns the vocabulary in the matcher's form, made at the first grammar, and the compiled grammars.
Must not know logits, requests or threads.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

from llguidance import LLMatcher, LLTokenizer

from headrace.engine.constraint import Constraint, MaskWords
from headrace.engine.grammar_limits import engine_limits

_MAX_COMPILED = 32
_PAUSE_S = 0.001
"""Lets the engine's thread take the interpreter between two stretches in which it cannot."""

ReadTokenBytes = Callable[[], list[bytes]]


class _WrappedVocabulary:
    """A vocabulary as `LLTokenizer` reads it. Text is never tokenized: grammars say no_forcing."""

    is_tokenizer_wrapper = True

    def __init__(self, token_bytes: Sequence[bytes], end_token_ids: Sequence[int]) -> None:
        self.eos_token_id = end_token_ids[0]
        self.bos_token_id = None
        self.special_token_ids = [token_id for token_id, data in enumerate(token_bytes) if not data]
        # Special tokens need names that differ, and that no text can have: 0xFF occurs in no UTF-8.
        self.tokens = [data or b"\xff<%d>" % token_id for token_id, data in enumerate(token_bytes)]

    def __call__(self, _text: bytes | str) -> list[int]:
        return []


class CompiledGrammar(NamedTuple):
    """Its matcher at the beginning, or why there is none."""

    matcher: LLMatcher | None
    error: str = ""


class GrammarCompiler:
    """Compiles for one vocabulary. Used by one thread."""

    def __init__(self, read_token_bytes: ReadTokenBytes, eos_token_ids: frozenset[int]) -> None:
        self._read_token_bytes = read_token_bytes
        # Without one, answers end where the grammar allows nothing more; the matcher wants one all the same.
        self._end_token_ids = sorted(eos_token_ids) or [0]
        self._tokenizer: LLTokenizer | None = None
        self._mask_words: MaskWords | None = None
        self._compiled: OrderedDict[bytes, CompiledGrammar] = OrderedDict()
        """By the hash of their text, least recently used first."""

    def constrain(self, grammar: str, token_ids: Sequence[int]) -> tuple[Constraint | None, str]:
        """Return a constraint that has taken `token_ids`, or None and why not."""
        key = blake2b(grammar.encode(), digest_size=16).digest()
        compiled = self._compiled.pop(key, None) or self._compile(grammar)
        self._compiled[key] = compiled
        if len(self._compiled) > _MAX_COMPILED:
            self._compiled.popitem(last=False)
        if compiled.matcher is None:
            return None, compiled.error
        matcher = compiled.matcher.deep_copy()
        num_matched = matcher.try_consume_tokens(list(token_ids))
        if num_matched < len(token_ids):
            return None, f"token {num_matched} of resume_from does not match the grammar"
        assert self._mask_words is not None
        return Constraint(matcher, self._mask_words, num_matched), ""

    def prepare(self) -> None:
        """Put the vocabulary into the matcher's form, if that was not done yet."""
        if self._tokenizer is None:
            self._tokenizer = self._build_tokenizer()

    def _compile(self, grammar: str) -> CompiledGrammar:
        self.prepare()
        assert self._tokenizer is not None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=engine_limits())
        if matcher.is_error():
            return CompiledGrammar(None, str(matcher.get_error()).partition("\n")[0])
        return CompiledGrammar(matcher)

    def _build_tokenizer(self) -> LLTokenizer:
        """Put the vocabulary into the matcher's form. For 49,152 tokens: 50 ms here, then twice 50 ms in
        which no other thread of this process runs Python; between them, steps go on."""
        vocabulary = _WrappedVocabulary(self._read_token_bytes(), self._end_token_ids)
        num_tokens = len(vocabulary.tokens)
        time.sleep(_PAUSE_S)
        plain = LLTokenizer(vocabulary, n_vocab=num_tokens, eos_token=self._end_token_ids, slices=[])  # type: ignore[arg-type]
        time.sleep(_PAUSE_S)
        tokenizer = plain.with_slices(LLTokenizer.general_slices())
        self._mask_words = MaskWords(num_tokens, vocabulary.special_token_ids)
        return tokenizer
