"""A real front that starts a dead engine again at once, however often a test kills it.

The delays of the real one, which double with each kill, are tested in tests/unit/replica/test_restart.py.
"""

from __future__ import annotations

import sys

from headrace.replica import front
from headrace.replica.__main__ import main
from headrace.replica.restart import RestartPolicy

QUICK_DELAY_S = 0.1

if __name__ == "__main__":
    front.RestartPolicy = lambda: RestartPolicy(QUICK_DELAY_S, QUICK_DELAY_S)  # type: ignore[misc, assignment]
    sys.exit(main(sys.argv[1:]))
