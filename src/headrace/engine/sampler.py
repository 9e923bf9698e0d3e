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
from headrace.engine.penalties import Float32Row
from headrace.engine.request import EngineRequest

Float64Row = NDArray[np.float64]
_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_SPANS = (8.0, 16.0, math.inf)
"""Tokens at least e^-span times as likely as the likeliest are tried first: sorting few is cheap, and they
nearly always hold the quantile that is looked for."""
_LEAST_TEMPERATURE = 1e-5
"""Below it the most likely token is taken: dividing by less overflows, and changes nothing."""
_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""
NOT_FINITE = "the model gave logits that are not finite for this request; its generation ends here"


class Sampled(NamedTuple):
    """One row's result. `token_id` has no meaning when `error` is set."""

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

    def sample(self, logits_SV: torch.Tensor, requests: Sequence[EngineRequest]) -> list[Sampled]:
        """Return one result per row; row i belongs to requests[i]. `logits_SV` (float32) stays as it is."""
        if not requests:
            return []
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
        sampling.temperature < _LEAST_TEMPERATURE and request.penalties is None and sampling.num_logprobs < 0
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
    sampling = request.sampling
    if request.penalties is not None:
        row_V = row_V.copy()
        request.penalties.apply(row_V, request.token_ids, request.num_prompt_tokens)
    if sampling.temperature < _LEAST_TEMPERATURE:
        token_id = int(row_V.argmax())
    else:
        token_id = draw(row_V, sampling, uniform(sampling.seed, request.num_generated_tokens))
    if sampling.num_logprobs < 0:
        return Sampled(token_id)
    return Sampled(token_id, token_logprobs(row_V, token_id, sampling.num_logprobs))


def draw(row_V: Float32Row, sampling: SamplingParams, u: float) -> int:
    """Return the token at quantile `u` of the filtered distribution, most likely tokens first.

    Filters, each on what the one before left: top_k tokens; the fewest that hold top_p of the mass
    (arXiv:1904.09751); those at least min_p times as likely as the likeliest (arXiv:2407.01082).
    """
    highest = float(row_V.max())
    total = 0.0 if sampling.top_k else float(_weights(row_V, highest, sampling.temperature).sum())
    for span in _SPANS:
        least = highest - span * sampling.temperature
        ids = np.flatnonzero(row_V >= least) if span < math.inf else np.arange(len(row_V))
        logits = row_V[ids]
        # ids rise, and the sort is stable: ties go to the lower id.
        order = np.argsort(-logits, kind="stable")
        masses = _weights(logits[order], highest, sampling.temperature)
        place = _quantile(masses, len(ids) == len(row_V), total, sampling, u)
        if place is not None:
            return int(ids[order[place]])
    raise AssertionError("the whole distribution always holds its quantile")


def _weights(logits: Float32Row, highest: float, temperature: float) -> Float64Row:
    weights: Float64Row = np.exp((logits.astype(np.float64) - highest) / temperature)
    return weights


def _quantile(
    weights: Float64Row, is_whole: bool, total: float, sampling: SamplingParams, u: float
) -> int | None:
    """Return the place of quantile `u` among falling `weights`, or None if these are too few to tell.

    `total`: the mass of the whole row; not needed with top_k.
    """
    cumulative = np.cumsum(weights)
    count = len(weights)
    is_cut = is_whole  # Whether all tokens that the filters keep are among these.
    if sampling.top_k:
        if sampling.top_k <= count:
            count, is_cut = sampling.top_k, True
        if not is_cut:
            return None
        total = float(cumulative[count - 1])
    if sampling.top_p < 1.0:
        enough = int(np.searchsorted(cumulative[:count], sampling.top_p * total)) + 1
        if enough <= count:
            count, is_cut = enough, True
    if sampling.min_p > 0.0:
        likely = int(np.searchsorted(-weights[:count], -sampling.min_p, side="right"))
        if likely < count:
            count, is_cut = likely, True
    if sampling.top_p < 1.0 and not is_cut:
        return None
    mass = float(cumulative[count - 1]) if is_cut else total
    place = int(np.searchsorted(cumulative[:count], u * mass, side="right"))
    if place < count:
        return place
    return count - 1 if is_cut else None


def token_logprobs(row_V: Float32Row, token_id: int, num_top: int) -> TokenLogprobs:
    """Return the log-softmax of `row_V` at `token_id` and at its `num_top` most likely tokens."""
    highest = float(row_V.max())
    log_sum = highest + math.log(float(_weights(row_V, highest, 1.0).sum()))

    def logprob(token: int) -> float:
        return max(float(row_V[token]) - log_sum, _LEAST_LOGPROB)

    num_top = min(num_top, len(row_V))
    if num_top == 0:
        return TokenLogprobs(logprob(token_id))
    least = np.partition(row_V, len(row_V) - num_top)[len(row_V) - num_top]
    ids = np.flatnonzero(row_V >= least)
    ids = ids[np.argsort(-row_V[ids], kind="stable")][:num_top]
    return TokenLogprobs(logprob(token_id), [(token, logprob(token)) for token in ids.tolist()])
