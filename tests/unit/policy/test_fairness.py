"""The fair queue: order in a tenant, shares between tenants, bands above both; nothing lost or starved."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.policy import fairness
from headrace.policy.admission import FifoQueue, HeldRequest
from headrace.policy.fairness import FairQueue
from headrace.policy.virtual_counters import CREDIT_S, MAX_LEAD_S, Share

TENANTS = ("a", "b", "c", "d")


def exact(max_requests: int = 1000, shares: dict[str, Share] | None = None) -> FairQueue:
    """A queue without credit, so that turns can be counted."""
    queue = FairQueue(max_requests, shares)
    queue.second = 0.0
    return queue


def fill(queue: FairQueue, **counts: int) -> None:
    """Offer so many requests per tenant, in turns."""
    for number in range(max(counts.values())):
        for tenant, count in counts.items():
            if number < count:
                assert queue.offer(HeldRequest(f"{tenant}{number}", float(number), tenant))


def served(queue: FairQueue, num_requests: int, work: dict[str, float] | None = None) -> list[str]:
    """Take so many requests, each charged with its tenant's usual work (1)."""
    tenants = []
    for _ in range(num_requests):
        request = queue.peek(0.0)
        assert request is not None
        assert queue.take((work or {}).get(request.tenant, 1.0)) == request
        tenants.append(request.tenant)
    return tenants


OPERATIONS = st.lists(
    st.one_of(
        st.just(("offer", 0)),
        st.tuples(st.just("take"), st.integers(0, 9)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("expire"), st.integers(0, 5)),
        st.tuples(st.just("charge"), st.integers(-9, 9)),
    ),
    max_size=60,
)


@given(OPERATIONS, st.integers(0, 5), st.sampled_from(["", "a"]))
def test_a_single_tenant_is_served_as_by_a_fifo_queue(
    operations: list[tuple[str, int]], limit: int, tenant: str
) -> None:
    fair, fifo = FairQueue(limit), FifoQueue(limit)
    for now_s, (operation, argument) in enumerate(operations):
        if operation == "offer":
            request = HeldRequest(f"r{now_s}", now_s, tenant)
            assert fair.offer(request) == fifo.offer(request)
        elif operation == "take":
            assert fair.take(argument) == fifo.take()
        elif operation == "cancel":
            assert fair.cancel(f"r{argument}") == fifo.cancel(f"r{argument}")
        elif operation == "expire":
            assert fair.expire(now_s, argument) == fifo.expire(now_s, argument)
        else:
            fair.charge(tenant, argument)
        assert len(fair) == len(fifo)
        assert fair.peek(now_s) == fifo.peek(now_s)
        assert fair.oldest_s(now_s) == fifo.oldest_s(now_s)
        fair.check_integrity()


def test_equal_tenants_take_turns_whatever_each_one_queues() -> None:
    queue = exact(1000)
    fill(queue, a=500, b=10)
    assert Counter(served(queue, 20)) == {"a": 10, "b": 10}


def test_work_counts_not_requests() -> None:
    queue = exact(1000)
    fill(queue, a=100, b=100)
    assert Counter(served(queue, 88, {"a": 10.0, "b": 1.0})) == {"a": 8, "b": 80}


def test_weights_share_the_work() -> None:
    queue = exact(1000, {"b": Share(2.0), "c": Share(4.0)})
    fill(queue, a=200, b=200, c=200)
    assert Counter(served(queue, 70)) == {"a": 10, "b": 20, "c": 40}


def test_a_higher_band_goes_first_and_a_lower_one_gets_what_is_left() -> None:
    queue = FairQueue(1000, {"a": Share(band=2), "b": Share(band=0), "c": Share(band=0)})
    fill(queue, a=2, b=2, c=2, d=2)
    assert served(queue, 8) == ["b", "c", "b", "c", "d", "d", "a", "a"]


def test_who_comes_back_is_next_and_has_saved_up_nothing() -> None:
    queue = exact(1000)
    fill(queue, a=300)
    assert queue.take(1.0)
    served(queue, 100)
    fill(queue, b=100)
    assert served(queue, 20).count("b") == 10
    assert queue.counter("b") == pytest.approx(queue.counter("a"), abs=1)


