"""Which replica holds which prefix, as far as the router knows: what replicas report, and what is on its way.

Owns one endpoint's index from prompt-head hashes to replicas, and its bounds. What a replica says changes its
own entries only, so one that reports nonsense misleads requests about itself alone. Pure; `now_s` comes in.
Must not know loads, costs or tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

MAX_PER_REPLICA = 32_768
"""Hashes remembered per replica: of 8 MiB of short prompts, two million tokens, and more of long ones."""
MAX_IN_ALL = 131_072
"""Over all replicas of an endpoint, about 40 MB; with many each may have fewer than MAX_PER_REPLICA."""
EXPECTED_S = 10.0
"""How long a bound request's prefix counts as cached without the replica having said so."""
_PURGE_PERIOD_S = 1.0
_MAX_SETS = 4096
"""Sets of replicas whose names are kept spelled out."""


class _Holder:
    """One replica's part of the index."""

    __slots__ = ("bit", "epoch", "expected", "has_reported", "held")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.epoch: Hashable = None
        self.has_reported = False
        self.held: OrderedDict[int, None] = OrderedDict()
        """Reported by the replica; least recently used first."""
        self.expected: OrderedDict[int, float] = OrderedDict()
        """Bound there and not reported yet -> when that stops counting; in the order of that time."""


