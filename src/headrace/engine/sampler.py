"""Chooses each next token from its row of logits.

Owns what is done to a row before and after: penalties, grammar, errors. A row's result depends on nothing
else in the batch; `distribution` defines it, and the compiled kernels compute it where there are any.
Must not know blocks, scheduling, or why a request ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.api.messages import TokenLogprobs
from headrace.engine.constraint import ConstraintError
from headrace.engine.distribution import LEAST_LOGPROB, draw, token_logprobs, uniform
from headrace.engine.fused_sampling import NONE_ALLOWED, FusedSampling
from headrace.engine.penalties import Float32Row
from headrace.engine.request import NO_TOKEN, EngineRequest
from headrace.engine.sample_settings import RowSettings

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
        if logits_SV.device.type != "cpu":
            if all(_is_plain_greedy(request) for request in requests):
                return _most_likely(logits_SV if rows is None else logits_SV[list(rows)])
            logits_SV = logits_SV.cpu()
        logits = logits_SV.numpy()
        if self._fused is not None:
            return _FusedStep(self._fused, logits, requests, rows).sample()
        places = range(len(requests)) if rows is None else rows
        return [_sample_one(logits[place], request) for place, request in zip(places, requests)]


class _FusedStep:
    """One step's rows, sampled in one call of the kernels, and a second one for rows whose first choice their
    grammar forbids."""

    def __init__(
        self,
        fused: FusedSampling,
        logits: NDArray[np.float32],
        requests: Sequence[EngineRequest],
        rows: Sequence[int] | None,
    ) -> None:
        self._fused = fused
        self._logits = logits
        self._requests = requests
        self._rows = range(len(requests)) if rows is None else rows
        self._settings = [_settings_of(request) for request in requests]
        self._indices = [len(request.token_ids) - request.num_prompt_tokens for request in requests]

    def sample(self) -> list[Sampled]:
        """Return one result per request."""
        requests = self._requests
        held = [task for task, request in enumerate(requests) if request.constraint is not None]
        if not held:
            return self._choose(range(len(requests)))
        # The likeliest token of all, if it is allowed, is the likeliest of the allowed ones: most masks of
        # greedy answers need not be computed, above all those in free text, which take longest.
        tried = [task for task in held if _takes_likeliest(requests[task])]
        masked = [task for task in held if not _takes_likeliest(requests[task])]
        failed = self._compute_masks(masked)
        results = self._choose(range(len(requests)), masked)
        forbidden = [task for task in tried if _is_forbidden(requests[task], results[task].token_id)]
        if forbidden:
            failed |= self._compute_masks(forbidden)
            for task, result in zip(forbidden, self._choose(forbidden, forbidden, are_checked=True)):
                results[task] = result
        for task in (*masked, *forbidden):
            results[task] = failed.get(task) or _advance(requests[task], results[task])
        return results

    def _compute_masks(self, tasks: Sequence[int]) -> dict[int, Sampled]:
        """Compute what may come next in some rows; return the results of those whose grammar cannot go on."""
        failures = ((task, _compute_mask(self._requests[task])) for task in tasks)
        return {task: failure for task, failure in failures if failure is not None}

    def _choose(
        self, tasks: Sequence[int], masked: Sequence[int] = (), *, are_checked: bool = False
    ) -> list[Sampled]:
        """Choose a token for each of `tasks`; those that are in `masked`, too, hold to their masks.
        `are_checked`: all were given a token before, without their masks."""
        requests, fused = self._requests, self._fused
        masks = {task: _mask_address(requests[task]) for task in masked}
        token_ids = fused.choose(
            self._logits,
            [self._rows[task] for task in tasks],
            [self._settings[task] for task in tasks],
            [self._indices[task] for task in tasks],
            [masks.get(task, 0) for task in tasks] if masks else (),
            are_checked=are_checked,
        )
        results = [Sampled(token_id) for token_id in token_ids]
        for place, task in enumerate(tasks):
            request, token_id = requests[task], token_ids[place]
            if token_id < 0:
                results[place] = _no_token(request, is_none_allowed=token_id == NONE_ALLOWED)
            elif request.sampling.num_logprobs >= 0:
                num_top = min(request.sampling.num_logprobs, self._logits.shape[1])
                results[place] = Sampled(token_id, fused.logprobs(place, num_top))
        return results


def _settings_of(request: EngineRequest) -> int:
    """Return the address of a request's settings, with the tokens that came since the last row."""
    settings = request.row_settings
    if settings is None:
        settings = request.row_settings = RowSettings(request.sampling, request.penalties)
    if request.penalties is not None:
        settings.update(request.token_ids, request.num_prompt_tokens)
    return settings.address


