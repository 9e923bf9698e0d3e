"""From one row of logits to a token: the definition, in numpy. `kernels/sampling.cpp` gives the same tokens.

A token's weight is e^((logit - highest) / temperature) as a whole number, in units of 2^-44 of the likeliest
one's: so sums are exact in any order, on any number of threads. Tokens are in the order of their logits, ties
by their ids; a token is at the quantile that its place gives. Owns the random numbers, a pure function of
(seed, index). Must not know requests, penalties or batches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.api.messages import SamplingParams, TokenLogprobs

Float32Row = NDArray[np.float32]
Int64Row = NDArray[np.int64]
_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""

UNIT_BITS = 44
"""The likeliest token's weight is 2^44; a quarter of a million such still fit into 64 bits."""
_LOG2_E = 1.4426950408889634
_LEAST_LOG2 = np.float32(-60.0)
"""Tokens less likely by 2^-60 weigh as little as this: nothing, when rounded."""
_ROUNDER = np.float32(12582912.0)
"""1.5 * 2^23: adding it leaves no place for a fraction, so that a float is rounded to a whole number."""
_POLYNOMIAL = (0.693147004, 0.240222424, 0.0555073358, 0.00967151299, 0.00132647238)
"""2^f for f in [-0.5, 0.5] is about 1 + 0.693 f + 0.240 f^2 + ..., to 1e-7: a minimax fit of the relative
error with p(0) = 1 (iteratively reweighted least squares over 4,001 Chebyshev points)."""
_COEFFICIENTS = tuple(np.float32(value) for value in _POLYNOMIAL)
_LOWEST = -3.4e38
_PIECE = 8192
"""Logits weighed at a time: their intermediate results stay in the cache, in memory that is used again."""
_SPANS = (1.0, 2.0, 4.0, 8.0, 12.0, math.inf)
"""Tokens at least e^-span times as likely as the likeliest are tried first: sorting few is cheap, and they
nearly always hold what is looked for. Changes no result."""


class _Ordered(NamedTuple):
    """The most likely tokens, most likely first, and the sums of their weights up to and including each."""

    ids: NDArray[np.int64]
    cumulative: Int64Row


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


def weights(row_V: Float32Row, highest: float, temperature: float) -> Int64Row:
    """Return each token's weight, a whole number of 0 to 2^44. Each operation rounds to float32, and none is
    fused with another: so C++ gets the same bits."""
    scale = np.float32(_LOG2_E / temperature)
    weights_V = np.empty(len(row_V), np.int64)
    with np.errstate(over="ignore", invalid="ignore"):  # minus infinity times a scale of 0
        for begin in range(0, len(row_V), _PIECE):
            piece = slice(begin, begin + _PIECE)
            _weigh((row_V[piece] - np.float32(highest)) * scale, weights_V[piece])
    return weights_V


def _weigh(log2: Float32Row, out: Int64Row) -> None:
    """Write the weights of tokens that are 2^log2 times as likely as the likeliest one."""
    np.fmax(log2, _LEAST_LOG2, out=log2)
    whole = log2 + _ROUNDER
    fraction = log2
    fraction -= whole - _ROUNDER
    power = fraction * _COEFFICIENTS[-1]
    for coefficient in reversed(_COEFFICIENTS[:-1]):
        power += coefficient
        power *= fraction
    power += np.float32(1.0)
    # The low bits of `whole` are the whole number: they are added to the exponent, and so are the units.
    bits = power.view(np.int32)
    bits += (whole.view(np.int32) << 23) + np.int32(UNIT_BITS << 23)
    np.rint(power, out=power)
    out[:] = power


def draw(row_V: Float32Row, sampling: SamplingParams, u: float) -> int:
    """Return the token at quantile `u` of the filtered distribution, most likely tokens first.

    Filters, each on what the one before left: top_k tokens; the fewest that hold top_p of the mass
    (arXiv:1904.09751); those at least min_p times as likely as the likeliest (arXiv:2407.01082).
    Raises AssertionError for a row without a finite highest logit.
    """
    highest = float(row_V.max())
    weights_V = weights(row_V, highest, sampling.temperature)
    mass = int(weights_V.sum())
    reach = sampling.temperature
    if sampling.top_k:
        ordered = _most_likely(row_V, weights_V, highest, reach, min(sampling.top_k, len(row_V)), 0)
        mass = int(ordered.cumulative[min(sampling.top_k, len(row_V)) - 1])
    if sampling.top_p < 1.0:
        enough = min(max(1, math.ceil(sampling.top_p * mass)), mass)
        ordered = _most_likely(row_V, weights_V, highest, reach, 1, enough)
        mass = int(ordered.cumulative[ordered.cumulative.searchsorted(enough)])
    if sampling.min_p > 0.0:
        least = math.ceil(sampling.min_p * (1 << UNIT_BITS))
        mass = min(mass, int(weights_V[weights_V >= least].sum()))
    target = min(int(u * mass), mass - 1)
    ordered = _most_likely(row_V, weights_V, highest, reach, 1, target + 1)
    return int(ordered.ids[ordered.cumulative.searchsorted(target, side="right")])


def most_likely_ids(row_V: Float32Row, highest: float, count: int) -> NDArray[np.int64]:
    """Return the `count` most likely tokens (all, if there are fewer), most likely first."""
    count = min(count, len(row_V))
    ids = _most_likely(row_V, None, highest, 1.0, count, 0).ids
    return ids[:count]


def token_logprobs(row_V: Float32Row, token_id: int, num_top: int) -> TokenLogprobs:
    """Return the log-softmax of `row_V` at `token_id` and at its `num_top` most likely tokens."""
    highest = float(row_V.max())
    mass = int(weights(row_V, highest, 1.0).sum())
    ids = most_likely_ids(row_V, highest, num_top) if num_top else np.empty(0, np.int64)
    return logprobs_of(float(row_V[token_id]), ids, row_V[ids], highest, mass)


def logprobs_of(
    logit: float, top_ids: NDArray[np.integer], top_logits: Float32Row, highest: float, mass: int
) -> TokenLogprobs:
    """Return the log-probabilities of a token and of `top_ids`, from their logits, the row's highest one, and
    the mass of all weights at temperature 1."""
    log_sum = highest + math.log(mass / (1 << UNIT_BITS))
    logprob = max(logit - log_sum, LEAST_LOGPROB)
    if not len(top_ids):
        return TokenLogprobs(logprob)
    logprobs = np.maximum(top_logits.astype(np.float64) - log_sum, LEAST_LOGPROB)
    return TokenLogprobs(logprob, list(zip(top_ids.tolist(), logprobs.tolist())))


def _most_likely(
    row_V: Float32Row, weights_V: Int64Row | None, highest: float, reach: float, count: int, mass: int
) -> _Ordered:
    """Return the most likely tokens in order: at least `count` of them, which weigh at least `mass`."""
    for span in _SPANS:
        least = highest - span * reach
        ids = np.flatnonzero(row_V >= (least if least > _LOWEST else -math.inf))
        if len(ids) >= count and (weights_V is None or int(weights_V[ids].sum()) >= mass):
            break
    # ids rise, and the sort is stable: ties go to the lower id.
    ids = ids[np.argsort(-row_V[ids], kind="stable")]
    return _Ordered(ids, np.empty(0, np.int64) if weights_V is None else weights_V[ids].cumsum())
