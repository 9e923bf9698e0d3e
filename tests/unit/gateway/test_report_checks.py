"""Ends of requests that cannot be true are left out of a report, and nothing else is."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from headrace.api.messages import FinishedRequest, LoadReport, TerminalState
from headrace.gateway.report_checks import is_possible, without_nonsense

GOOD = FinishedRequest("hr-g1-1", TerminalState.FINISHED, "stop", "acme", 10, 4, 5, 0.1, 0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"request_id": ""},
        {"request_id": "x" * 257},
        {"num_prompt_tokens": -1},
        {"num_cached_tokens": 11},
        {"num_cached_tokens": -1},
        {"num_output_tokens": 2**40},
        {"ttft_s": math.nan},
        {"ttft_s": -0.1},
        {"total_s": math.inf},
        {"engine_s": math.nan},
        {"engine_s": -1e-9},
        {"engine_s": math.inf},
    ],
)
def test_an_impossible_end_is_left_out(change: dict[str, Any]) -> None:
    bad = msgspec.structs.replace(GOOD, **change)
    assert not is_possible(bad)
    report = LoadReport("chat-1", "chat", "m", "a:1", 1, 1, 3.0, "ready", finished=[bad, GOOD, bad])
    kept, num_dropped = without_nonsense(report)
    assert (kept.finished, num_dropped) == ([GOOD], 2)


def test_a_good_report_stays_the_same_object() -> None:
    report = LoadReport("chat-1", "chat", "m", "a:1", 1, 1, 3.0, "ready", finished=[GOOD])
    assert without_nonsense(report) == (report, 0)
    assert without_nonsense(report)[0] is report
