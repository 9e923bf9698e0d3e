"""Seeds that found something, with what they found. Each has a unit test beside the code that it changed."""

from __future__ import annotations

import pytest

from headrace.sim.draws import Part, draw
from headrace.sim.world import World

FOUND: dict[int, str] = {
    149: "a request that came again within a step got the token of its aborted first try, and so one twice",
    310: "a stop between a child's death and its reaping was kept for the next one (simulated supervisor)",
    1674: "a paused rollout, which keeps replicas of both versions, was taken for too many (the check)",
    2215: "who came before a request that waited for its version was held until the next tick, beside room",
    4086: "the slot of a parked request whose client left as it was bound was given to nobody until a tick",
    6635: "a controller whose clock jumped took all durable fronts for hung before it read their reports",
    6676: "a controller that was stopped for a while took all fronts for hung before it read their reports",
    6946: "a later pass announced after its line gave its request a second line of the request log",
    7074: "a request that came again at a durable front got a token of its aborted try, and so one twice",
    7455: "a request that came again from the relay was parked for a call that HAProxy had given up",
}


FOUND_WITH_PARTS: dict[int, tuple[tuple[Part, ...], str]] = {
    20559: (
        ("gateway nodes", "end"),
        "a controller that was killed after `headrace down` had it all start again",
    ),
    28211: (
        ("gateway nodes", "end"),
        "replicas that a new controller had not heard of yet ended within a second",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", FOUND)
def test_what_a_seed_found_stays_fixed(seed: int) -> None:
    outcome = World(draw(seed, parts=())).run()
    assert outcome.violation is None, f"seed {seed} ({FOUND[seed]}): {outcome.violation}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", FOUND_WITH_PARTS)
def test_what_a_seed_found_with_parts_that_are_drawn_apart_stays_fixed(seed: int) -> None:
    parts, found = FOUND_WITH_PARTS[seed]
    outcome = World(draw(seed, parts=parts)).run()
    assert outcome.violation is None, f"seed {seed} ({found}): {outcome.violation}"
