"""Seeds that found something, with what they found. Each has a unit test beside the code that it changed."""

from __future__ import annotations

import pytest

from headrace.sim.scenario import draw
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", FOUND)
def test_what_a_seed_found_stays_fixed(seed: int) -> None:
    outcome = World(draw(seed)).run()
    assert outcome.violation is None, f"seed {seed} ({FOUND[seed]}): {outcome.violation}"
