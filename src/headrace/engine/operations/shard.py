"""Which part of a model each rank has: ranges of heads and of output channels. Pure.

Every matrix is cut by rows, its output channels, and never by columns: no number is summed over ranks
(ADR 32). Must not know processes, tensors or arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.engine.model_files.metadata import Hyperparameters
from headrace.errors import ConfigError

_CHANNELS = 32
"""Rows of hidden size and vocabulary are cut between so many: an int8 panel."""
_INNER_CHANNELS = 16
"""The same for the MLP's inner rows: gate and up share a panel."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part. Ranges are half-open; together the ranks' cover the model, KV heads perhaps twice."""

    rank: int
    num_ranks: int
    heads: range
    kv_heads: range
    hidden: range
    """Output channels of o and down."""
    inner: range
    """Output channels of gate and up."""
    vocab: range
    """Rows of the embedding and of the head."""
    head_dim: int

    @property
    def is_whole(self) -> bool:
        return self.num_ranks == 1

    @property
    def name(self) -> str:
        """Tells this part from others of the same model; empty for the whole."""
        return "" if self.is_whole else f"rank {self.rank} of {self.num_ranks}"

    def rows(self, tensor: str) -> range | None:
        """Rows of the tensor with this canonical name (`weights.names`) that are this rank's; None: all."""
        match tensor.rpartition(".")[2]:
            case "q":
                return _times(self.heads, self.head_dim)
            case "k" | "v":
                return _times(self.kv_heads, self.head_dim)
            case "o" | "down":
                return self.hidden
            case "gate" | "up":
                return self.inner
            case "embedding" | "output":
                return self.vocab
        return None


def cut(h: Hyperparameters, num_ranks: int) -> list[Shard]:
    """Cut a model into parts as even as heads and channels allow. Raises ConfigError where a rank would have
    none."""
    most = min(
        h.num_heads,
        -(-h.hidden_size // _CHANNELS),
        -(-h.intermediate_size // _INNER_CHANNELS),
        -(-h.vocab_size // _CHANNELS),
    )
    if not 1 <= num_ranks <= most:
        raise ConfigError(
            [
                f"tensor_parallel is {num_ranks}; this model has {h.num_heads} heads on {h.num_kv_heads} KV "
                f"heads: it must be 1 to {most}, and is most even where it divides {h.num_kv_heads} or "
                f"{h.num_heads}"
            ]
        )
    heads = _cut_heads(h, num_ranks)
    return [
        Shard(
            rank,
            num_ranks,
            *heads[rank],
            hidden=_part(h.hidden_size, _CHANNELS, rank, num_ranks),
            inner=_part(h.intermediate_size, _INNER_CHANNELS, rank, num_ranks),
            vocab=_part(h.vocab_size, _CHANNELS, rank, num_ranks),
            head_dim=h.head_dim,
        )
        for rank in range(num_ranks)
    ]


def column_starts(h: Hyperparameters, num_ranks: int) -> dict[str, list[int]]:
    """Of rows that ranks make together (`operations.exchange`): the ranks' first columns, and the width."""
    shards = cut(h, num_ranks)
    return {
        "attended": [*(each.heads.start * h.head_dim for each in shards), h.num_heads * h.head_dim],
        "inner": [*(each.inner.start for each in shards), h.intermediate_size],
        "output": [*(each.hidden.start for each in shards), h.hidden_size],
        "logits": [*(each.vocab.start for each in shards), h.vocab_size],
    }


def whole(h: Hyperparameters) -> Shard:
    """The only part of a model that one process computes."""
    return cut(h, 1)[0]


def num_kv_heads_of_all(h: Hyperparameters, num_ranks: int) -> int:
    """KV heads that all ranks keep together, copies included."""
    return sum(len(shard.kv_heads) for shard in cut(h, num_ranks))


def _cut_heads(h: Hyperparameters, num_ranks: int) -> list[tuple[range, range]]:
    """Each rank's heads and KV heads: whole groups of heads that share a KV head; or, with more ranks than KV
    heads, a part of one group and a copy of its KV head."""
    group = h.num_heads // h.num_kv_heads
    if num_ranks <= h.num_kv_heads:
        parts = [_part(h.num_kv_heads, 1, rank, num_ranks) for rank in range(num_ranks)]
        return [(_times(part, group), part) for part in parts]
    found = []
    for kv_head in range(h.num_kv_heads):
        sharing = len(_part(num_ranks, 1, kv_head, h.num_kv_heads))
        for index in range(sharing):
            part = _part(group, 1, index, sharing)
            first = kv_head * group
            found.append((range(first + part.start, first + part.stop), range(kv_head, kv_head + 1)))
    return found


def _part(size: int, unit: int, index: int, count: int) -> range:
    """The `index`-th of `count` parts of [0, size), cut between whole units; the first are the larger."""
    units = -(-size // unit)
    each, rest = divmod(units, count)
    first = index * each + min(index, rest)
    last = first + each + (index < rest)
    return range(min(first * unit, size), min(last * unit, size))


def _times(part: range, factor: int) -> range:
    return range(part.start * factor, part.stop * factor)
