"""What of a load report is impossible, and left out before anybody believes it. Pure.

Must not know replicas or requests.
"""

from __future__ import annotations

import msgspec

from headrace.api.messages import FinishedRequest, LoadReport

MAX_TOKENS = 1 << 31
MAX_DURATION_S = 1e6
MAX_ID_LENGTH = 256


def without_nonsense(report: LoadReport) -> tuple[LoadReport, int]:
    """Return the report without ends that cannot be true (they would spoil counters and charges for good),
    and how many were left out."""
    sane = [finished for finished in report.finished if is_possible(finished)]
    num_dropped = len(report.finished) - len(sane)
    return (msgspec.structs.replace(report, finished=sane) if num_dropped else report), num_dropped


def is_possible(finished: FinishedRequest) -> bool:
    """Whether a request can have ended like this. NaN compares false with everything."""
    return (
        0 < len(finished.request_id) <= MAX_ID_LENGTH
        and 0 <= finished.num_cached_tokens <= finished.num_prompt_tokens <= MAX_TOKENS
        and 0 <= finished.num_output_tokens <= MAX_TOKENS
        and 0 <= finished.ttft_s <= MAX_DURATION_S
        and 0 <= finished.total_s <= MAX_DURATION_S
        and 0 <= finished.engine_s <= MAX_DURATION_S
    )
