"""What a real front does when its engine, its clients or its time come to an end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from tests.integration.front_process import (
    SIMULATED,
    SOURCE,
    RunningFront,
    check_conservation,
    running_front,
)

from headrace.api.messages import EngineSpec, ReplicaSpec, TerminalState

pytestmark = pytest.mark.slow


@pytest.fixture
def front() -> Iterator[RunningFront]:
    with running_front(SIMULATED, drain_grace_s=5.0, resume_attempts=0) as front:
        front.wait_ready()
        yield front


class Stream:
    """A streamed completion that is read in a thread."""

    def __init__(self, front: RunningFront, request_id: str, max_tokens: int = 3000, **fields: Any) -> None:
        self._url = f"{front.url}/v1/completions"
        self._body = {"model": "chat", "prompt": "x", "max_tokens": max_tokens, "stream": True, **fields}
        self._headers = {"x-headrace-request-id": request_id}
        self.events: list[str] = []
        self.ended_at_s = 0.0
        self.is_truncated = False
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with httpx.stream(
                "POST", self._url, json=self._body, headers=self._headers, timeout=20
            ) as answer:
                for line in answer.iter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
                        self._has_begun.set()
        except httpx.RemoteProtocolError:
            self.is_truncated = True
        self.ended_at_s = time.monotonic()
        self._has_begun.set()

    def wait_begin(self) -> None:
        assert self._has_begun.wait(10)

    def wait_end(self) -> list[str]:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.events


def complete(front: RunningFront, **fields: Any) -> httpx.Response:
    body = {"model": "chat", "prompt": "x", "max_tokens": 3, **fields}
    return httpx.post(f"{front.url}/v1/completions", json=body, verify=False)


def test_a_killed_engine_ends_streams_that_may_not_be_continued_and_is_replaced(front: RunningFront) -> None:
    streams = [Stream(front, f"lost-{index}") for index in range(5)]
    for stream in streams:
        stream.wait_begin()
    old_pid = front.router.latest.engine_pid
    killed_at_s = time.monotonic()
    os.kill(old_pid, signal.SIGKILL)
    for index, stream in enumerate(streams):
        events = stream.wait_end()
        assert json.loads(events[-1])["error"]["code"] == "replica_lost"
        assert "[DONE]" not in events
        assert not stream.is_truncated, "the chunked body is whole"
        # The aim is 0.1 s; the rest is room for a busy machine.
        assert stream.ended_at_s - killed_at_s < 1.0
        assert front.router.wait_finished(f"lost-{index}").state is TerminalState.FAILED
    report = front.router.wait_for(lambda r: r.state == "ready" and r.engine_pid not in (0, old_pid))
    assert report.engine_restarts == 1
    assert "SIGKILL" in report.last_error
    assert complete(front).status_code == 200
    assert check_conservation(front)["requests_total failed"] == 5


def test_a_killed_engine_fails_a_request_that_is_not_streamed_with_502(front: RunningFront) -> None:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(complete(front, max_tokens=3000)))
    thread.start()
    report = front.router.wait_for(lambda r: r.engine is not None and r.engine.num_running == 1)
    os.kill(report.engine_pid, signal.SIGKILL)
    thread.join(10)
    assert answers[0].status_code == 502
    assert answers[0].json()["error"]["code"] == "replica_lost"


def test_while_the_engine_starts_requests_get_503_with_retry_after() -> None:
    engine = EngineSpec("simulated", "simulated", simulated_start_s=1.0)
    with running_front(engine) as front:
        response = complete(front)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        ready = httpx.get(f"{front.url}/ready", verify=False)
        assert (ready.status_code, ready.json()["status"]) == (503, "starting")
        assert httpx.get(f"{front.url}/health", verify=False).status_code == 200
        front.wait_ready()
        assert complete(front).status_code == 200
        assert check_conservation(front)["requests_total refused"] == 1


def test_a_missing_model_is_a_visible_failure_that_is_not_retried() -> None:
    with running_front(EngineSpec("native", "/nowhere/model.gguf")) as front:
        report = front.router.wait_for(lambda r: r.state == "failed")
        assert "/nowhere/model.gguf" in report.last_error
        assert not report.is_retryable
        response = complete(front)
        assert response.status_code == 503
        assert "/nowhere/model.gguf" in response.json()["error"]["message"]


def test_more_requests_than_the_front_takes_are_refused_and_the_others_are_whole() -> None:
    with running_front(SIMULATED, max_open=2) as front:
        front.wait_ready()
        streams = [Stream(front, f"open-{index}", 500) for index in range(2)]
        for stream in streams:
            stream.wait_begin()
        response = complete(front)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
        assert all(stream.wait_end()[-1] == "[DONE]" for stream in streams)
        check_conservation(front)


def test_a_client_that_does_not_read_is_cut_off_and_harms_no_other() -> None:
    engine = EngineSpec("simulated", "simulated", simulated_step_s=0.0002)
    with running_front(engine) as front:
        front.wait_ready()
        host, _, port = front.address.rpartition(":")
        idle = socket.socket()
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        idle.connect((host, int(port)))
        fields = {"model": "chat", "prompt": "x", "max_tokens": 30_000, "n": 16, "stream": True}
        body = json.dumps(fields).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nx-headrace-request-id: idle\r\ncontent-length: %d\r\n\r\n"
        idle.sendall(head % len(body) + body)
        other = Stream(front, "other", 300)
        assert front.router.wait_finished("idle", 30).state is TerminalState.ABORTED
        assert other.wait_end()[-1] == "[DONE]"
        assert psutil.Process(front.process.pid).memory_info().rss < 200e6
        idle.close()
        check_conservation(front)


def test_a_drain_finishes_what_is_open_and_serves_until_released(front: RunningFront) -> None:
    front.router.releases = False
    stream = Stream(front, "draining", 800)
    stream.wait_begin()
    front.process.send_signal(signal.SIGTERM)
    front.router.wait_for(lambda r: r.state == "draining")
    assert complete(front).status_code == 200, "not released yet"
    assert httpx.get(f"{front.url}/ready", verify=False).status_code == 503
    front.router.releases = True
    assert stream.wait_end()[-1] == "[DONE]"
    assert front.process.wait(10) == 0
    assert front.router.wait_finished("draining").state is TerminalState.FINISHED


def test_what_is_open_after_the_grace_ends_with_an_error() -> None:
    with running_front(SIMULATED, drain_grace_s=0.3) as front:
        front.wait_ready()
        stream = Stream(front, "too-long", 30_000)
        stream.wait_begin()
        front.process.send_signal(signal.SIGTERM)
        events = stream.wait_end()
        assert json.loads(events[-1])["error"]["code"] == "overloaded"
        assert "[DONE]" not in events
        assert front.process.wait(10) == 0
        assert front.router.wait_finished("too-long").state is TerminalState.FAILED


def test_without_a_router_a_drain_does_not_wait(front: RunningFront) -> None:
    front.router.close()
    started_s = time.monotonic()
    assert front.stop() == 0
    assert time.monotonic() - started_s < 3.0


def test_the_engine_dies_with_its_front() -> None:
    with running_front(SIMULATED) as front:
        engine = psutil.Process(front.wait_ready().engine_pid)
        assert engine.cmdline()[0].startswith("headrace: engine chat-1")
        front.process.kill()
        engine.wait(5)


def test_a_taken_port_is_said_and_not_waited_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        spec = msgspec.json.encode(ReplicaSpec("chat-1", "chat", SIMULATED, "", [], port=port)).decode()
        result = subprocess.run(
            [sys.executable, "-m", "headrace.replica", spec],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            capture_output=True,
            timeout=20,
            text=True,
        )
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "Traceback" not in result.stderr


async def test_reports_come_every_50_ms_while_busy_and_sequences_grow(front: RunningFront) -> None:
    stream = Stream(front, "busy", 500)
    stream.wait_begin()
    num_before = len(front.router.reports)
    await asyncio.to_thread(stream.wait_end)
    reports = front.router.reports[num_before:]
    assert len(reports) >= 10, "a second of stream, ten reports at least on a busy machine"
    sequences = [report.sequence for report in reports]
    assert sequences == sorted(set(sequences))
    assert max(report.num_open for report in reports) == 1