class PrefixIndex:
    """Answers how much of a prompt each replica holds. A lookup takes time in proportion to the prompt."""

    def __init__(
        self,
        max_per_replica: int = MAX_PER_REPLICA,
        max_in_all: int = MAX_IN_ALL,
        expected_s: float = EXPECTED_S,
    ) -> None:
        self._max_per_replica = max_per_replica
        self._max_in_all = max_in_all
        self._expected_s = expected_s
        self._holders: dict[str, _Holder] = {}
        self._names: list[str | None] = []
        """Replica of each bit; None: the bit is free."""
        self._masks: dict[int, int] = {}
        """Hash -> bits of the replicas that hold it."""
        self._members: dict[int, list[str]] = {}
        """Replicas of some sets of bits: spelled out once, until a replica comes or goes."""
        self._next_purge_s = 0.0

    def __len__(self) -> int:
        """Distinct hashes known."""
        return len(self._masks)

    def __repr__(self) -> str:
        return f"<PrefixIndex {len(self._masks)} hashes, {len(self._holders)} replicas>"

    def match(self, hashes: Sequence[int], now_s: float) -> dict[str, int]:
        """Return how many leading blocks each replica holds, for those that hold any."""
        if now_s >= self._next_purge_s:
            self._purge(now_s)
        masks = self._masks
        found: dict[str, int] = {}
        alive = masks.get(hashes[0], 0) if hashes else 0
        num = 0
        for block_hash in hashes:
            mask = masks.get(block_hash, 0) & alive
            if mask != alive:
                self._name(found, alive & ~mask, num)
                alive = mask
            if not alive:
                return found
            num += 1
        self._name(found, alive, num)
        return found

    def is_reporting(self, replica_id: str) -> bool:
        """Whether the replica says what it holds: then what it does not say, it does not hold."""
        holder = self._holders.get(replica_id)
        return holder is not None and holder.has_reported

    def expect(self, replica_id: str, hashes: Iterable[int], now_s: float) -> None:
        """Note that a prompt is on its way to a replica."""
        holder = self._holder(replica_id)
        held, expected, bit, masks = holder.held, holder.expected, holder.bit, self._masks
        end_s = now_s + self._expected_s
        for block_hash in hashes:
            if block_hash in held:
                held.move_to_end(block_hash)
            elif block_hash in expected:
                expected[block_hash] = end_s
                expected.move_to_end(block_hash)
            else:
                expected[block_hash] = end_s
                masks[block_hash] = masks.get(block_hash, 0) | bit
        self._trim(holder)

    def report(self, replica_id: str, epoch: Hashable, added: Sequence[int], removed: Sequence[int]) -> None:
        """Take what a replica says. Another `epoch` than before: all that it said before is void."""
        holder = self._holder(replica_id)
        if holder.epoch != epoch:
            holder.epoch = epoch
            self._clear(holder, holder.held)
        held, expected, bit, masks = holder.held, holder.expected, holder.bit, self._masks
        for block_hash in removed:
            # A hash is in one of the two at most, and its bit is set while it is in one.
            if block_hash in held:
                del held[block_hash]
            elif block_hash in expected:
                del expected[block_hash]
            else:
                continue
            mask = masks[block_hash] ^ bit
            if mask:
                masks[block_hash] = mask
            else:
                del masks[block_hash]
        for block_hash in added[-self._max_per_replica :]:
            if block_hash in held:
                held.move_to_end(block_hash)
                continue
            held[block_hash] = None
            if block_hash in expected:
                del expected[block_hash]
            else:
                masks[block_hash] = masks.get(block_hash, 0) | bit
        if added:
            holder.has_reported = True
        self._trim(holder)

    def forget(self, replica_id: str) -> None:
        """The replica is gone."""
        holder = self._holders.pop(replica_id, None)
        if holder is not None:
            self._clear(holder, holder.held)
            self._clear(holder, holder.expected)
            self._names[holder.bit.bit_length() - 1] = None
            self._members.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError unless the two directions agree and the bounds hold."""
        back: dict[int, int] = {}
        for name, holder in self._holders.items():
            assert self._names[holder.bit.bit_length() - 1] == name, f"{name} has another's bit"
            both = holder.held.keys() & holder.expected.keys()
            assert not both, f"{name}: {len(both)} hashes are held and expected"
            assert len(holder.held) + len(holder.expected) <= self._limit(), f"{name} is over its bound"
            for block_hash in (*holder.held, *holder.expected):
                back[block_hash] = back.get(block_hash, 0) | holder.bit
        assert back == self._masks, f"{len(back)} hashes by replica, {len(self._masks)} by hash"

    def _holder(self, replica_id: str) -> _Holder:
        holder = self._holders.get(replica_id)
        if holder is None:
            self._members.clear()
            if None in self._names:
                position = self._names.index(None)
                self._names[position] = replica_id
            else:
                position = len(self._names)
                self._names.append(replica_id)
            holder = self._holders[replica_id] = _Holder(1 << position)
            for other in self._holders.values():
                self._trim(other)  # each one's share got smaller
        return holder

    def _name(self, found: dict[str, int], bits: int, num: int) -> None:
        if num and bits:
            members = self._members.get(bits)
            if members is None:
                if len(self._members) >= _MAX_SETS:
                    self._members.clear()
                named = [name for position, name in enumerate(self._names) if bits >> position & 1]
                members = self._members[bits] = [name for name in named if name is not None]
            for name in members:
                found[name] = num

    def _limit(self) -> int:
        return min(self._max_per_replica, max(1, self._max_in_all // max(1, len(self._holders))))

    def _trim(self, holder: _Holder) -> None:
        held, expected = holder.held, holder.expected
        num_over = len(held) + len(expected) - self._limit()
        for _ in range(num_over):
            block_hash, _when = (held or expected).popitem(last=False)
            self._unset(block_hash, holder.bit)

    def _purge(self, now_s: float) -> None:
        self._next_purge_s = now_s + _PURGE_PERIOD_S
        for holder in self._holders.values():
            expected = holder.expected
            while expected and next(iter(expected.values())) <= now_s:
                self._unset(expected.popitem(last=False)[0], holder.bit)

    def _clear(self, holder: _Holder, hashes: OrderedDict[int, None] | OrderedDict[int, float]) -> None:
        for block_hash in hashes:
            self._unset(block_hash, holder.bit)
        hashes.clear()

    def _unset(self, block_hash: int, bit: int) -> None:
        mask = self._masks[block_hash] & ~bit
        if mask:
            self._masks[block_hash] = mask
        else:
            del self._masks[block_hash]
