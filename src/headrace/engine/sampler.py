"""Chooses each next token from its row of logits.

Owns the random numbers: a pure function of (seed, index of the generated token). A row's result depends on
nothing else in the batch: all arithmetic is per row, in float64, with ties going to the lower token id.
Must not know blocks, scheduling, or why a request ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.api.messages import SamplingParams, TokenLogprobs
from headrace.engine.constraint import ConstraintError
from headrace.engine.penalties import Float32Row
from headrace.engine.request import NO_TOKEN, EngineRequest

Float64Row = NDArray[np.float64]
_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_NEAR_SPAN = 8.0
_FEW = 500
_SPANS = (1.0, 2.0, 4.0, _NEAR_SPAN, 12.0, math.inf)
"""Tokens at least e^-span times as likely as the likeliest are tried first: sorting few is cheap, and they
nearly always hold the quantile that is looked for."""
_LEAST_TEMPERATURE = 1e-5
"""Below it the most likely token is taken: dividing by less overflows, and changes nothing."""
_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""
NOT_FINITE = "the model gave logits that are not finite for this request; its generation ends here"


class Sampled(NamedTuple):
    """One row's result. `token_id` is NO_TOKEN where a grammar is complete, and has no meaning when `error` is
    set."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str = ""


def uniform(seed: int, index: int) -> float:
    """Return a number in [0, 1) for (seed, index), with 53 random bits.

    Two rounds of the SplitMix64 finaliser (Steele, Lea, Flood 2014), one for each argument.
    """
    state = _mix((seed & _MASK_64) + _GOLDEN & _MASK_64)
    return (_mix((state + (index + 1) * _GOLDEN) & _MASK_64) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)


class Sampler:
    """Samples all rows of a step. Holds no state: each request carries its own."""

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
        if rows is not None:
            logits_SV = logits_SV[list(rows)]
        if logits_SV.device.type != "cpu" and not all(_is_plain_greedy(request) for request in requests):
            logits_SV = logits_SV.cpu()
        best, best_logits = _most_likely(logits_SV)
        results = []
        for index, request in enumerate(requests):
            if not math.isfinite(best_logits[index]):
                results.append(Sampled(-1, error=NOT_FINITE))
            elif _is_plain_greedy(request):
                results.append(Sampled(best[index]))
            else:
                results.append(_sample_row(logits_SV[index].numpy(), request))
        return results


def _is_plain_greedy(request: EngineRequest) -> bool:
    sampling = request.sampling
    return (
        sampling.temperature < _LEAST_TEMPERATURE
        and request.penalties is None
        and request.constraint is None
        and sampling.num_logprobs < 0
    )


def _most_likely(logits_SV: torch.Tensor) -> tuple[list[int], list[float]]:
    """Return each row's most likely token and its logit, which is NaN if any logit of the row is."""
    if logits_SV.device.type == "cpu":
        # numpy's argmax takes a tenth of torch's time here, and gives ties to the lower id.
        rows_SV = logits_SV.numpy()
        best_S = rows_SV.argmax(axis=1)
        return best_S.tolist(), rows_SV[np.arange(len(best_S)), best_S].tolist()
    values_S, indices_S = logits_SV.max(dim=1)
    return indices_S.tolist(), values_S.tolist()


def _sample_row(row_V: Float32Row, request: EngineRequest) -> Sampled:
    sampling, constraint = request.sampling, request.constraint
    if request.penalties is not None or constraint is not None:
        row_V = row_V.copy()
    if request.penalties is not None:
        request.penalties.apply(row_V, request.token_ids, request.num_prompt_tokens)
    try:
        if constraint is not None and not _constrain(row_V, request):
            return Sampled(NO_TOKEN)
        if sampling.temperature < _LEAST_TEMPERATURE:
            token_id = int(row_V.argmax())
        else:
            token_id = draw(row_V, sampling, uniform(sampling.seed, request.num_generated_tokens))
        if constraint is not None and token_id not in request.stop_token_ids:
            constraint.advance(token_id)
    except ConstraintError as error:
        return Sampled(NO_TOKEN, error=f"the grammar stopped this answer: {error}")
    if sampling.num_logprobs < 0:
        return Sampled(token_id)
    logprobs = token_logprobs(row_V, token_id, sampling.num_logprobs)
    if constraint is not None:
        # What a grammar forbids is no alternative.
        top = [entry for entry in logprobs.top if entry[1] > _LEAST_LOGPROB]
        logprobs = TokenLogprobs(logprobs.logprob, top)
    return Sampled(token_id, logprobs)


def _constrain(row_V: Float32Row, request: EngineRequest) -> bool:
    """Mask the row with the request's grammar; say whether a token is left. Raises ConstraintError.

    None is left where the answer is complete, or where only an end is allowed that min_tokens or ignore_eos
    forbid: no token obeys both, and what the grammar says is what the answer was asked to be.
    """
    constraint = request.constraint
    assert constraint is not None
    assert constraint.num_advanced == request.num_generated_tokens, f"{constraint!r} of {request!r}"
    constraint.mask(row_V, request.end_token_ids)
    if row_V.max() > -np.inf:
        return True
    if constraint.can_end:
        return False
    raise ConstraintError("no token of this model's vocabulary can continue it")


