"""Which replica holds which prefix, as far as the router knows: what replicas report, and what is on its way.

Owns one endpoint's index from prompt-head hashes to replicas, and its bounds. What a replica says changes its
own entries only, so one that reports nonsense misleads requests about itself alone. Pure; `now_s` comes in.
Must not know loads, costs or tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import islice

MAX_PER_REPLICA = 32_768
"""Hashes remembered per replica: of 8 MiB of short prompts, two million tokens, and more of long ones."""
MAX_IN_ALL = 131_072
"""Over all replicas of an endpoint, about 20 MB; with many each may have fewer than MAX_PER_REPLICA."""
EXPECTED_S = 10.0
"""How long a bound request's prefix counts as cached without the replica having said so."""
_PURGE_PERIOD_S = 1.0
_SLACK_DIVISOR = 8
"""At a bound an eighth is forgotten together: a dict's first keys are found slowly where others were deleted."""
_MAX_SETS = 4096
"""Sets of replicas whose names are kept spelled out."""


class _Holder:
    """One replica's part of the index. Each of its hashes is in one of the two, and its bit is set in the mask
    of each: the mask is looked at first, since a hash that was not used lately has to come from memory."""

    __slots__ = ("bit", "epoch", "expected", "has_reported", "held")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.epoch: Hashable = None
        self.has_reported = False
        self.held: dict[int, None] = {}
        """Reported by the replica; the newest last."""
        self.expected: dict[int, float] = {}
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
        self._limit = max_per_replica
        """Hashes that each replica may hold."""
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

    def expect(self, replica_id: str, hashes: Sequence[int], now_s: float) -> None:
        """Note that a prompt is on its way to a replica."""
        holder = self._holder(replica_id)
        expected, bit, masks = holder.expected, holder.bit, self._masks
        end_s = now_s + self._expected_s
        for block_hash in hashes:
            mask = masks.get(block_hash, 0)
            if not mask & bit:
                masks[block_hash] = mask | bit
                expected[block_hash] = end_s
            elif block_hash in expected:
                del expected[block_hash]  # to the end
                expected[block_hash] = end_s
        held = holder.held
        if 2 * len(held) > self._limit:  # which are the newest may soon decide
            for block_hash in hashes:
                if block_hash in held:
                    del held[block_hash]  # to the end
                    held[block_hash] = None
        self._trim(holder)

    def report(self, replica_id: str, epoch: Hashable, added: Sequence[int], removed: Sequence[int]) -> None:
        """Take what a replica says. Another `epoch` than before: all that it said before is void."""
        holder = self._holder(replica_id)
        if holder.epoch != epoch:
            holder.epoch = epoch
            self._clear(holder)
        held, expected, bit, masks = holder.held, holder.expected, holder.bit, self._masks
        for block_hash in removed:
            mask = masks.get(block_hash, 0)
            if mask & bit:
                if expected.pop(block_hash, None) is None:
                    del held[block_hash]
                if mask == bit:
                    del masks[block_hash]
                else:
                    masks[block_hash] = mask ^ bit
        for block_hash in added[-self._max_per_replica :]:
            mask = masks.get(block_hash, 0)
            if not mask & bit:
                masks[block_hash] = mask | bit
            elif expected.pop(block_hash, None) is None:
                del held[block_hash]  # to the end
            held[block_hash] = None
        if added:
            holder.has_reported = True
        self._trim(holder)

    def forget(self, replica_id: str) -> None:
        """The replica is gone."""
        holder = self._holders.pop(replica_id, None)
        if holder is not None:
            self._clear(holder)
            for block_hash in holder.expected:
                self._unset(block_hash, holder.bit)
            self._names[holder.bit.bit_length() - 1] = None
            self._share_out()

    def check_integrity(self) -> None:
        """Raise AssertionError unless the two directions agree and the bounds hold."""
        back: dict[int, int] = {}
        for name, holder in self._holders.items():
            assert self._names[holder.bit.bit_length() - 1] == name, f"{name} has another's bit"
            both = holder.held.keys() & holder.expected.keys()
            assert not both, f"{name}: {len(both)} hashes are held and expected"
            assert len(holder.held) + len(holder.expected) <= self._limit, f"{name} is over its bound"
            for block_hash in (*holder.held, *holder.expected):
                back[block_hash] = back.get(block_hash, 0) | holder.bit
        assert back == self._masks, f"{len(back)} hashes by replica, {len(self._masks)} by hash"

    def _holder(self, replica_id: str) -> _Holder:
        holder = self._holders.get(replica_id)
        if holder is None:
            if None in self._names:
                position = self._names.index(None)
                self._names[position] = replica_id
            else:
                position = len(self._names)
                self._names.append(replica_id)
            holder = self._holders[replica_id] = _Holder(1 << position)
            self._share_out()
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

    def _share_out(self) -> None:
        """A replica came or went: each one's bound is another, and so is what the bits mean."""
        self._limit = min(self._max_per_replica, max(1, self._max_in_all // max(1, len(self._holders))))
        self._members.clear()
        for holder in self._holders.values():
            self._trim(holder)

    def _trim(self, holder: _Holder) -> None:
        """Keep one replica's bound: what it reported goes first, the oldest first."""
        held, expected = holder.held, holder.expected
        num_over = len(held) + len(expected) - self._limit
        if num_over <= 0:
            return
        for block_hash in list(islice(held, num_over + self._limit // _SLACK_DIVISOR)):
            del held[block_hash]
            self._unset(block_hash, holder.bit)
        for block_hash in list(islice(expected, max(0, len(expected) - self._limit))):
            del expected[block_hash]
            self._unset(block_hash, holder.bit)

    def _purge(self, now_s: float) -> None:
        self._next_purge_s = now_s + _PURGE_PERIOD_S
        for holder in self._holders.values():
            due = []
            for block_hash, end_s in holder.expected.items():
                if end_s > now_s:
                    break
                due.append(block_hash)
            for block_hash in due:
                del holder.expected[block_hash]
                self._unset(block_hash, holder.bit)

    def _clear(self, holder: _Holder) -> None:
        """Forget what the replica reported."""
        for block_hash in holder.held:
            self._unset(block_hash, holder.bit)
        holder.held.clear()

    def _unset(self, block_hash: int, bit: int) -> None:
        mask = self._masks[block_hash] & ~bit
        if mask:
            self._masks[block_hash] = mask
        else:
            del self._masks[block_hash]