def _mask_address(request: EngineRequest) -> int:
    assert request.constraint is not None
    return request.constraint.mask_address


def _takes_likeliest(request: EngineRequest) -> bool:
    """Whether its token is the likeliest one, and nothing else of the row is wanted."""
    return request.sampling.temperature < LEAST_TEMPERATURE and request.sampling.num_logprobs < 0


def _is_forbidden(request: EngineRequest, token_id: int) -> bool:
    """Let the grammar take a token that was chosen without it; say whether it did not. It is not asked where
    there is no token. An end is for the mask to allow."""
    assert request.constraint is not None
    return token_id >= 0 and (
        token_id in request.stop_token_ids or not request.constraint.try_advance(token_id)
    )


def _sample_one(row_V: Float32Row, request: EngineRequest) -> Sampled:
    """Sample one row with numpy."""
    # numpy's argmax takes a tenth of torch's time, gives ties to the lower id, and finds NaN.
    if not math.isfinite(row_V[row_V.argmax()]):
        return _DAMAGED
    if request.penalties is not None:
        row_V = row_V.copy()
        request.penalties.apply(row_V, request.token_ids, request.num_prompt_tokens)
    constraint = request.constraint
    if constraint is None:
        return _choose(row_V, request)
    return _compute_mask(request) or _advance(request, _choose(constraint.apply(row_V), request))


def _choose(row_V: Float32Row, request: EngineRequest) -> Sampled:
    sampling = request.sampling
    token_id = int(row_V.argmax())
    if not math.isfinite(row_V[token_id]):
        return _no_token(request, is_none_allowed=row_V[token_id] == -math.inf)
    if sampling.temperature >= LEAST_TEMPERATURE:
        token_id = draw(row_V, sampling, uniform(sampling.seed, request.num_generated_tokens))
    if sampling.num_logprobs < 0:
        return Sampled(token_id)
    return Sampled(token_id, token_logprobs(row_V, token_id, sampling.num_logprobs))


def _compute_mask(request: EngineRequest) -> Sampled | None:
    """Compute what may come next; return a result if the grammar cannot go on."""
    constraint = request.constraint
    assert constraint is not None
    assert constraint.num_advanced == request.num_generated_tokens, f"{constraint!r} of {request!r}"
    try:
        constraint.compute_mask(request.end_token_ids)
    except ConstraintError as error:
        return _stopped(error)
    return None


def _no_token(request: EngineRequest, *, is_none_allowed: bool) -> Sampled:
    """Say why there is no token: the row is damaged, or nothing is left of it.

    Nothing is left where the answer is complete, or where only an end is allowed that min_tokens or
    ignore_eos forbid: no token obeys both, and what the grammar says is what the answer was asked to be.
    """
    constraint = request.constraint
    if not is_none_allowed or constraint is None:
        return _DAMAGED
    if constraint.can_end:
        return Sampled(NO_TOKEN)
    return _stopped(ConstraintError("no token of this model's vocabulary can continue it"))


def _is_plain_greedy(request: EngineRequest) -> bool:
    return _takes_likeliest(request) and request.penalties is None and request.constraint is None


def _most_likely(logits_SV: torch.Tensor) -> list[Sampled]:
    """Return each row's most likely token, chosen on its device."""
    values_S, indices_S = logits_SV.max(dim=1)
    return [
        Sampled(token_id) if math.isfinite(highest) else _DAMAGED
        for token_id, highest in zip(indices_S.tolist(), values_S.tolist())
    ]


def _advance(request: EngineRequest, result: Sampled) -> Sampled:
    """Tell a request's grammar the token that was chosen."""
    constraint = request.constraint
    assert constraint is not None
    if result.token_id < 0:
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
