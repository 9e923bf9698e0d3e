"""Streams that outlive their engine: real fronts, simulated engines, each killed in the middle of answers."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from tests.integration.disturbed_answer import Answer, kill_engine, last_line, wait_new_engine
from tests.integration.front_process import check_conservation
from tests.integration.sibling_fronts import Fronts, sibling_fronts

from headrace.api.messages import EngineSpec, LeaveBy, SetSleep, TerminalState

pytestmark = pytest.mark.slow
ENGINE = EngineSpec("simulated", "simulated", simulated_step_s=0.004)
NUM_TOKENS = 160


@pytest.fixture(scope="module")
def fronts() -> Iterator[Fronts]:
    with sibling_fronts([ENGINE] * 2, drain_grace_s=10.0) as fronts:
        yield fronts


@pytest.fixture
def ready(fronts: Fronts) -> Fronts:
    fronts.wait_ready()
    return fronts


CASES: dict[str, dict[str, Any]] = {
    "two-choices": {"seed": 7, "n": 2},
    "logprobs": {"seed": 3, "logprobs": 2, "n": 2},
    "stop-string": {"seed": 13, "stop": ["never", "g slu"], "max_tokens": 400},
    "usage": {"seed": 6, "stream_options": {"include_usage": True}},
    "whole": {"seed": 8, "stream": False, "n": 3, "logprobs": 1},
    "whole-stop": {"seed": 13, "stream": False, "stop": ["never", "g slu"], "max_tokens": 400},
}


def ask_all(
    fronts: Fronts, prefix: str, at: int = 0, disturb: Callable[[], object] | None = None
) -> list[str]:
    """Ask all cases, and one request more, which calls `disturb` at its token `at`; return the bodies."""
    answers = [Answer(fronts[0], f"{prefix}-{name}", **fields) for name, fields in CASES.items()]
    fronts.controller(0).wait_for(
        lambda report: report.engine is not None and report.engine.num_running == 10
    )
    answers.append(Answer(fronts[0], f"{prefix}-one", at, disturb, seed=2))
    return [answer.text() for answer in answers]


def test_a_killed_engines_streams_go_on_with_the_same_bytes(ready: Fronts) -> None:
    """At the first token of one of them, in the middle, and at the last but one."""
    whole = ask_all(ready, "kill")
    for number, at in enumerate((1, 23, NUM_TOKENS - 1), 2):
        num_restarts = ready.report(0).engine_restarts
        assert ask_all(ready, "kill", at, lambda: kill_engine(ready, 0)) == whole, f"killed at token {at}"
        wait_new_engine(ready, 0, num_restarts)
        line = last_line(ready[0], "kill-one", number)
        assert (line["state"], line["output_tokens"]) == ("finished", NUM_TOKENS)
        assert (line["resumptions"], line["hosts"]) == (1, ["chat-2"])
    ended = check_conservation(ready[0])
    assert ended["requests_total failed"] == ended["requests_total aborted"] == 0
    assert ready[1].metrics()["requests_accepted_total"] == 0, "guests are not the host's requests"


def test_requests_that_wait_in_the_engine_go_on_too(ready: Fronts) -> None:
    def ask() -> list[Answer]:
        return [Answer(ready[0], f"wait-{seed}", seed=seed, n=5, max_tokens=150) for seed in range(8)]

    whole = [answer.text() for answer in ask()]
    broken = ask()  # 32 of 40 run, for longer than a report takes
    ready.controller(0).wait_for(lambda report: report.engine is not None and report.engine.num_waiting == 8)
    num_restarts = ready.report(0).engine_restarts
    kill_engine(ready, 0)
    assert [answer.text() for answer in broken] == whole
    assert sum(last_line(ready[0], f"wait-{seed}")["resumptions"] for seed in range(8)) == 40
    wait_new_engine(ready, 0, num_restarts)


def test_without_siblings_the_restarted_engine_goes_on(ready: Fronts) -> None:
    whole = Answer(ready[0], "alone", seed=4).text()
    ready.forget_each_other()
    broken = Answer(ready[0], "alone", 30, lambda: kill_engine(ready, 0), seed=4)
    assert broken.text() == whole
    assert last_line(ready[0], "alone")["hosts"] == []


def test_requests_that_come_while_an_engine_is_started_again_are_served(ready: Fronts) -> None:
    """One begins at a sibling; with none, it waits for the engine. Nobody is answered 503."""
    whole = Answer(ready[0], "held", seed=5).text()
    for number, has_sibling in enumerate((True, False), 2):
        if not has_sibling:
            ready.forget_each_other()
        num_restarts = ready.report(0).engine_restarts
        kill_engine(ready, 0)
        ready.controller(0).wait_for(lambda report: report.state == "starting")
        answer = Answer(ready[0], "held", seed=5)
        assert (answer.text(), answer.status) == (whole, 200)
        assert last_line(ready[0], "held", number)["state"] == "finished"
        wait_new_engine(ready, 0, num_restarts)
    check_conservation(ready[0])


def test_a_host_that_dies_in_turn_is_followed_by_the_own_engine(ready: Fronts) -> None:
    fields: dict[str, Any] = {"seed": 9, "max_tokens": 300}
    whole = Answer(ready[0], "twice", **fields).text()
    broken = Answer(ready[0], "twice", 30, lambda: kill_engine(ready, 0), **fields)
    ready.controller(1).wait_for(lambda report: report.num_guests == 1)
    ready.controller(0).wait_for(lambda report: report.num_hosted == 1)
    kill_engine(ready, 1)
    assert broken.text() == whole
    line = last_line(ready[0], "twice")
    assert (line["resumptions"], line["hosts"]) == (2, ["chat-2"])


def test_a_client_that_leaves_frees_the_host(ready: Fronts) -> None:
    body = {"model": "chat", "prompt": "x", "max_tokens": 20_000, "stream": True}
    headers = {"x-headrace-request-id": "leaves"}
    url = f"{ready[0].url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        kill_engine(ready, 0)
        ready.controller(1).wait_for(lambda report: report.num_guests == 1)
        next(lines)
    report = ready.controller(1).wait_for(lambda report: report.num_guests == 0)
    assert report.num_open == 0
    assert ready[0].router.wait_finished("leaves").state is TerminalState.ABORTED
    check_conservation(ready[0])


def test_a_replica_goes_on_standby_with_open_streams(ready: Fronts) -> None:
    fields: dict[str, Any] = {"seed": 11, "max_tokens": 500}
    whole = Answer(ready[0], "sleeps", **fields).text()
    sleeping = Answer(ready[0], "sleeps", 20, lambda: ready.controller(0).tell(SetSleep(1)), **fields)
    report = ready.controller(0).wait_for(lambda report: report.phase == "asleep at level 1")
    assert (report.state, report.num_open, report.num_hosted) == ("standby", 1, 1)
    assert sleeping.text() == whole
    ready.controller(0).tell(SetSleep(0))
    ready[0].wait_ready()
    assert last_line(ready[0], "sleeps")["resumptions"] == 1


def test_a_drained_replicas_engine_is_free_while_its_streams_go_on() -> None:
    fields: dict[str, Any] = {"seed": 12, "max_tokens": 500, "n": 2}
    with sibling_fronts([ENGINE] * 2, drain_grace_s=20.0, handover_after_s=0.1) as fronts:
        fronts.wait_ready()
        whole = Answer(fronts[0], "drained", **fields).text()
        drained = Answer(fronts[0], "drained", **fields).wait_begin()
        started_s = time.monotonic()
        fronts[0].process.send_signal(signal.SIGTERM)
        report = fronts.controller(0).wait_for(lambda report: report.engine_pid == 0)
        assert time.monotonic() - started_s < 2.5, "seconds, not the length of the stream"
        assert (report.state, report.num_open, report.num_hosted) == ("draining", 1, 2)
        assert drained.text() == whole
        assert fronts[0].process.wait(10) == 0
        assert fronts[1].metrics()["streams_guests"] == 0


def test_streams_leave_a_host_that_drains_and_one_that_is_killed_whole() -> None:
    fields: dict[str, Any] = {"seed": 13, "max_tokens": 500}
    with sibling_fronts([ENGINE] * 3, drain_grace_s=20.0, handover_after_s=0.1) as fronts:
        fronts.wait_ready()
        whole = Answer(fronts[0], "leaves", **fields).text()
        for number, leave in enumerate((signal.SIGTERM, signal.SIGKILL), 2):
            num_restarts = fronts.report(0).engine_restarts
            broken = Answer(fronts[0], "leaves", 5, lambda: kill_engine(fronts, 0), **fields)
            fronts.controller(0).wait_for(lambda report: report.num_hosted == 1)
            host = fronts.wait_host()
            wait_new_engine(fronts, 0, num_restarts)
            fronts[host].process.send_signal(leave)
            assert fronts[host].process.wait(10) == (0 if leave is signal.SIGTERM else -leave)
            assert broken.text() == whole
            line = last_line(fronts[0], "leaves", number)
            assert line["resumptions"] == 2
            assert line["hosts"][0] == f"chat-{host + 1}"


def test_a_stream_that_lost_two_engines_and_its_home_is_tried_at_the_last_sibling() -> None:
    slow = msgspec.structs.replace(ENGINE, simulated_prefill_token_s=0.1)
    with sibling_fronts([slow] * 3, drain_grace_s=20.0, handover_after_s=0.0) as fronts:
        fronts.wait_ready()
        whole = Answer(fronts[0], "suspect", seed=16).text()
        suspect = Answer(fronts[0], "suspect", seed=16)
        fronts.controller(0).wait_for(
            lambda report: report.engine is not None and report.engine.num_running == 1
        )
        kill_engine(fronts, 0)
        host = fronts.wait_host()
        kill_engine(fronts, host)
        fronts[0].process.send_signal(signal.SIGTERM)
        assert suspect.text() == whole
        assert fronts[0].process.wait(10) == 0
        hosts = last_line(fronts[0], "suspect", 2)["hosts"]
        assert hosts == [f"chat-{host + 1}", f"chat-{4 - host}"]


def test_a_stopped_engine_is_found_within_seconds_and_its_late_tokens_belong_to_nobody(
    ready: Fronts,
) -> None:
    fields: dict[str, Any] = {"seed": 17, "max_tokens": 300}
    whole = Answer(ready[0], "stopped", **fields).text()
    stopped = ready.report(0).engine_pid
    began: list[float] = []

    def stop_engine() -> None:
        os.kill(stopped, signal.SIGSTOP)
        began.append(time.monotonic())

    num_restarts = ready.report(0).engine_restarts
    broken = Answer(ready[0], "stopped", 100, stop_engine, **fields)
    assert broken.text() == whole
    assert time.monotonic() - began[0] < 15, "not the minute that the longest of steps may take"
    line = last_line(ready[0], "stopped")
    assert (line["resumptions"], line["hosts"], line["output_tokens"]) == (1, ["chat-2"], 300)
    with suppress(ProcessLookupError):
        os.kill(stopped, signal.SIGCONT)  # it was killed: there is nothing to go on
    wait_new_engine(ready, 0, num_restarts)
    assert not psutil.pid_exists(stopped)


def test_an_engine_that_is_stopped_for_a_moment_goes_on_and_gives_no_token_twice(ready: Fronts) -> None:
    fields: dict[str, Any] = {"seed": 18, "max_tokens": 300}
    whole = Answer(ready[0], "paused", **fields).text()
    report = ready.report(0)

    def pause() -> None:
        os.kill(report.engine_pid, signal.SIGSTOP)
        threading.Timer(1.0, os.kill, (report.engine_pid, signal.SIGCONT)).start()

    assert Answer(ready[0], "paused", 100, pause, **fields).text() == whole
    assert ready.report(0).engine_pid == report.engine_pid
    assert check_conservation(ready[0])["requests_total failed"] == 0


def test_a_long_step_is_no_hang() -> None:
    slow = msgspec.structs.replace(ENGINE, simulated_step_s=0.002, simulated_prefill_token_s=0.01)
    with sibling_fronts([slow]) as fronts:
        fronts[0].wait_ready()
        whole = Answer(fronts[0], "first", seed=19, max_tokens=200).text()  # its steps are known from here on
        assert whole
        prompt = "x" * 700
        long = Answer(fronts[0], "long", seed=20, max_tokens=2, prompt=prompt).text()
        assert long.endswith("data: [DONE]")
        report = fronts.report(0)
        assert report.engine is not None
        assert (report.engine_restarts, report.last_error) == (0, "")
        finished = fronts[0].router.wait_finished("long")
        assert finished.ttft_s > 5.0, "longer than the least silence that counts as a hang"


def test_a_front_that_is_stopped_goes_on_where_its_streams_are(ready: Fronts) -> None:
    """Its streams are a sibling's guests: the host outlasts the pause, or they go on elsewhere."""
    fields: dict[str, Any] = {"seed": 21, "max_tokens": 500}
    whole = Answer(ready[0], "asleep", **fields).text()
    num_restarts = ready.report(0).engine_restarts
    broken = Answer(ready[0], "asleep", 20, lambda: kill_engine(ready, 0), **fields)
    ready.controller(0).wait_for(lambda report: report.num_hosted == 1)
    ready[0].process.send_signal(signal.SIGSTOP)
    threading.Timer(6.0, ready[0].process.send_signal, (signal.SIGCONT,)).start()
    assert broken.text() == whole
    wait_new_engine(ready, 0, num_restarts)
    check_conservation(ready[0])


