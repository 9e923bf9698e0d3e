"""Placed guests are counted as requests, whatever order their choices come and go in."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from headrace.api.messages import Placed
from headrace.replica.placed_guests import PlacedGuests

REQUESTS = {"hr-g1-a": "acme", "hr-g1-b": "", "hr-g2-c": "acme", "mine": "b"}
STEPS = st.lists(st.tuples(st.sampled_from(sorted(REQUESTS)), st.booleans()), max_size=40)


@given(STEPS)
def test_requests_are_counted_once_however_many_choices_they_have(steps: list[tuple[str, bool]]) -> None:
    guests, model = PlacedGuests(), Counter[str]()
    for request_id, comes in steps:
        placed = Placed(request_id, "chat-1")
        assert guests.has(placed) == (model[request_id] > 0)
        if comes:
            guests.add(placed, REQUESTS[request_id])
            model[request_id] += 1
        elif model[request_id]:
            guests.remove(placed)
            model[request_id] -= 1
        guests.check_integrity()
    here = [request_id for request_id, count in model.items() if count]
    assert (guests.num_requests, guests.num_streams) == (len(here), model.total())
    gateways = {"hr-g1-a": "g1", "hr-g1-b": "g1", "hr-g2-c": "g2", "mine": ""}
    assert guests.by_gateway() == Counter(gateways[request_id] for request_id in here)
    assert guests.by_tenant() == Counter(REQUESTS[request_id] for request_id in here)


def test_guests_that_no_router_placed_are_none_of_these() -> None:
    guests = PlacedGuests()
    guests.add(None, "acme")
    guests.remove(None)
    assert (guests.num_requests, guests.num_streams, guests.has(None)) == (0, 0, False)
