"""Streams that outlive their engine: real fronts, simulated engines, each killed in the middle of answers."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from tests.integration.front_process import RunningFront, check_conservation
from tests.integration.sibling_fronts import Fronts, sibling_fronts

from headrace.api.messages import EngineSpec

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


class Answer:
    """An answer that is read in a thread; `at` tokens call `disturb`."""

    def __init__(
        self,
        front: RunningFront,
        request_id: str,
        at: int = 0,
        disturb: Callable[[], object] | None = None,
        **fields: Any,
    ) -> None:
        body = {"model": "chat", "prompt": "Tell me", "max_tokens": NUM_TOKENS, "stream": True, **fields}
        self._body, self._at, self._disturb = body, at, disturb
        self._url = f"{front.url}/v1/completions"
        self._headers = {"x-headrace-request-id": request_id}
        self.lines: list[str] = []
        self.status = 0
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, headers=self._headers, timeout=60) as answer:
            self.status = answer.status_code
            for line in answer.iter_lines():
                if not line:
                    continue
                self.lines.append(line)
                self._begun.set()
                if len(self.lines) == self._at and self._disturb is not None:
                    self._disturb()
        self._begun.set()

    def wait_begin(self) -> Answer:
        assert self._begun.wait(20)
        return self

    def text(self) -> str:
        """The whole body, but for the second it was made in, which is the same in all its events. Of several
        choices one after another: how their events follow each other is not promised."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        lines = self.lines
        if self._body["stream"] and self._body.get("n", 1) > 1:
            lines = sorted(lines, key=lambda line: re.search(r'"index":\d+|$', line)[0] or "last")  # type: ignore[index]
        text = "\n".join(lines)
        assert len(set(re.findall(r'"created":(\d+)', text))) == 1, text
        return re.sub(r'"created":\d+', "", text)


def kill_engine(fronts: Fronts, index: int) -> None:
    os.kill(fronts.report(index).engine_pid, signal.SIGKILL)


def wait_new_engine(fronts: Fronts, index: int, num_restarts: int) -> None:
    fronts.controller(index).wait_for(
        lambda report: report.state == "ready" and report.engine_restarts > num_restarts
    )


def last_line(front: RunningFront, request_id: str) -> dict[str, Any]:
    """The access log's last line of a request that has ended."""
    deadline_s = time.monotonic() + 5
    while True:
        lines = [line for line in front.access_log() if line["request_id"] == request_id]
        if (lines and lines[-1]["resumptions"]) or time.monotonic() > deadline_s:
            return lines[-1]
        time.sleep(0.02)


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


@pytest.mark.parametrize("at", [1, 23, NUM_TOKENS - 1])
def test_a_killed_engines_streams_go_on_with_the_same_bytes(ready: Fronts, at: int) -> None:
    num_restarts = ready.report(0).engine_restarts
    whole = ask_all(ready, f"kill{at}")
    assert ask_all(ready, f"kill{at}", at, lambda: kill_engine(ready, 0)) == whole
    wait_new_engine(ready, 0, num_restarts)
    ended = check_conservation(ready[0])
    assert ended["requests_total failed"] == ended["requests_total aborted"] == 0
    line = last_line(ready[0], f"kill{at}-one")
    assert (line["state"], line["output_tokens"]) == ("finished", NUM_TOKENS)
    assert (line["resumptions"], line["hosts"]) == (1, ["chat-2"])
    assert ready[1].metrics()["requests_accepted_total"] == 0, "guests are not the host's requests"
