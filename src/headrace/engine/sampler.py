"""Chooses each next token from its row of logits.

Owns what is done to a row before and after: penalties, grammar, errors. A row's result depends on nothing
else in the batch; `distribution` defines it, and the compiled kernels compute it where there are any.
Must not know blocks, scheduling, or why a request ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.api.messages import TokenLogprobs
from headrace.engine.constraint import ConstraintError
from headrace.engine.distribution import LEAST_LOGPROB, draw, logprobs_of, token_logprobs, uniform
from headrace.engine.fused_sampling import FusedSampling, task
from headrace.engine.penalties import Float32Row
from headrace.engine.request import NO_TOKEN, EngineRequest

LEAST_TEMPERATURE = 1e-5
"""Below it the most likely token is taken: dividing by less overflows, and changes nothing."""
NOT_FINITE = "the model gave logits that are not finite for this request; its generation ends here"


class Sampled(NamedTuple):
    """One row's result. `token_id` is NO_TOKEN where a grammar is complete, and has no meaning when `error`
    is set."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str = ""


_DAMAGED = Sampled(-1, error=NOT_FINITE)


class Sampler:
    """Samples all rows of a step. Keeps nothing from step to step: each request carries its own state."""

    def __init__(self, fused: FusedSampling | None = None) -> None:
        """Without `fused`, numpy computes the same."""
        self._fused = fused

    def sample(
        self,
        logits_SV: torch.Tensor,
        requests: Sequence[EngineRequest],
        rows: Sequence[int] | None = None,
    ) -> list[Sampled]:
        """Return one result per request: row rows[i] is that of requests[i]; without `rows`, row i.

        A request is there at most once: its next row depends on what came of this one. `logits_SV` (float32)
        stays as it is.
        """
        if not requests:
            return []
        places = range(len(requests)) if rows is None else rows
        if logits_SV.device.type != "cpu":
            if all(_is_plain_greedy(request) for request in requests):
                return _most_likely(logits_SV[list(places)])
            logits_SV = logits_SV.cpu()
        logits = logits_SV.numpy()
        changed: dict[int, Float32Row] = {}
        ended: dict[int, Sampled] = {}
        for index, request in enumerate(requests):
            if request.penalties is not None or request.constraint is not None:
                result = _change(logits[places[index]], request)
                if isinstance(result, Sampled):
                    ended[index] = result
                else:
                    changed[index] = result
        choose = self._choose if self._fused is None else self._choose_fused
        results = choose(logits, places, requests, changed)
        for index in changed:
            if requests[index].constraint is not None:
                results[index] = _advance(requests[index], results[index])
        for index, result in ended.items():
            results[index] = result
        return results

    def _choose(
        self,
        logits: NDArray[np.float32],
        places: Sequence[int],
        requests: Sequence[EngineRequest],
        changed: Mapping[int, Float32Row],
    ) -> list[Sampled]:
        """Choose a token from each row, or from what it was changed to."""
        return [
            _choose_one(changed.get(index, logits[place]), request)
            for index, (place, request) in enumerate(zip(places, requests))
        ]

    def _choose_fused(
        self,
        logits: NDArray[np.float32],
        places: Sequence[int],
        requests: Sequence[EngineRequest],
        changed: Mapping[int, Float32Row],
    ) -> list[Sampled]:
        """The same in one call of the kernels."""
        fused, vocab_size = self._fused, logits.shape[1]
        assert fused is not None
        assert logits.strides[1] == logits.itemsize == 4, f"rows of logits lie apart: {logits.strides}"
        first, stride = logits.ctypes.data, logits.strides[0]
        tasks = [
            task(first + place * stride, request.sampling, request.num_generated_tokens)
            if index not in changed
            else task(changed[index].ctypes.data, request.sampling, request.num_generated_tokens)
            for index, (place, request) in enumerate(zip(places, requests))
        ]
        token_ids = fused.choose(tasks, vocab_size)
        results = [Sampled(token_id) if token_id >= 0 else _DAMAGED for token_id in token_ids]
        for index, request in enumerate(requests):
            if request.sampling.num_logprobs >= 0 and token_ids[index] >= 0:
                row_V = changed.get(index, logits[places[index]])
                drawn = fused.drawn(index, vocab_size)
                logprobs = logprobs_of(row_V, drawn.token_id, drawn.top_ids, drawn.highest, drawn.mass)
                results[index] = Sampled(drawn.token_id, logprobs)
        return results


