"""The compiled attention: what plain torch gives, and the same bits whatever is in the step with a row."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engine.attention_rig import (
    KINDS,
    Attention,
    Floats,
    Model,
    Part,
    exp2,
    expected,
    random_qkv,
)

from headrace.engine.operations.kernels import KernelsMissing, Library, Team, load_kernels

MODELS = {
    "smollm2": Model(9, 3, 64),
    "gemma, sliding": Model(4, 1, 256, window=40, has_norms=True, scale=0.05),
    "no groups, blocks of 8": Model(2, 2, 128, block_size=8),
    "blocks of 128": Model(4, 2, 64, block_size=128, window=100),
    "odd head_dim, one KV head for 11": Model(11, 1, 80, block_size=32, has_norms=True),
}
TOLERANCE = {"float32": 2e-6, "bfloat16": 5e-3, "int8": 1.5e-2}
"""Of the outputs' norm. int8: rounding of keys and values by 1/254 of a head's largest number."""
NUM_BLOCKS = 96


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        return load_kernels()
    except KernelsMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(params=["portable", "avx2", "avx512-vnni"])
def any_library(library: Library, request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library with no more than some instructions; skipped where this machine has none of them."""
    library.limit_isa(["portable", "avx2", "avx512-vnni"].index(request.param))
    try:
        if library.isa != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield library
    finally:
        library.limit_isa(2)


