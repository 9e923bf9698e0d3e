"""Steady streaming load for tests, that says how each request ended: exactly one outcome each."""

from __future__ import annotations

import collections
import json
import threading
import time
from types import TracebackType

import httpx


class Load:
    """`num_clients` threads, each sending one streaming request after the other until the block ends.

    Outcomes: finished ([DONE] seen), error_event (an error and no [DONE]), cut (neither), done_after_error
    (must never happen), status_N, connect_error.
    """

    def __init__(self, url: str, model: str = "chat", num_clients: int = 8, num_tokens: int = 40) -> None:
        self._url = url
        self._body = {
            "model": model,
            "stream": True,
            "max_tokens": num_tokens,
            "messages": [{"role": "user", "content": "Count."}],
        }
        self._num_tokens = num_tokens
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a request never ended"

    def wait_for(self, num_more: int, outcome: str = "finished", timeout_s: float = 30) -> None:
        """Wait until `num_more` further requests have had this outcome."""
        target = self.outcomes[outcome] + num_more
        deadline = time.monotonic() + timeout_s
        while self.outcomes[outcome] < target:
            assert time.monotonic() < deadline, (
                f"no {num_more} more {outcome} in {timeout_s} s: {self.outcomes}"
            )
            time.sleep(0.02)

    def _run(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._stopped.is_set():
                outcome = self._one(client)
                with self._lock:
                    self.outcomes[outcome] += 1
                if outcome == "connect_error":
                    time.sleep(0.05)

    def _one(self, client: httpx.Client) -> str:
        has_error = is_done = False
        try:
            with client.stream("POST", f"{self._url}/chat/completions", json=self._body) as response:
                if response.status_code != 200:
                    response.read()
                    return f"status_{response.status_code}"
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        is_done = True
                    elif line.startswith("data: ") and "error" in json.loads(line[6:]):
                        has_error = True
        except httpx.ConnectError:
            return "connect_error"
        except httpx.TransportError:
            return "cut_after_done" if is_done else "cut"
        if has_error:
            return "done_after_error" if is_done else "error_event"
        return "finished" if is_done else "cut"
