"""How long a process that ended waits for its next start: a doubling pause, forgotten once one lived. Pure.

Must not know processes.
"""

from __future__ import annotations

FIRST_RESTART_DELAY_S = 0.2
MAX_RESTART_DELAY_S = 10.0
HEALTHY_AFTER_S = 60.0
"""A process that ran this long starts again without an increased delay."""
_MAX_DOUBLINGS = 16


def count_failures(num_before: int, lived_s: float) -> int:
    """Return the ends in a row, this one included, of a process that lived for lived_s."""
    return 1 if lived_s >= HEALTHY_AFTER_S else num_before + 1


def restart_delay_s(num_failures: int) -> float:
    """Return the pause after so many ends in a row, >= 1. However many there were, it has its bound."""
    return min(FIRST_RESTART_DELAY_S * 2.0 ** min(num_failures - 1, _MAX_DOUBLINGS), MAX_RESTART_DELAY_S)
