"""What is broken on purpose must be found: the first of several worlds that fails."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from headrace.sim.world import Outcome


def first_failure(outcomes: Iterable[Outcome], what: str) -> Outcome:
    """Return the first outcome with a violation. what: is to be found; the test fails if nothing is."""
    for outcome in outcomes:
        if outcome.violation is not None:
            return outcome
    pytest.fail(f"{what} was not found")
