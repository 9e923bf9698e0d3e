"""Cutting a model into ranks' parts: everything once, as evenly as heads allow."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.model_files.metadata import Hyperparameters
from headrace.engine.operations.shard import Shard, cut, num_kv_heads_of_all, whole
from headrace.errors import ConfigError

SMOLLM2 = Hyperparameters("llama", 49152, 8192, 30, 576, 1536, 9, 3, 64, 1e-5, 1e5)
GEMMA3 = Hyperparameters("gemma3", 262144, 32768, 18, 640, 2048, 4, 1, 256, 1e-6, 1e6)


def heads(shards: list[Shard]) -> list[tuple[list[int], list[int]]]:
    return [(list(shard.heads), list(shard.kv_heads)) for shard in shards]


def test_kv_heads_go_in_whole_groups_the_larger_parts_first() -> None:
    assert heads(cut(SMOLLM2, 2)) == [([0, 1, 2, 3, 4, 5], [0, 1]), ([6, 7, 8], [2])]
    assert heads(cut(SMOLLM2, 3)) == [([0, 1, 2], [0]), ([3, 4, 5], [1]), ([6, 7, 8], [2])]
    assert num_kv_heads_of_all(SMOLLM2, 2) == 3


def test_more_ranks_than_kv_heads_share_one_of_which_each_keeps_a_copy() -> None:
    assert heads(cut(GEMMA3, 2)) == [([0, 1], [0]), ([2, 3], [0])]
    assert heads(cut(GEMMA3, 3)) == [([0, 1], [0]), ([2], [0]), ([3], [0])]
    assert heads(cut(SMOLLM2, 4))[:2] == [([0, 1], [0]), ([2], [0])]
    assert num_kv_heads_of_all(GEMMA3, 3) == 3


def test_channels_are_cut_between_panels() -> None:
    first, second = cut(SMOLLM2, 2)
    assert (first.hidden, second.hidden) == (range(288), range(288, 576))
    assert (first.inner, second.inner) == (range(768), range(768, 1536))
    assert first.rows("layers.3.q") == range(384)
    assert second.rows("layers.3.v") == range(128, 192)
    assert second.rows("layers.0.down") == range(288, 576)
    assert second.rows("output") == range(24576, 49152)
    assert second.rows("layers.0.mlp_norm") is None
    assert (second.name, whole(SMOLLM2).name) == ("rank 1 of 2", "")


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(16, 300), st.integers(16, 300), st.integers(16, 300),
    st.data(),
)  # fmt: skip
def test_the_parts_are_the_whole_model_and_none_is_empty(
    num_kv_heads: int, group: int, hidden: int, inner: int, vocab: int, data: st.DataObject
) -> None:
    num_heads = num_kv_heads * group
    h = replace(
        SMOLLM2,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=vocab,
    )
    most = min(num_heads, -(-hidden // 32), -(-inner // 16), -(-vocab // 32))
    shards = cut(h, data.draw(st.integers(1, most)))
    for ranges, size in (
        ([shard.heads for shard in shards], num_heads),
        ([shard.hidden for shard in shards], hidden),
        ([shard.inner for shard in shards], inner),
        ([shard.vocab for shard in shards], vocab),
    ):
        assert [item for part in ranges for item in part] == list(range(size))
        assert all(ranges)
    for shard in shards:
        assert {head // group for head in shard.heads} == set(shard.kv_heads)
        assert len(shard.heads) % len(shard.kv_heads) == 0
    with pytest.raises(ConfigError, match=f"it must be 1 to {most}"):
        cut(h, most + 1)


def test_too_many_ranks_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(
        ConfigError, match="tensor_parallel is 10; this model has 9 heads on 3 KV heads: it must"
    ):
        cut(SMOLLM2, 10)
