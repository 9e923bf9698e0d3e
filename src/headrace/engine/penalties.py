"""Changes to a request's logits before sampling: penalties, bias, and stops that are not allowed yet.

Owns the counts of tokens seen, kept up token by token. Pure (numpy).
Must not know probabilities, random numbers, or other requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.api.messages import SamplingParams

Float32Row = NDArray[np.float32]
_FIRST_CAPACITY = 64


class _SeenTokens:
    """Distinct tokens and how often each was added, as arrays that grow by doubling."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.empty(_FIRST_CAPACITY, np.int64)
        self._counts = np.empty(_FIRST_CAPACITY, np.float32)

    def add(self, token_id: int) -> None:
        place = self._place.get(token_id)
        if place is None:
            place = self._place[token_id] = len(self._place)
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
            self._ids[place] = token_id
            self._counts[place] = 0.0
        self._counts[place] += 1.0

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> Float32Row:
        return self._counts[: len(self._place)]


class Penalties:
    """What one request's sampling parameters do to its logits. Absent for requests that change nothing."""

    def __init__(self, sampling: SamplingParams, stop_token_ids: frozenset[int]) -> None:
        self._sampling = sampling
        self._generated = _SeenTokens()
        self._all = _SeenTokens()
        self._num_seen = 0
        self._bias_ids = np.fromiter(sampling.logit_bias.keys(), np.int64)
        self._biases = np.fromiter(sampling.logit_bias.values(), np.float32)
        self._stop_ids = np.fromiter(stop_token_ids, np.int64)

    @classmethod
    def of(cls, sampling: SamplingParams, stop_token_ids: frozenset[int]) -> Penalties | None:
        """Return the penalties that `sampling` asks for, or None if it leaves logits as they are."""
        asks = (
            sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.repetition_penalty != 1.0
            or sampling.logit_bias
            or (sampling.min_tokens and stop_token_ids)
        )
        return cls(sampling, stop_token_ids) if asks else None

    def apply(self, row_V: Float32Row, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Change `row_V` in place. `token_ids`: prompt and generated tokens; only grows between calls.

        Order: repetition (CTRL, arXiv:1909.05858), frequency and presence (OpenAI), bias, minimum length.
        """
        self._count(token_ids, num_prompt_tokens)
        sampling = self._sampling
        if sampling.repetition_penalty != 1.0:
            ids = self._all.ids
            seen = row_V[ids]
            penalty = np.float32(sampling.repetition_penalty)
            row_V[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            frequency = np.float32(sampling.frequency_penalty)
            presence = np.float32(sampling.presence_penalty)
            row_V[self._generated.ids] -= frequency * self._generated.counts + presence
        if len(self._bias_ids):
            row_V[self._bias_ids] += self._biases
        if len(token_ids) - num_prompt_tokens < sampling.min_tokens:
            row_V[self._stop_ids] = -np.inf

    def _count(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        counts_all = self._sampling.repetition_penalty != 1.0
        for index in range(self._num_seen, len(token_ids)):
            if counts_all:
                self._all.add(token_ids[index])
            if index >= num_prompt_tokens:
                self._generated.add(token_ids[index])
        self._num_seen = len(token_ids)
