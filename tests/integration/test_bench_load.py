"""The load generator against a tiny server whose schedule is known."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest
from tests.integration.bench_server import Script, tiny_server

from headrace.bench.load import LoadSpec, Progress, WarmupFailed, run_load
from headrace.bench.report import to_json
from headrace.bench.results import BenchReport, RunResult, Slo, evaluate
from headrace.bench.suite import run_suite
from headrace.bench.target import Target, TargetError, choose_model, parse_target
from headrace.bench.workload import Lengths, Route, Workload

TOLERANCE_MS = 60.0  # a shared 2-core machine may take a core away for this long


@pytest.fixture
def script() -> Iterator[Script]:
    with tiny_server(Script()) as script:
        yield script


def workload(num_tokens: int = 6, route: Route = "chat") -> Workload:
    return Workload("tiny", route, output_tokens=Lengths("fixed", num_tokens))


def load(script: Script, spec: LoadSpec, *, route: Route = "chat", num_tokens: int = 6) -> RunResult:
    target = parse_target(script.url, "/chat/completions" if route == "chat" else "/completions")
    return evaluate(run_load(target, workload(num_tokens, route), spec))


def closed(requests: int = 6, concurrency: int = 3, warmup: int = 0, timeout_s: float = 20.0) -> LoadSpec:
    return LoadSpec(
        concurrency=concurrency, max_requests=requests, warmup_requests=warmup, timeout_s=timeout_s
    )


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_a_closed_loop_counts_requests_tokens_and_connections(script: Script, route: Route) -> None:
    result = load(script, closed(requests=12, concurrency=3, warmup=3), route=route)
    assert (result.num_requests, result.num_ok, result.errors) == (12, 12, {})
    assert (result.output_tokens, result.input_tokens, result.cached_tokens) == (72, 132, 36)
    assert (result.tokens_from, result.num_chunks) == ("usage", 72)
    assert len(script.bodies) == 15
    assert script.num_connections == 3


@pytest.mark.slow
def test_latencies_are_the_servers_own_schedule(script: Script) -> None:
    script.ttft_s, script.gap_s = 0.05, 0.01
    result = load(script, closed(requests=6, concurrency=2), num_tokens=10)
    assert result.ttft_ms is not None
    assert 50 <= result.ttft_ms.p50 <= 50 + TOLERANCE_MS
    assert result.itl_ms is not None
    assert result.itl_ms.count == 54
    assert 10 <= result.itl_ms.p50 <= 10 + TOLERANCE_MS
    assert result.end_to_end_ms is not None
    assert 140 <= result.end_to_end_ms.p50 <= 140 + 10 * TOLERANCE_MS
    assert result.tpot_ms is not None
    assert result.tpot_ms.p50 == pytest.approx((result.end_to_end_ms.p50 - result.ttft_ms.p50) / 9, rel=0.5)


@pytest.mark.slow
def test_an_open_loop_sends_on_schedule_while_answers_are_late(script: Script) -> None:
    script.ttft_s = 0.4
    spec = LoadSpec(rate=50.0, arrivals="fixed", max_requests=20)
    result = load(script, spec)
    assert result.num_ok == 20
    assert script.num_connections == 20  # the first answer comes after the last request
    assert result.elapsed_s >= 19 / 50 + 0.4
    assert result.send_lag_ms is not None
    assert result.send_lag_ms.p50 >= 0


@pytest.mark.slow
def test_a_duration_ends_a_closed_loop_and_open_requests_are_waited_for(script: Script) -> None:
    script.ttft_s = 0.05
    result = load(script, LoadSpec(concurrency=2, duration_s=0.3))
    assert result.num_ok == result.num_requests >= 4
    assert result.elapsed_s < 5


def test_without_usage_chunks_are_counted(script: Script) -> None:
    script.has_usage = False
    result = load(script, closed())
    assert (result.output_tokens, result.input_tokens, result.tokens_from) == (36, 0, "chunks")


@pytest.mark.parametrize(
    ("behaviour", "kind", "detail"),
    [
        ("http_500", "http_500", "it broke"),
        ("cut", "cut", "without [DONE]"),
        ("no_done", "cut", "without [DONE]"),
        ("error_event", "error_event", "engine died"),
        ("not_http", "malformed", "not an HTTP answer"),
        ("json", "malformed", "not an event stream"),
        ("drop", "disconnected", "before an answer"),
    ],
)
def test_each_failure_is_counted_by_its_kind(script: Script, behaviour: str, kind: str, detail: str) -> None:
    script.behaviour = behaviour
    result = load(script, closed(requests=5, concurrency=2))
    assert result.errors == {kind: 5}
    assert detail in result.error_examples[kind]
    assert (result.num_ok, result.is_valid) == (0, False)


@pytest.mark.slow
def test_a_server_that_never_answers_is_a_timeout_and_its_connection_is_not_used_again(
    script: Script,
) -> None:
    script.behaviour = "hang"
    result = load(script, closed(requests=2, concurrency=1, timeout_s=0.2))
    assert result.errors == {"timeout": 2}
    assert script.num_connections == 2


def test_a_refused_connection_is_counted_with_the_address() -> None:
    with socket.socket() as listener:  # bound and not listening: nobody else can take the port
        listener.bind(("127.0.0.1", 0))
        script = Script(port=listener.getsockname()[1])
        result = load(script, closed(requests=3, concurrency=1))
    assert result.errors == {"connect": 3}
    assert str(script.port) in result.error_examples["connect"]


def test_a_connection_that_the_server_closed_when_idle_is_no_failure(script: Script) -> None:
    script.behaviour = "close"  # after each answer, without saying so
    result = load(script, closed(requests=6, concurrency=1))
    assert (result.num_ok, script.num_connections) == (6, 6)


def test_a_warm_up_that_fails_altogether_ends_the_run(script: Script) -> None:
    script.behaviour = "http_500"
    with pytest.raises(WarmupFailed, match="it broke"):
        load(script, closed(warmup=2))


def test_progress_is_counted_while_running(script: Script) -> None:
    progress = Progress()
    run_load(parse_target(script.url, "/chat/completions"), workload(), closed(), progress=progress)
    assert (progress.phase, progress.num_sent, progress.num_ended, progress.num_tokens) == (
        "measuring",
        6,
        6,
        36,
    )


def test_the_json_report_keeps_its_schema(script: Script) -> None:
    target: Target = parse_target(script.url, "/chat/completions")
    report = run_suite(target, workload(), [closed(), closed(concurrency=1)], Slo(ttft_ms=5000))
    tree = msgspec.json.decode(to_json(report))
    assert msgspec.json.decode(to_json(report), type=BenchReport) == report
    assert tree["schema_version"] == 1
    assert [run["concurrency"] for run in tree["runs"]] == [3, 1]
    assert set(tree["runs"][0]) >= {
        "mode", "concurrency", "rate", "num_requests", "num_ok", "num_failed", "errors", "elapsed_s",
        "requests_per_s", "output_tokens_per_s", "input_tokens_per_s", "tokens_from", "ttft_ms", "itl_ms",
        "tpot_ms", "end_to_end_ms", "goodput_per_s", "client_cpu_ratio", "is_valid", "invalid_reasons",
    }  # fmt: skip
    assert set(tree["runs"][0]["ttft_ms"]) == {"count", "mean", "p50", "p90", "p99", "max"}
    assert tree["runs"][0]["goodput_ratio"] == 1.0


def test_the_server_is_asked_for_its_models(script: Script) -> None:
    assert choose_model(script.url, "", {}) == "tiny"
    with pytest.raises(TargetError, match="It has: tiny"):
        choose_model(script.url, "other", {})
    script.behaviour = "http_401"
    with pytest.raises(TargetError, match=r"401.*HEADRACE_API_KEY"):
        choose_model(script.url, "", {})