def test_who_comes_back_has_a_credit_of_the_work_that_it_left_to_others_up_to_a_second() -> None:
    queue = FairQueue(1000, {"c": Share(2.0)})
    fill(queue, a=300)
    served(queue, 100, {"a": 0.1})
    fill(queue, b=100, c=100)
    order = served(queue, 26, dict.fromkeys("abc", 0.1))
    assert set(order[:18]) == {"b", "c"}, "about a second's work each, before the flood's next turn"
    assert "a" in order
    for _ in range(5):
        queue.serve("d", 0.1)
    assert queue.counter("d") == pytest.approx(queue.counter("a") - 0.5, abs=0.11)


def test_who_comes_back_to_an_empty_queue_is_level_with_the_last_one_served() -> None:
    queue = exact(1000)
    for _ in range(50):
        queue.serve("a", 1.0)
    fill(queue, b=20, a=20)
    assert Counter(served(queue, 20)) == {"a": 10, "b": 10}


def test_one_giant_request_is_paid_for_before_the_next_one_of_its_tenant() -> None:
    queue = FairQueue(1000)
    fill(queue, a=5, b=200)
    order = served(queue, 150, {"a": 100.0, "b": 1.0})
    assert [position for position, tenant in enumerate(order) if tenant == "a"] == [0, 101]


def test_a_correction_moves_a_tenants_turn() -> None:
    queue = FairQueue(1000)
    fill(queue, a=10, b=10)
    assert served(queue, 2, {"a": 100.0, "b": 100.0}) == ["a", "b"]
    queue.charge("a", -90.0)
    assert served(queue, 2, {"a": 50.0}) == ["a", "a"]
    queue.charge("a", float("nan"))
    queue.charge("unknown", 5.0)
    queue.check_integrity()


def test_a_tenant_that_is_passed_over_keeps_its_place_and_holds_nobody_up() -> None:
    queue = FairQueue(1000)
    fill(queue, a=3, b=3)
    queue.pass_over("a")
    assert served(queue, 3) == ["b", "b", "b"]
    assert queue.peek(0.0) is None
    assert not queue.has_turn
    assert len(queue) == 3
    assert queue.bring_back("a")
    assert not queue.bring_back("a")
    assert [request.request_id for request in (queue.take(), queue.take()) if request] == ["a0", "a1"]


def test_a_tenant_that_was_passed_over_has_saved_up_nothing() -> None:
    queue = exact(1000)
    fill(queue, a=50, b=200)
    queue.pass_over("a")
    served(queue, 100)
    queue.bring_back("a")
    assert served(queue, 20).count("a") == 10


def test_work_done_elsewhere_counts_up_to_a_bound() -> None:
    queue = FairQueue(10_000)
    fill(queue, a=50, b=50)
    queue.charge_elsewhere("a", 10.0)
    assert served(queue, 11) == ["b"] * 10 + ["a"]
    for _ in range(1000):
        queue.charge_elsewhere("a", 1000.0)
    assert queue.counter("a") <= queue.counter("b") + MAX_LEAD_S
    queue.charge_elsewhere("a", float("inf"))
    queue.charge_elsewhere("a", -1.0)
    queue.check_integrity()


def test_work_done_elsewhere_for_one_that_is_alone_is_not_held_against_it_later() -> None:
    queue = exact(1000)
    for _ in range(20):
        queue.charge_elsewhere("a", 1.0)
        queue.serve("a", 1.0)
    fill(queue, a=20, b=20)
    assert served(queue, 20).count("a") == 10


def test_a_full_queue_sheds_the_youngest_of_who_holds_most() -> None:
    queue = FairQueue(6, {"low": Share(band=2)})
    fill(queue, a=4, b=2)
    assert not queue.offer(HeldRequest("c0", 9.0, "c"))
    shed = queue.shed("c")
    assert shed is not None
    assert shed.request_id == "a3"
    assert queue.offer(HeldRequest("c0", 9.0, "c"))
    assert queue.shed("a") is None, "it would hold most itself"
    assert queue.shed("low") is None, "a lower band takes no place of a higher one"
    queue.check_integrity()


def test_a_higher_band_takes_the_place_of_a_lower_one_in_a_full_queue() -> None:
    queue = FairQueue(3, {"low": Share(band=2)})
    fill(queue, low=1, a=2)
    shed = queue.shed("a")
    assert shed is not None
    assert shed.request_id == "low0"


