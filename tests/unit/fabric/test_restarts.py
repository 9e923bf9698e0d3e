"""The pause before a process is started again."""

from __future__ import annotations

import pytest

from headrace.fabric.restarts import HEALTHY_AFTER_S, MAX_RESTART_DELAY_S, count_failures, restart_delay_s


def test_pauses_double_up_to_their_bound() -> None:
    assert [restart_delay_s(n) for n in range(1, 8)] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0])


def test_a_process_that_fails_for_hours_is_still_started_every_few_seconds() -> None:
    assert restart_delay_s(5000) == MAX_RESTART_DELAY_S


def test_one_that_lived_begins_anew() -> None:
    assert count_failures(7, HEALTHY_AFTER_S - 1) == 8
    assert count_failures(7, HEALTHY_AFTER_S) == 1
