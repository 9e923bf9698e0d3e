"""What people are shown: nothing that matters is hidden, nothing is cut off at 80 columns."""

from __future__ import annotations

import io
from array import array

import pytest
from rich.console import Console

from headrace.bench.load import LoadRun, LoadSpec
from headrace.bench.record import RequestRecord
from headrace.bench.report import print_report
from headrace.bench.results import BenchReport, RunResult, Slo, evaluate


def record(index: int, *, error: str = "", usage: int | None = 20_000) -> RequestRecord:
    made = RequestRecord(
        index,
        0.0,
        sent_s=0.5,
        end_s=3.0,
        token_times=array("d", [1.0, 2.0]),
        num_prompt_tokens=None if usage is None else 100,
        num_cached_tokens=64,
        num_completion_tokens=usage,
        is_done=True,
    )
    if error:
        made.fail(error, "the [server] said so")
    return made


def result(spec: LoadSpec, records: list[RequestRecord], cpu_s: float = 0.1) -> RunResult:
    return evaluate(LoadRun(spec, records, 3.0, cpu_s), Slo(ttft_ms=2000))


def shown(*runs: RunResult) -> str:
    report = BenchReport(
        1, "0.1.0", "now", "http://x/v1", "m[bold]", "chat", "128", "64", 0, False, 0, Slo(),
        list(runs),
    )  # fmt: skip
    text = io.StringIO()
    print_report(report, Console(file=text, width=80))
    return text.getvalue()


def test_several_runs_are_compared_without_cutting_a_figure() -> None:
    text = shown(*(result(LoadSpec(concurrency=n, max_requests=1), [record(0)]) for n in (1, 16_384)))
    assert "…" not in text
    assert "16384" in text
    assert "6,666.7" in text


def test_failures_and_invalid_runs_are_named() -> None:
    text = shown(result(LoadSpec(rate=100.0, max_requests=1), [record(0), record(1, error="http_500")], 2.9))
    for part in ("1 of 2 requests", "1 failed, http_500: the [server] said so",
                 "INVALID: the client sent late", "INVALID: the client was saturated",
                 "send lag", "m[bold]"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(("usage", "words"), [(20, "as the server counted"), (None, "counted as chunks")])
def test_the_source_of_token_counts_is_said(usage: int | None, words: str) -> None:
    assert words in " ".join(
        shown(result(LoadSpec(concurrency=1, max_requests=1), [record(0, usage=usage)])).split()
    )


def test_tokens_from_the_prefix_cache_and_goodput_are_said() -> None:
    text = shown(result(LoadSpec(concurrency=1, max_requests=1), [record(0)]))
    assert "64 of 100 input tokens came from the prefix cache" in text
    assert "100.0% met the SLO" in text


def test_a_run_without_any_answer_has_no_figures_and_still_a_table() -> None:
    text = shown(result(LoadSpec(concurrency=1, max_requests=1), [record(0, error="connect")]))
    assert "INVALID: no request succeeded" in text
    assert "TTFT" in text