@pytest.fixture(scope="module")
def team(library: Library) -> Iterator[Team]:
    team = library.start_team(2)
    yield team
    team.stop()


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread() -> Iterator[None]:
    """The yardstick's tiny products are fastest so."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def shuffled_blocks(model: Model, num_tokens: int, seed: int) -> list[int]:
    blocks = np.random.default_rng(seed).permutation(NUM_BLOCKS)
    return [int(block) for block in blocks[: -(-num_tokens // model.block_size)]]


def whole(library: Library, team: Team, model: Model, kind: str, qkv: Floats) -> Floats:
    """A context computed in one step, alone."""
    attention = Attention(library, team, model, kind, NUM_BLOCKS)
    return attention.step([Part(qkv, 0, len(qkv), shuffled_blocks(model, len(qkv), 0))])[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_it_equals_plain_attention(any_library: Library, team: Team, model: Model, kind: str) -> None:
    qkv = random_qkv(model, 150, seed=1)
    got, want = whole(any_library, team, model, kind, qkv), expected(model, qkv, 0, 150)
    assert np.linalg.norm(got - want) <= TOLERANCE[kind] * np.linalg.norm(want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_row_is_the_same_bits_however_its_context_came_into_the_cache(
    any_library: Library, team: Team, model: Model, kind: str
) -> None:
    qkv = random_qkv(model, 150, seed=2)
    attention = Attention(any_library, team, model, kind, NUM_BLOCKS)
    attention.cache[:] = 0xFF  # what a damaged request left: not a number, in every kind
    blocks = shuffled_blocks(model, 150, 3)
    rows = []
    cuts = [0, 1, 2, 5, 6, 63, 64, 97, 130, 149, 150]
    for start, end in pairwise(cuts):
        rows.append(attention.step([Part(qkv, start, end, blocks)])[0])
    np.testing.assert_array_equal(
        np.concatenate(rows).view(np.int32), whole(any_library, team, model, kind, qkv).view(np.int32)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_bits_in_any_company_and_with_any_number_of_threads(
    any_library: Library, kind: str
) -> None:
    model = MODELS["smollm2"]
    contexts = [random_qkv(model, length, seed) for seed, length in enumerate((1, 70, 33, 128, 17))]
    blocks = np.random.default_rng(0).permutation(NUM_BLOCKS).reshape(8, -1)
    parts = [Part(qkv, 0, len(qkv), list(map(int, row))) for qkv, row in zip(contexts, blocks, strict=False)]
    for num_threads in (1, 2, 3):
        team = any_library.start_team(num_threads)
        alone = [whole(any_library, team, model, kind, qkv) for qkv in contexts]
        attention = Attention(any_library, team, model, kind, NUM_BLOCKS)
        together = attention.step(parts)
        last_again = attention.step([Part(part.qkv, part.end - 1, part.end, part.blocks) for part in parts])
        team.stop()
        if num_threads == 1:
            first = alone
        for i in range(len(contexts)):
            for got, want in ((alone[i], first[i]), (together[i], first[i]), (last_again[i], first[i][-1:])):
                np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_steps_over_any_blocks_give_the_rows_of_each_context_alone(
    library: Library, team: Team, data: st.DataObject
) -> None:
    num_kv_heads = data.draw(st.sampled_from([1, 2, 3]))
    model = Model(
        num_kv_heads * data.draw(st.sampled_from([1, 2, 3, 5, 7])),
        num_kv_heads,
        data.draw(st.sampled_from([16, 64, 80, 128, 256])),
        window=data.draw(st.sampled_from([0, 0, 1, 9, 64, 65, 200])),
        has_norms=data.draw(st.booleans()),
        block_size=data.draw(st.sampled_from([8, 16, 32, 64, 128])),
    )
    kind = data.draw(st.sampled_from(list(KINDS)))
    lengths = data.draw(st.lists(st.integers(1, 140), min_size=1, max_size=4))
    contexts = [random_qkv(model, length, seed) for seed, length in enumerate(lengths)]
    free = [int(block) for block in np.random.default_rng(0).permutation(NUM_BLOCKS)]
    tables = [[free.pop() for _ in range(-(-length // model.block_size))] for length in lengths]
    attention = Attention(library, team, model, kind, NUM_BLOCKS)
    attention.cache[:] = 0xFF
    rows: list[list[Floats]] = [[] for _ in lengths]
    cuts = [
        sorted({0, *data.draw(st.lists(st.integers(1, length), max_size=4)), length}) for length in lengths
    ]
    joins_at = [data.draw(st.integers(0, 2)) for _ in lengths]
    for index in range(8):
        members = [i for i in range(len(lengths)) if 0 <= index - joins_at[i] < len(cuts[i]) - 1]
        spans = [cuts[i][index - joins_at[i] :][:2] for i in members]
        parts = [Part(contexts[i], *span, tables[i]) for i, span in zip(members, spans, strict=True)]
        for i, part_rows in zip(members, attention.step(parts) if parts else [], strict=True):
            rows[i].append(part_rows)
    for i, qkv in enumerate(contexts):
        alone = whole(library, team, model, kind, qkv)
        np.testing.assert_array_equal(np.concatenate(rows[i]).view(np.int32), alone.view(np.int32))
        want = expected(model, qkv, 0, len(qkv))
        assert np.linalg.norm(alone - want) <= 1.5 * TOLERANCE[kind] * np.linalg.norm(want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["key", "value"])
def test_a_token_that_is_not_a_number_is_seen_by_those_that_see_it_and_by_nobody_else(
    any_library: Library, team: Team, kind: str, column: str
) -> None:
    model = MODELS["smollm2"]
    qkv = random_qkv(model, 40, seed=4)
    damaged = qkv.copy()
    offset = (model.num_heads + (model.num_kv_heads if column == "value" else 0)) * model.head_dim
    damaged[20, offset : offset + model.num_kv_heads * model.head_dim] = np.nan
    attention = Attention(any_library, team, model, kind, NUM_BLOCKS)
    blocks = shuffled_blocks(model, 80, 5)
    got, neighbour = (
        np.concatenate([attention.step([Part(x, i, i + 1, own)])[0] for i in range(40)])
        for x, own in ((damaged, blocks[:3]), (qkv, blocks[2:]))
    )
    assert np.isfinite(got[:20]).all()
    assert np.isnan(got[20:]).any(axis=1).all()
    assert np.isfinite(neighbour).all()


def test_exp2_is_as_exact_as_stated(any_library: Library) -> None:
    x = np.concatenate([np.linspace(-124.9, 0, 1_000_001), [0.0, -200.0, -1e30, -np.inf, np.nan]])
    x = x.astype(np.float32)
    got, want = exp2(any_library, x), np.exp2(x.astype(np.float64))
    assert (np.abs(got[:-4] / want[:-4] - 1) < 2.5e-7).all()
    assert got[-5] == 1.0
    assert (got[-4:-1] == 0).all()
    assert np.isnan(got[-1])


@pytest.mark.parametrize(
    "model", [Model(3, 2, 64), Model(2, 1, 40), Model(2, 1, 272), Model(2, 1, 64, block_size=20)]
)
def test_shapes_that_it_cannot_serve_have_no_block_size(library: Library, team: Team, model: Model) -> None:
    with pytest.raises(AssertionError, match="do not serve"):
        Attention(library, team, model, "int8", 1)
