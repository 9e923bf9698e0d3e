"""A keeper is a child of one of Ray's workers, which are nice; what it holds serves, and is not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from headrace.fabric.keeper import NICENESS_VARIABLE

pytestmark = pytest.mark.slow
PROGRAM = """
import os
from headrace.fabric.keeper import take_usual_priority
os.nice(15 - os.getpriority(os.PRIO_PROCESS, 0))
take_usual_priority()
print(os.getpriority(os.PRIO_PROCESS, 0))
"""


def niceness_after(**environment: str) -> int:
    others = {name: value for name, value in os.environ.items() if name != NICENESS_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**others, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may take a niceness back")
def test_the_niceness_of_rays_workers_is_left() -> None:
    assert niceness_after() == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may take a niceness back")
def test_where_that_is_not_allowed_everything_goes_on_nice() -> None:
    assert niceness_after() == 15


def test_a_niceness_that_somebody_chose_stands() -> None:
    assert niceness_after(**{NICENESS_VARIABLE: "15"}) == 15