def draw(row_V: Float32Row, sampling: SamplingParams, u: float) -> int:
    """Return the token at quantile `u` of the filtered distribution, most likely tokens first.

    Filters, each on what the one before left: top_k tokens; the fewest that hold top_p of the mass
    (arXiv:1904.09751); those at least min_p times as likely as the likeliest (arXiv:2407.01082).
    """
    temperature = sampling.temperature
    highest = float(row_V.max())
    if sampling.top_k:
        ids = most_likely_ids(row_V, highest, sampling.top_k)
        place = _quantile(_weights(row_V[ids], highest, temperature), None, sampling, u)
        assert place is not None
        return int(ids[place])
    total = _total_weight(row_V, highest, temperature)
    near = np.flatnonzero(row_V >= highest - _NEAR_SPAN * temperature)
    near_logits = row_V[near]
    spans = _SPANS if len(near) > _FEW else _SPANS[_SPANS.index(_NEAR_SPAN) :]
    for span in spans:
        least = highest - span * temperature
        ids = near[near_logits >= least] if span <= _NEAR_SPAN else np.flatnonzero(row_V >= least)
        logits = row_V[ids]
        # ids rise, and the sort is stable: ties go to the lower id.
        order = np.argsort(-logits, kind="stable")
        weights = _weights(logits[order], highest, temperature)
        place = _quantile(weights, None if math.isinf(span) else total, sampling, u)
        if place is not None:
            return int(ids[order[place]])
    raise AssertionError("the whole distribution holds every quantile")


def most_likely_ids(row_V: Float32Row, highest: float, count: int) -> NDArray[np.int64]:
    """Return the `count` most likely tokens (all, if there are fewer), most likely first."""
    count = min(count, len(row_V))
    for span in (_NEAR_SPAN, 2 * _NEAR_SPAN, math.inf):
        ids = np.flatnonzero(row_V >= highest - span)
        if len(ids) >= count:
            break
    logits = row_V[ids]
    if len(ids) > 4 * count:
        least = np.partition(logits, len(ids) - count)[len(ids) - count]
        # All that tie with the last one stay: the sort below chooses the lower ids.
        ids = ids[logits >= least]
        logits = row_V[ids]
    return ids[np.argsort(-logits, kind="stable")[:count]]


def _total_weight(row_V: Float32Row, highest: float, temperature: float) -> float:
    """Return the sum of all weights. Single exponentials, summed in double, are as exact as the logits."""
    weights_V = row_V - np.float32(highest)
    weights_V *= np.float32(1.0 / temperature)
    np.exp(weights_V, out=weights_V)
    return float(weights_V.sum(dtype=np.float64))


def _weights(logits: Float32Row, highest: float, temperature: float) -> Float64Row:
    weights: Float64Row = np.exp((logits.astype(np.float64) - highest) / temperature)
    return weights


def _quantile(weights: Float64Row, total: float | None, sampling: SamplingParams, u: float) -> int | None:
    """Return the place of quantile `u` after top_p and min_p, or None if it may lie past these tokens.

    `weights`: of the most likely tokens, falling. `total`: the mass of all tokens; None: these are all.
    """
    cumulative = weights.cumsum()
    count = len(weights)
    is_cut = total is None  # Whether all that the filters keep is among these tokens.
    mass = float(cumulative[-1]) if total is None else total
    if sampling.top_p < 1.0:
        enough = int(cumulative.searchsorted(sampling.top_p * mass)) + 1
        if enough <= count:
            count, is_cut = enough, True
    if sampling.min_p > 0.0:
        likely = int((-weights[:count]).searchsorted(-sampling.min_p, side="right"))
        if likely < count:
            count, is_cut = likely, True
    if is_cut:
        mass = float(cumulative[count - 1])
    elif sampling.top_p < 1.0:
        return None
    place = int(cumulative[:count].searchsorted(u * mass, side="right"))
    if place < count:
        return place
    return count - 1 if is_cut else None


def token_logprobs(row_V: Float32Row, token_id: int, num_top: int) -> TokenLogprobs:
    """Return the log-softmax of `row_V` at `token_id` and at its `num_top` most likely tokens."""
    highest = float(row_V.max())
    log_sum = highest + math.log(_total_weight(row_V, highest, 1.0))
    logprob = max(float(row_V[token_id]) - log_sum, _LEAST_LOGPROB)
    if num_top == 0:
        return TokenLogprobs(logprob)
    ids = most_likely_ids(row_V, highest, num_top)
    logprobs = np.maximum(row_V[ids].astype(np.float64) - log_sum, _LEAST_LOGPROB)
    return TokenLogprobs(logprob, list(zip(ids.tolist(), logprobs.tolist())))
