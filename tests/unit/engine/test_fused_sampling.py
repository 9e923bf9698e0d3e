"""The compiled sampler gives the tokens of `distribution`, on every instruction set, in any batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.api.messages import GenerationRequest, SamplingParams
from headrace.engine.distribution import draw, token_logprobs, uniform
from headrace.engine.fused_sampling import NONE_ALLOWED, FusedSampling
from headrace.engine.operations.kernels import KernelsMissing, Library, load_kernels
from headrace.engine.request import EngineRequest
from headrace.engine.sample_settings import RowSettings
from headrace.engine.sampler import Sampler

Row = NDArray[np.float32]
LEVELS = {"portable": 0, "avx2": 1, "avx512-vnni": 2}


def make_library() -> Library:
    try:
        return load_kernels()
    except KernelsMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(params=list(LEVELS))
def fused(request: pytest.FixtureRequest) -> Iterator[FusedSampling]:
    """The sampler on one instruction set."""
    library = make_library()
    library.limit_isa(LEVELS[request.param])
    if library.isa != request.param:
        library.limit_isa(2)
        pytest.skip(f"this processor has no {request.param}")
    yield FusedSampling(library)
    library.limit_isa(2)


def expected_token(row_V: Row, sampling: SamplingParams, index: int) -> int:
    if sampling.temperature < 1e-5:
        return int(row_V.argmax())
    return draw(row_V, sampling, uniform(sampling.seed, index))


def tokens(
    fused: FusedSampling,
    row_V: Row,
    samplings: list[SamplingParams],
    mask: NDArray[np.int32] | None = None,
    *,
    are_checked: bool = False,
) -> list[int]:
    """One token for each sampling, all from one row; `mask`: words of bits."""
    settings = [RowSettings(sampling) for sampling in samplings]
    masks = [] if mask is None else [mask.ctypes.data] * len(samplings)
    indices = list(range(len(samplings)))
    return fused.choose(
        row_V[None],
        [0] * len(settings),
        [s.address for s in settings],
        indices,
        masks,
        are_checked=are_checked,
    )


# ---- rows of every kind ----------------


def make_row(kind: str, size: int, seed: int) -> Row:
    """`kind`: how the logits lie."""
    source = np.random.default_rng(seed)
    normal = source.standard_normal(size)
    match kind:
        case "flat":
            row = np.zeros(size)
        case "steps":
            row = np.floor(normal * 2)  # many ties
        case "steep":
            row = normal * 40
        case "one":
            row = np.where(np.arange(size) == size // 2, 50.0, normal)
        case "near ties":
            row = 10.0 + np.arange(size) % 7 * 2.0**-20
        case "masked":
            row = np.where(source.random(size) < 0.99, -np.inf, normal)
            row[source.integers(size)] = 1.0
        case "huge":
            row = normal * 1e38
        case "tiny":
            row = normal * 1e-40
        case _:
            row = normal * 3
    return np.clip(row, -3.4e38, 3.4e38).astype(np.float32) if kind == "huge" else row.astype(np.float32)


KINDS = ["normal", "flat", "steps", "steep", "one", "near ties", "masked", "huge", "tiny"]
SAMPLINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-5, 0.01, 0.3, 0.7, 1.0, 1.5, 20.0, 1e6, 1e300]),
    top_p=st.one_of(st.just(1.0), st.floats(1e-9, 1.0), st.sampled_from([5e-324, 0.9, 0.999999999])),
    min_p=st.one_of(st.just(0.0), st.sampled_from([5e-324, 1e-9, 0.05, 1.0]), st.floats(0, 1)),
    top_k=st.one_of(st.just(0), st.integers(1, 60), st.integers(1, 10_000)),
    seed=st.integers(-(2**63), 2**64 - 1),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 2, 15, 16, 17, 255, 256, 257, 1000, 4096, 5003]),
    seed=st.integers(0, 1 << 30),
    samplings=st.lists(SAMPLINGS, min_size=1, max_size=6),
)
@example(kind="flat", size=4096, seed=0, samplings=[SamplingParams(seed=s) for s in range(6)])
@pytest.mark.slow
def test_the_token_is_that_of_the_definition_whatever_the_row_and_the_setting(
    fused: FusedSampling, kind: str, size: int, seed: int, samplings: list[SamplingParams]
) -> None:
    row_V = make_row(kind, size, seed)
    before = row_V.copy()
    got = tokens(fused, row_V, samplings)
    assert got == [expected_token(row_V, sampling, i) for i, sampling in enumerate(samplings)]
    assert np.array_equal(row_V, before)
    assert (row_V[got] > -np.inf).all()


@pytest.mark.slow
def test_of_a_real_vocabulary_every_quantile_gives_the_definitions_token(fused: FusedSampling) -> None:
    for scale in (0.1, 2.0, 5.0):
        row_V = (np.random.default_rng(7).standard_normal(49_152) * scale).astype(np.float32)
        samplings = [SamplingParams(top_p=p, seed=s) for p in (1.0, 0.9) for s in range(8)]
        assert tokens(fused, row_V, samplings) == [
            expected_token(row_V, sampling, i) for i, sampling in enumerate(samplings)
        ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 31, 32, 33, 257, 1000, 5003]),
    share=st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.999, 1.0]),
    seed=st.integers(0, 1 << 30),
    samplings=st.lists(SAMPLINGS, min_size=1, max_size=4),
)
def test_a_mask_leaves_the_tokens_that_the_definition_gives_for_the_allowed_ones(
    fused: FusedSampling, kind: str, size: int, share: float, seed: int, samplings: list[SamplingParams]
) -> None:
    row_V = make_row(kind, size, seed)
    allowed = np.random.default_rng(seed).random(size) < share
    # Bits behind the vocabulary's end are set: they must not matter.
    bits = np.concatenate([allowed, np.ones(-size % 32, bool)])
    words = np.packbits(bits, bitorder="little").view(np.int32)
    masked_V = np.where(allowed, row_V, np.float32(-np.inf))
    before = row_V.copy()
    got = tokens(fused, row_V, samplings, words)
    if masked_V.max() == -np.inf:
        assert got == [NONE_ALLOWED] * len(samplings)
    else:
        assert got == [expected_token(masked_V, sampling, i) for i, sampling in enumerate(samplings)]
    assert tokens(fused, row_V, samplings, words, are_checked=True) == got
    assert np.array_equal(row_V, before)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KINDS), st.integers(1, 3000), st.integers(0, 1000), st.integers(0, 64))
def test_log_probabilities_and_the_likeliest_tokens_are_those_of_the_definition(
    fused: FusedSampling, kind: str, size: int, seed: int, num_top: int
) -> None:
    row_V = make_row(kind, size, seed)
    for temperature in (0.0, 0.8):
        sampling = SamplingParams(temperature=temperature, num_logprobs=num_top, seed=seed)
        request = EngineRequest(GenerationRequest("r", [0], sampling), 0, frozenset(), 4096)
        (sampled,) = Sampler(fused).sample(torch.from_numpy(row_V)[None], [request])
        assert sampled.token_id == expected_token(row_V, sampling, 0)
        assert sampled.logprobs == token_logprobs(row_V, sampled.token_id, num_top)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 30),
    num_tokens=st.integers(1, 200),
    repetition=st.sampled_from([1.0, 1.1, 0.7]),
    frequency=st.sampled_from([0.0, 0.3, -0.2]),
    presence=st.sampled_from([0.0, 0.6]),
    num_biases=st.integers(0, 5),
    min_tokens=st.integers(0, 120),
)
def test_penalties_change_a_row_as_their_definition_does_step_after_step(
    fused: FusedSampling,
    seed: int,
    num_tokens: int,
    repetition: float,
    frequency: float,
    presence: float,
    num_biases: int,
    min_tokens: int,
) -> None:
    source = np.random.default_rng(seed)
    size = 700
    sampling = SamplingParams(
        temperature=0.9 * (seed % 2),
        seed=seed,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias={int(i): float(source.normal()) for i in source.permutation(size)[:num_biases]},
        min_tokens=min_tokens,
        num_logprobs=4,
        max_tokens=1000,
    )

    def make_request() -> EngineRequest:
        prompt = (np.arange(300) * 7 % 211).tolist()
        return EngineRequest(GenerationRequest("r", prompt, sampling), 0, frozenset({3, 5}), 4096)

    compiled, plain = make_request(), make_request()
    for step in range(num_tokens):
        if step % 5 == 0:
            row_V = make_row("normal", size, seed + step)[None]
            logits = torch.from_numpy(row_V)
            assert Sampler(fused).sample(logits, [compiled]) == Sampler().sample(logits, [plain])
        for each in (compiled, plain):
            each.token_ids.append((step * step) % 97)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 300, 999])
def test_a_row_that_is_not_finite_gives_no_token(fused: FusedSampling, bad: float, place: int) -> None:
    row_V = make_row("normal", 1000, 1)
    row_V[place] = bad
    assert tokens(fused, row_V, [SamplingParams(temperature=0.0), SamplingParams()]) == [-1, -1]
    assert tokens(fused, np.full(20, -np.inf, np.float32), [SamplingParams()]) == [-1]


# ---- what must not matter ----------------


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_neither_threads_nor_the_batch_nor_its_order_change_a_token(num_threads: int) -> None:
    library = make_library()
    team = library.start_team(num_threads)
    alone, together = FusedSampling(library), FusedSampling(library, team)
    rows = np.stack([make_row(kind, 5000, i) for i, kind in enumerate(KINDS * 12)])
    samplings = [SamplingParams(seed=i, top_p=0.95 if i % 2 else 1.0, top_k=i % 5) for i in range(len(rows))]
    settings = [RowSettings(sampling) for sampling in samplings]
    addresses = [each.address for each in settings]
    places = list(range(len(rows)))
    one_by_one = [alone.choose(rows, [i], [addresses[i]], [i])[0] for i in places]
    assert together.choose(rows, places, addresses, places) == one_by_one
    assert together.choose(rows, places[::-1], addresses[::-1], places[::-1]) == one_by_one[::-1]
    team.stop()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_with_penalties_and_in_any_places_are_sampled_as_numpy_does(data: st.DataObject) -> None:
    fused = FusedSampling(make_library())
    parameters = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        logit_bias=st.sampled_from([{}, {3: 4.0}]),
        num_logprobs=st.sampled_from([-1, 0, 3]),
        seed=st.integers(0, 1 << 40),
    )
    samplings = data.draw(st.lists(parameters, min_size=1, max_size=6))
    logits = torch.from_numpy(np.stack([make_row("normal", 700, i) for i in range(10)]))
    logits[4, 100] = math.nan
    places = data.draw(st.permutations(range(10)))[: len(samplings)]

    def requests() -> list[EngineRequest]:
        return [
            EngineRequest(GenerationRequest("r", [1, 2], s, resume_from=[3]), 0, frozenset({9}), 4096)
            for s in samplings
        ]

    before = logits.clone()
    expected = Sampler().sample(logits, requests(), places)
    assert Sampler(fused).sample(logits, requests(), places) == expected
    assert logits.nan_to_num().equal(before.nan_to_num())
