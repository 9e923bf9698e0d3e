"""Proposers for tests: one that knows the answers and errs on purpose, and one that always says the same."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

from headrace.engine.request import EngineRequest
from headrace.engine.speculation.proposer import Wanted


class _WithoutMemory:
    def sleep(self, level: Literal[1, 2]) -> None: ...

    def wake(self) -> None: ...


class ScriptedProposer(_WithoutMemory):
    """Guesses each request's known continuation; each guess is wrong with probability `error_rate`."""

    description = "script"

    def __init__(
        self, continuations: Mapping[str, Sequence[int]], error_rate: float, vocab_size: int, seed: int
    ) -> None:
        self._continuations = continuations
        self._error_rate = error_rate
        self._vocab_size = vocab_size
        self._random = random.Random(seed)

    def outlook(self, _request: EngineRequest, max_tokens: int) -> Sequence[float]:
        return [0.9] * max_tokens

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self._propose(request, max_tokens) for request, max_tokens in wanted]

    def _propose(self, request: EngineRequest, max_tokens: int) -> list[int]:
        done = request.num_generated_tokens
        known = list(self._continuations[request.request_id][done : done + max_tokens])
        known += [self._random.randrange(self._vocab_size) for _ in range(max_tokens - len(known))]
        drafts = [
            self._random.randrange(self._vocab_size) if self._random.random() < self._error_rate else token_id
            for token_id in known
        ]
        return drafts[: self._random.randint(0, max_tokens)] if self._error_rate else drafts


class ConstantProposer(_WithoutMemory):
    """Guesses `token_id`, as many times as are wanted."""

    description = "constant"

    def __init__(self, token_id: int) -> None:
        self._token_id = token_id

    def outlook(self, _request: EngineRequest, max_tokens: int) -> Sequence[float]:
        return [0.9] * max_tokens

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [[self._token_id] * max_tokens for _, max_tokens in wanted]