def _is_plain_greedy(request: EngineRequest) -> bool:
    sampling = request.sampling
    return (
        sampling.temperature < LEAST_TEMPERATURE
        and request.penalties is None
        and request.constraint is None
        and sampling.num_logprobs < 0
    )


def _most_likely(logits_SV: torch.Tensor) -> list[Sampled]:
    """Return each row's most likely token, chosen on its device."""
    values_S, indices_S = logits_SV.max(dim=1)
    return [
        Sampled(token_id) if math.isfinite(highest) else _DAMAGED
        for token_id, highest in zip(indices_S.tolist(), values_S.tolist())
    ]


def _change(row_V: Float32Row, request: EngineRequest) -> Float32Row | Sampled:
    """Return a row with penalties and grammar applied, or a result if there is nothing to choose."""
    if request.penalties is not None:
        row_V = row_V.copy()
        if not math.isfinite(row_V.max()):
            return _DAMAGED
        request.penalties.apply(row_V, request.token_ids, request.num_prompt_tokens)
    return row_V if request.constraint is None else _constrain(row_V, request)


def _choose_one(row_V: Float32Row, request: EngineRequest) -> Sampled:
    sampling = request.sampling
    # numpy's argmax takes a tenth of torch's time, gives ties to the lower id, and finds NaN.
    token_id = int(row_V.argmax())
    if not math.isfinite(row_V[token_id]):
        return _DAMAGED
    if sampling.temperature >= LEAST_TEMPERATURE:
        token_id = draw(row_V, sampling, uniform(sampling.seed, request.num_generated_tokens))
    if sampling.num_logprobs < 0:
        return Sampled(token_id)
    return Sampled(token_id, token_logprobs(row_V, token_id, sampling.num_logprobs))


def _advance(request: EngineRequest, result: Sampled) -> Sampled:
    """Tell a request's grammar the token that was chosen."""
    constraint = request.constraint
    assert constraint is not None
    if result.error:
        return result
    try:
        if result.token_id not in request.stop_token_ids:
            constraint.advance(result.token_id)
    except ConstraintError as error:
        return _stopped(error)
    if result.logprobs is None:
        return result
    # What a grammar forbids is no alternative.
    top = [entry for entry in result.logprobs.top if entry[1] > LEAST_LOGPROB]
    return Sampled(result.token_id, TokenLogprobs(result.logprobs.logprob, top))


def _stopped(error: ConstraintError) -> Sampled:
    return Sampled(NO_TOKEN, error=f"the grammar stopped this answer: {error}")


def _constrain(row_V: Float32Row, request: EngineRequest) -> Float32Row | Sampled:
    """Return the row masked with the request's grammar, or a result if no token is left.

    None is left where the answer is complete, or where only an end is allowed that min_tokens or ignore_eos
    forbid: no token obeys both, and what the grammar says is what the answer was asked to be.
    """
    constraint = request.constraint
    assert constraint is not None
    assert constraint.num_advanced == request.num_generated_tokens, f"{constraint!r} of {request!r}"
    try:
        masked_V = constraint.mask(row_V, request.end_token_ids)
    except ConstraintError as error:
        return _stopped(error)
    highest = float(masked_V.max())  # of the masked row alone: a pass takes 4 µs; NaN shows here, too
    if math.isfinite(highest):
        return masked_V
    if highest == -math.inf and constraint.can_end:
        return Sampled(NO_TOKEN)
    if highest == -math.inf and math.isfinite(row_V.max()):
        return _stopped(ConstraintError("no token of this model's vocabulary can continue it"))
    return _DAMAGED
