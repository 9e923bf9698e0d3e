"""Changes to a request's logits before sampling: penalties, bias, and stops that are not allowed yet.

Owns the counts of tokens seen, kept up token by token. Pure (numpy).
Must not know probabilities, random numbers, or other requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.api.messages import SamplingParams

Float32Row = NDArray[np.float32]
_FIRST_CAPACITY = 64


class SeenTokens:
    """Distinct tokens and how often each was added, as arrays that grow by doubling."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self.all_ids = np.empty(_FIRST_CAPACITY, np.int64)
        """The first len(self) are in use, as in `all_counts`. At times a larger array takes its place."""
        self.all_counts = np.empty(_FIRST_CAPACITY, np.float32)

    def __len__(self) -> int:
        return len(self._place)

    def add(self, token_ids: Iterable[int]) -> None:
        """Count some more tokens."""
        places, counts = self._place, self.all_counts
        for token_id in token_ids:
            place = places.get(token_id)
            if place is None:
                place = places[token_id] = len(places)
                if place == len(self.all_ids):
                    self.all_ids = np.concatenate([self.all_ids, np.empty_like(self.all_ids)])
                    counts = self.all_counts = np.concatenate([counts, np.empty_like(counts)])
                self.all_ids[place] = token_id
                counts[place] = 0.0
            counts[place] += 1.0

    @property
    def ids(self) -> NDArray[np.int64]:
        return self.all_ids[: len(self._place)]

    @property
    def counts(self) -> Float32Row:
        return self.all_counts[: len(self._place)]


class Penalties:
    """What one request's sampling parameters do to its logits. Absent for requests that change nothing."""

    def __init__(self, sampling: SamplingParams, stop_token_ids: frozenset[int]) -> None:
        self.generated = SeenTokens()
        """Counted where frequency or presence is penalised."""
        self.seen = SeenTokens()
        """Of prompt and answer; counted where repetition is penalised."""
        self.bias_ids = np.fromiter(sampling.logit_bias.keys(), np.int64)
        self.biases = np.fromiter(sampling.logit_bias.values(), np.float32)
        self.stop_ids = np.fromiter(stop_token_ids, np.int64)
        self._sampling = sampling
        self._counts_seen = sampling.repetition_penalty != 1.0
        self._counts_generated = bool(sampling.frequency_penalty or sampling.presence_penalty)
        self._num_counted = 0

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
        self.count(token_ids, num_prompt_tokens)
        sampling = self._sampling
        if len(self.seen):
            ids = self.seen.ids
            logits = row_V[ids]
            penalty = np.float32(sampling.repetition_penalty)
            row_V[ids] = np.where(logits > 0, logits / penalty, logits * penalty)
        if len(self.generated):
            frequency = np.float32(sampling.frequency_penalty)
            presence = np.float32(sampling.presence_penalty)
            row_V[self.generated.ids] -= frequency * self.generated.counts + presence
        if len(self.bias_ids):
            row_V[self.bias_ids] += self.biases
        if self.forbids_stops(len(token_ids) - num_prompt_tokens):
            row_V[self.stop_ids] = -np.inf

    def count(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Take in the tokens that came since the last call: one per step, however long the context."""
        begin, end = self._num_counted, len(token_ids)
        if begin == end:
            return
        if self._counts_seen:
            self.seen.add(token_ids[begin:])
        if self._counts_generated:
            self.generated.add(token_ids[max(begin, num_prompt_tokens) :])
        self._num_counted = end

    def forbids_stops(self, num_generated_tokens: int) -> bool:
        """Whether the next token may not be a stop: fewer than min_tokens were generated."""
        return num_generated_tokens < self._sampling.min_tokens
