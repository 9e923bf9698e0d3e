"""Answers that are disturbed in the middle: read in a thread, compared as a client would."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
from tests.integration.front_process import RunningFront
from tests.integration.sibling_fronts import Fronts


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
        body = {"model": "chat", "prompt": "Tell me", "max_tokens": 160, "stream": True, **fields}
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