def test_what_is_put_back_comes_before_its_tenants_others_also_into_a_full_queue() -> None:
    queue = exact(max_requests=2)
    fill(queue, acme=2)
    first = queue.take(1.0)
    assert first is not None
    assert queue.offer(HeldRequest("younger", 5.0, "beta"))
    queue.put_back(first)
    queue.check_integrity()
    assert len(queue) == 3
    assert not queue.offer(HeldRequest("refused", 6.0, "gamma"))
    assert queue.held_by("acme")[0] == first.request_id
    assert queue.expire(100.0, 1.0)[0] == first
    queue.check_integrity()


def test_new_shares_keep_what_is_held_and_a_new_band_begins_anew() -> None:
    queue = exact(1000)
    fill(queue, a=30, b=30)
    served(queue, 20)
    queue.set_shares({"a": Share(3.0), "b": Share(1.0)})
    assert Counter(served(queue, 20)) == {"a": 15, "b": 5}
    queue.set_shares({"a": Share(band=1), "b": Share(band=0)})
    assert queue.counter("b") == 0.0
    assert served(queue, 15) == ["b"] * 15
    queue.check_integrity()


def test_each_tenant_has_its_own_longest_wait() -> None:
    queue = FairQueue(10, {"a": Share(max_wait_s=2.0), "b": Share(max_wait_s=100.0)})
    fill(queue, a=1, b=1, c=1)
    assert [request.tenant for request in queue.expire(3.0, 5.0)] == ["a"]
    assert {request.tenant for request in queue.expire(5.0, 5.0)} == {"b", "c"}


def test_a_clock_that_jumps_back_expires_nothing_and_breaks_nothing() -> None:
    queue = FairQueue(10)
    assert queue.offer(HeldRequest("x", 1e6, "a"))
    assert queue.expire(-1e6, 5.0) == []
    assert queue.oldest_s(-1e6) == 0.0
    assert queue.oldest_s(-1e6, "a") == 0.0
    assert queue.expire(1e12, 5.0) != []


def test_the_reason_names_the_band_and_how_many_wait() -> None:
    queue = FairQueue(10)
    assert queue.explain() == "nobody's turn"
    fill(queue, a=1, b=1)
    assert queue.explain() == "least work per weight (0) of 2 waiting tenants of normal priority"


def test_clearing_takes_out_everything_also_of_who_is_passed_over() -> None:
    queue = FairQueue(10)
    fill(queue, a=2, b=2)
    queue.pass_over("a")
    assert len(queue.clear()) == 4
    assert len(queue) == 0
    queue.check_integrity()
    assert "0/10" in repr(queue)


def test_tenants_that_hold_nothing_are_forgotten_at_the_bound_without_a_gain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fairness, "MAX_TENANTS", 64)
    queue = FairQueue(1000)
    fill(queue, busy=10)
    served(queue, 5, {"busy": 100.0})
    for number in range(500):
        queue.serve(f"t{number}", 1.0)
        queue.check_integrity()
    fill(queue, t3=100)  # forgotten, and back
    assert queue.counter("t3") >= 500.0 - CREDIT_S


def test_a_tenant_whose_rule_is_gone_is_forgotten_when_it_holds_nothing() -> None:
    queue = FairQueue(10, {"a": Share(), "b": Share()})
    fill(queue, a=1, b=1)
    served(queue, 1)
    queue.set_shares({})
    assert queue.counter("a") == 0.0
    assert len(queue) == 1
    queue.check_integrity()


@given(
    st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(1, 20)), min_size=1, max_size=200),
    st.fixed_dictionaries({tenant: st.sampled_from([0.5, 1.0, 3.0]) for tenant in TENANTS}),
)
def test_among_waiting_tenants_no_counter_is_ahead_by_more_than_one_request(
    arrivals: list[tuple[str, int]], weights: dict[str, float]
) -> None:
    queue = FairQueue(10_000, {tenant: Share(weight) for tenant, weight in weights.items()})
    work = {f"r{number}": size for number, (_, size) in enumerate(arrivals)}
    most = max(size / weights[tenant] for tenant, size in arrivals)
    pending = list(enumerate(arrivals))
    rng = random.Random(len(arrivals))
    while pending or len(queue):
        if pending and rng.random() < 0.6:
            number, (tenant, _) = pending.pop(0)
            queue.offer(HeldRequest(f"r{number}", float(number), tenant))
        elif (request := queue.peek(0.0)) is not None:
            queue.take(work[request.request_id])
        waiting = [queue.counter(tenant) for tenant in TENANTS if queue.num_held(tenant)]
        assert not waiting or max(waiting) - min(waiting) <= most + CREDIT_S / min(weights.values()) + 1e-9


