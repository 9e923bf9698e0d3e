"""Admission: order, bounds, and when to come again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.policy.admission import FifoQueue, HeldRequest, retry_after_s

OPERATIONS = st.lists(
    st.one_of(
        st.just(("offer", 0)),
        st.just(("take", 0)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("expire"), st.integers(0, 5)),
    ),
    max_size=60,
)


@given(OPERATIONS, st.integers(0, 5))
def test_the_queue_behaves_like_a_bounded_list(operations: list[tuple[str, int]], limit: int) -> None:
    queue, model, num_offered = FifoQueue(limit), list[HeldRequest](), 0
    for now_s, (operation, argument) in enumerate(operations):
        if operation == "offer":
            request = HeldRequest(f"r{num_offered}", now_s)
            num_offered += 1
            assert queue.offer(request) == (len(model) < limit)
            model += [request] if len(model) < limit else []
        elif operation == "take":
            assert queue.take() == (model.pop(0) if model else None)
        elif operation == "cancel":
            found = next((item for item in model if item.request_id == f"r{argument}"), None)
            assert queue.cancel(f"r{argument}") == found
            model = [item for item in model if item is not found]
        else:
            expired = [item for item in model if now_s - item.arrived_s >= argument]
            assert queue.expire(now_s, argument) == expired
            model = [item for item in model if item not in expired]
        assert len(queue) == len(model)
        assert queue.oldest_s(now_s) == (now_s - model[0].arrived_s if model else 0)


@given(st.integers(0, 10**6), st.floats(0, 10**6))
def test_the_advice_is_bounded_and_grows_with_the_queue(num_ahead: int, rate: float) -> None:
    seconds = retry_after_s(num_ahead, rate)
    assert 1 <= seconds <= 60
    assert retry_after_s(num_ahead + 10, rate) >= seconds


def test_the_advice_is_the_queues_length_over_the_rate() -> None:
    assert retry_after_s(99, 10.0) == 10
    assert retry_after_s(0, 1000.0) == 1
    assert retry_after_s(10**9, 1.0) == 60
    assert retry_after_s(5, 0.0) == 10
