"""The sum of all requests of a router: what arrived is held, in flight or ended. Pure.

Must not know why a request is where it is.
"""

from __future__ import annotations

from headrace.gateway.binding import Binder
from headrace.gateway.flights import Flights


def check_conservation(binder: Binder, flights: Flights) -> None:
    """Raise AssertionError, showing the sum, if a request was lost or counted twice."""
    endpoints, all_held = binder.endpoints, binder.held
    for name, endpoint in endpoints.items():
        held, ended = len(endpoint.queue), sum(endpoint.ended.values())
        total = held + endpoint.num_in_flight + ended
        assert endpoint.arrived == total, (
            f"{name}: arrived {endpoint.arrived} != held {held} + in flight {endpoint.num_in_flight} "
            f"+ ended {ended}"
        )
        endpoint.queue.check_integrity()
    in_flight = sum(endpoint.num_in_flight for endpoint in endpoints.values())
    assert in_flight == len(flights), f"in flight {in_flight} != {len(flights)} remembered"
    held = sum(len(endpoint.queue) for endpoint in endpoints.values())
    assert held == len(all_held), f"held {held} != {len(all_held)} remembered"
    held_tokens = sum(request.charge.num_prompt_tokens for request in all_held.values())
    counted = sum(endpoint.held_prompt_tokens for endpoint in endpoints.values())
    assert held_tokens == counted, f"held prompt tokens {held_tokens} != {counted} counted"