class QueueMachine(RuleBasedStateMachine):
    """Random days of a queue with bands, weights and tenants that are passed over, beside a plain model."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = {"a": Share(2.0), "b": Share(band=0), "c": Share(0.5, band=2)}
        self.queue = FairQueue(12, self.shares)
        self.model: dict[str, list[str]] = {tenant: [] for tenant in TENANTS}
        self.passed_over: set[str] = set()
        self.num_offered = 0

    @rule(tenant=st.sampled_from(TENANTS))
    def a_request_comes(self, tenant: str) -> None:
        request_id = f"r{self.num_offered}"
        self.num_offered += 1
        has_room = sum(map(len, self.model.values())) < 12
        assert self.queue.offer(HeldRequest(request_id, float(self.num_offered), tenant)) == has_room
        if has_room:
            self.model[tenant].append(request_id)

    @rule(work=st.floats(0, 100))
    def the_next_one_is_bound(self, work: float) -> None:
        request = self.queue.take(work)
        may_go = [name for name, held in self.model.items() if held and name not in self.passed_over]
        if request is None:
            assert not may_go, "work is conserved: somebody could have gone"
            return
        assert request.tenant in may_go
        assert self.model[request.tenant].pop(0) == request.request_id, "first come, first served"
        best = min(self._band(name) for name in may_go)
        assert self._band(request.tenant) == best, "a higher band waits"

    def _band(self, tenant: str) -> int:
        return self.shares.get(tenant, Share()).band

    @precondition(lambda self: self.num_offered)
    @rule(data=st.data())
    def a_client_leaves(self, data: st.DataObject) -> None:
        request_id = f"r{data.draw(st.integers(0, self.num_offered - 1))}"
        holder = next((name for name, held in self.model.items() if request_id in held), None)
        request = self.queue.cancel(request_id)
        assert (request.tenant if request else None) == holder
        if holder is not None:
            self.model[holder].remove(request_id)

    @rule(tenant=st.sampled_from(TENANTS), work=st.floats(-100, 100))
    def a_charge_is_corrected(self, tenant: str, work: float) -> None:
        self.queue.charge(tenant, work)

    @rule(tenant=st.sampled_from(TENANTS), work=st.floats(0, 100))
    def work_is_done_elsewhere(self, tenant: str, work: float) -> None:
        self.queue.charge_elsewhere(tenant, work)

    @rule(tenant=st.sampled_from(TENANTS))
    def a_tenant_reaches_its_limit(self, tenant: str) -> None:
        self.queue.pass_over(tenant)
        self.passed_over.add(tenant)

    @rule(tenant=st.sampled_from(TENANTS))
    def a_tenant_has_room_again(self, tenant: str) -> None:
        assert self.queue.bring_back(tenant) == (tenant in self.passed_over)
        self.passed_over.discard(tenant)

    @rule(
        tenant=st.sampled_from(TENANTS),
        share=st.builds(Share, st.sampled_from([0.5, 4.0]), st.integers(0, 2)),
    )
    def a_share_changes(self, tenant: str, share: Share) -> None:
        self.shares = {**self.shares, tenant: share}
        self.queue.set_shares(self.shares)

    @rule(tenant=st.sampled_from(TENANTS))
    def a_place_is_wanted(self, tenant: str) -> None:
        request = self.queue.shed(tenant)
        if request is not None:
            assert request.tenant != tenant
            assert self.model[request.tenant].pop() == request.request_id, "the youngest goes"

    @invariant()
    def nothing_is_lost(self) -> None:
        self.queue.check_integrity()
        assert {name: self.queue.held_by(name) for name in TENANTS} == self.model


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