@pytest.mark.parametrize("source", ["file", "controller"])
def test_a_notice_moves_streams_and_ends_the_replica_in_time(tmp_path: Path, source: str) -> None:
    fields: dict[str, Any] = {"seed": 15, "max_tokens": 700}
    path = tmp_path / "notice"
    first = {"notice_file": str(path)}
    with sibling_fronts([ENGINE] * 2, first, drain_grace_s=600.0, handover_after_s=60.0) as fronts:
        fronts.wait_ready()
        assert fronts.report(0).leave_by_s < 0
        whole = Answer(fronts[0], "notice", **fields).text()
        moved = Answer(fronts[0], "notice", **fields).wait_begin()
        deadline_s = time.time() + 8
        if source == "file":
            path.write_text(json.dumps({"deadline_s": deadline_s}))
        else:
            fronts.controller(0).tell(LeaveBy(8.0))
        report = fronts.controller(0).wait_for(lambda report: report.num_hosted == 1)
        assert 2 < report.leave_by_s < 8
        assert moved.text() == whole
        assert fronts[0].process.wait(10) == 0
        assert time.time() < deadline_s


def test_an_address_that_says_that_the_machine_goes_ends_the_replica() -> None:
    answers, was_asked = [b"FALSE"], threading.Event()

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_right = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if is_right else 403)
            self.end_headers()
            self.wfile.write(answers[-1])
            was_asked.set()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = {
            "notice_url": f"http://127.0.0.1:{server.server_port}/preempted",
            "notice_headers": {"Metadata-Flavor": "Google"},
        }
        with sibling_fronts([ENGINE], asked, drain_grace_s=600.0) as fronts:
            fronts[0].wait_ready()
            assert was_asked.wait(10)
            assert fronts.report(0).leave_by_s < 0
            answers.append(b"TRUE")
            assert fronts[0].process.wait(10) == 0
            assert max(report.leave_by_s for report in fronts[0].router.reports) > 20
        server.shutdown()


def test_a_notice_whose_deadline_is_over_ends_the_replica_at_once(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    with sibling_fronts([ENGINE], {"notice_file": str(path)}, drain_grace_s=600.0) as fronts:
        fronts[0].wait_ready()
        fronts[0].router.releases = False
        stream = Answer(fronts[0], "late", max_tokens=30_000).wait_begin()
        path.write_text('{"deadline_s": 5}')
        assert fronts[0].process.wait(8) == 0
        stream.text()
        assert "overloaded" in stream.lines[-1]
        assert fronts[0].router.wait_finished("late").state is TerminalState.FAILED
