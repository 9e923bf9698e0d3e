"""Virtual token counters: how much work each tenant of a priority band had, and whose is least. Pure.

Owns the arithmetic of fairness: counters, lifting, credit, and the order by them. The counters are those of
Sheng et al., "Fairness in serving large language models", OSDI 2024, arXiv:2401.00588: a counter grows by the
work done for its tenant over the tenant's weight, the least is next, and a tenant that was away is lifted to
those that were not, so that nobody saves up idleness. The small credit that it comes back with is ours.
Must not know what work is, whose requests are held, or who may go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from headrace.policy.admission import HeldRequest

BANDS = ("high", "normal", "low")
CREDIT_S = 1.0
"""How far below the level a tenant may come back, in engine-seconds of work that it left to others. Without,
two requests of a light tenant that come together wait for each other while a flood catches up: its p99 time
to first token was 2.4 to 3 times what it is alone, with half a second or more 1.0 times
(`tests/unit/policy/test_fair_share.py`)."""
MAX_LEAD_S = 30.0
"""How far work that another queue's decisions gave it may push a tenant behind the rest of its band, in
engine-seconds: no more, so that whoever loses a gateway does not wait for minutes."""
COMPACT_AT = 64
"""Entries out of date that a heap may have beyond one per waiting tenant."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant is due."""

    weight: float = 1.0
    """Twice the weight, twice the work."""
    band: int = 1
    """Index into BANDS: while one of a lower number may be bound, none of a higher number is."""
    max_wait_s: float = 0.0
    """Longest wait, when it is less than the endpoint's; 0: the endpoint's."""


class TenantCounter:
    """One tenant's counter and held requests. Its band moves it."""

    __slots__ = ("credit", "entry", "held", "is_passed_over", "last_served", "name", "share", "value")

    def __init__(self, name: str, share: Share) -> None:
        self.name = name
        self.share = share
        self.held: OrderedDict[str, HeldRequest] = OrderedDict()
        self.value = 0.0
        self.credit = 0.0
        """What is left of the credit that it came back with: so far the value is below the level."""
        self.entry = 0
        """Number of its one valid entry in the band's heap; 0: its turn cannot come."""
        self.last_served = 0
        """Number of the last service; breaks ties for whom it is longer ago."""
        self.is_passed_over = False

    def most_credit(self, second: float) -> float:
        return CREDIT_S * second / self.share.weight


_Entry = tuple[float, int, int, TenantCounter]
"""Value, last_served, entry number, tenant. Valid while the tenant's `entry` is that number."""


class Band:
    """The tenants of one priority, those whose turn may come in a heap. Operations take O(log tenants),
    amortised."""

    __slots__ = ("_heap", "_numbers", "last_served", "num_waiting")

    def __init__(self, numbers: Iterator[int]) -> None:
        """`numbers`: from 1, shared by all bands, since who changes its band leaves entries behind."""
        self._heap: list[_Entry] = []
        self._numbers = numbers
        self.num_waiting = 0
        self.last_served: TenantCounter | None = None

    def first(self) -> TenantCounter | None:
        """Return the waiting tenant with the least counter."""
        heap = self._heap
        while heap:
            entry = heap[0]
            if entry[3].entry == entry[2]:
                return entry[3]
            heappop(heap)
        return None

    def level(self) -> float:
        """The counter of those that wait: the least, but for its credit, or, when nobody waits, that of the
        last one served."""
        first = self.first() or self.last_served
        return first.value + first.credit if first is not None else 0.0

    def lift(self, tenant: TenantCounter, second: float) -> None:
        """Lift a tenant that was away to those that were not, but for its credit. `second`: how much work is
        an engine-second."""
        level = self.level()
        tenant.value = max(tenant.value, level - tenant.most_credit(second))
        tenant.credit = max(0.0, level - tenant.value)

    def enter(self, tenant: TenantCounter, second: float) -> None:
        """A tenant's turn may come."""
        self.lift(tenant, second)
        self.num_waiting += 1
        self.place(tenant)

    def leave(self, tenant: TenantCounter) -> None:
        """A tenant's turn cannot come any more. Nothing happens if it could not."""
        if tenant.entry:
            tenant.entry = 0
            self.num_waiting -= 1

    def add(self, tenant: TenantCounter, work: float) -> None:
        """Count work, which may be negative: an estimate that was too high. Moves the tenant's turn."""
        amount = work / tenant.share.weight
        tenant.value = max(0.0, tenant.value + amount)
        tenant.credit = min(tenant.credit, max(0.0, tenant.credit - amount))
        if tenant.entry:
            self.place(tenant)

    def place(self, tenant: TenantCounter) -> None:
        """Put a waiting tenant where its counter says."""
        tenant.entry = next(self._numbers)
        heappush(self._heap, (tenant.value, tenant.last_served, tenant.entry, tenant))
        if len(self._heap) > 2 * self.num_waiting + COMPACT_AT:
            self._heap = [entry for entry in self._heap if entry[3].entry == entry[2]]
            heapify(self._heap)

    def turns(self) -> dict[str, float]:
        """Return the waiting tenants with the counters that order them. Raises AssertionError if one is out
        of date, or if the heap or the count is not what it must be."""
        valid = [entry for entry in self._heap if entry[3].entry == entry[2]]
        assert len(valid) == self.num_waiting, f"{len(valid)} turns != {self.num_waiting} counted"
        assert all(entry[0] == entry[3].value for entry in valid), "a turn's counter is out of date"
        assert len(self._heap) <= 2 * self.num_waiting + COMPACT_AT, f"{len(self._heap)} entries"
        return {entry[3].name: entry[0] for entry in valid}
