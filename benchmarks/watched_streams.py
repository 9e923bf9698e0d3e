"""Streams that are watched: what each gave, whether it is what an undisturbed one gives, its longest gap.

A steady load of streaming requests over a fixed list of prompts, temperature 0 or seeded, so that each has
one right answer. Owns the clients; must not know what happens to the system meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal

import httpx

LIMIT_S = 180.0
Outcome = Literal["same", "different", "cut", "error", "refused"]


@dataclass(frozen=True)
class Ask:
    """One request: a prompt of about `num_words` words, and how much of an answer."""

    number: int
    num_words: int
    num_tokens: int
    is_seeded: bool = False
    model: str = "chat"

    def body(self) -> dict[str, Any]:
        """Return the request as JSON would have it."""
        words = [f"item{(self.number * 7919 + k * 104729) % 9973}" for k in range(self.num_words)]
        return {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": self.num_tokens,
            "ignore_eos": True,
            **({"temperature": 0.9, "seed": self.number} if self.is_seeded else {"temperature": 0}),
            "messages": [{"role": "user", "content": "Tell a long story about: " + " ".join(words)}],
        }


@dataclass(eq=False)
class StreamResult:
    """What one stream gave."""

    ask: Ask
    text: str = ""
    usage: tuple[int, int] = (0, 0)
    """Prompt and completion tokens."""
    is_done: bool = False
    error: str = ""
    """Of an error event, a refusal or the connection."""
    status: int = 0
    begin_s: float = 0.0
    first_s: float = 0.0
    """When the first text came; 0: none did."""
    end_s: float = 0.0
    longest_gap_s: float = 0.0
    """Between two pieces of text."""
    comments: int = 0
    pieces: list[tuple[float, str]] = field(default_factory=list)
    """When each text came."""
    replica_id: str = ""
    """Whose front answers."""
    request_id: str = ""
    """As the request log has it."""

    def gap_after_s(self, moment_s: float) -> float | None:
        """Return the time from a moment to the next text. None: none came any more."""
        return next((at_s - moment_s for at_s, _ in self.pieces if at_s > moment_s), None)

    def usual_gaps_s(self) -> list[float]:
        """Return the times between texts, in rising order."""
        times_s = [at_s for at_s, _ in self.pieces]
        return sorted(later - earlier for earlier, later in pairwise(times_s))

    def outcome(self, right: StreamResult) -> Outcome:
        """Compare with the undisturbed answer to the same request."""
        if self.status != 200:
            return "refused"
        if self.error:
            return "error"
        if not self.is_done:
            return "cut"
        return "same" if (self.text, self.usage) == (right.text, right.usage) else "different"


async def ask(
    client: httpx.AsyncClient, url: str, request: Ask, is_open: list[StreamResult] | None = None
) -> StreamResult:
    """Send one request and read its stream to the end, whatever that is. Meanwhile it is in `is_open`."""
    result = StreamResult(request, begin_s=time.monotonic())
    if is_open is not None:
        is_open.append(result)
    try:
        async with client.stream("POST", f"{url}/chat/completions", json=request.body()) as answer:
            result.status = answer.status_code
            result.replica_id = answer.headers.get("x-headrace-replica", "")
            result.request_id = answer.headers.get("x-request-id", "")
            if answer.status_code != 200:
                result.error = (await answer.aread()).decode(errors="replace")[:300]
                return result
            async for line in answer.aiter_lines():
                _take_line(result, line)
    except (httpx.HTTPError, OSError) as error:
        result.error = result.error or f"{type(error).__name__}: {error}"
        if result.status == 200:
            result.is_done = False
            result.error = ""  # cut: what a client sees of it is the missing end
    finally:
        result.end_s = time.monotonic()
        if is_open is not None:
            is_open.remove(result)
    return result


def _take_line(result: StreamResult, line: str) -> None:
    if line.startswith(":"):
        result.comments += 1
    elif line == "data: [DONE]":
        result.is_done = True
    elif line.startswith("data: "):
        event = json.loads(line[6:])
        if "error" in event:
            result.error = str(event["error"].get("message", event["error"]))[:300]
            return
        if event.get("usage"):
            usage = event["usage"]
            result.usage = usage["prompt_tokens"], usage["completion_tokens"]
        text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if text:
            now_s = time.monotonic()
            if result.first_s:
                result.longest_gap_s = max(result.longest_gap_s, now_s - result.pieces[-1][0])
            else:
                result.first_s = now_s
            result.pieces.append((now_s, text))
            result.text += text


def make_client(num_connections: int, key: str = "", limit_s: float = LIMIT_S) -> httpx.AsyncClient:
    """Return a client for so many streams at once. key: of a tenant; empty: none is asked for.
    limit_s: how long it bears silence."""
    limits = httpx.Limits(max_connections=num_connections + 4)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(timeout=limit_s, limits=limits, headers=headers)


def ask_all(url: str, asks: list[Ask], at_once: int = 4, key: str = "") -> list[StreamResult]:
    """Send each request once, a few at a time, and return the answers in their order."""

    async def run() -> list[StreamResult]:
        room = asyncio.Semaphore(at_once)

        async def one(request: Ask) -> StreamResult:
            async with room:
                return await ask(client, url, request)

        async with make_client(at_once, key) as client:
            return list(await asyncio.gather(*(one(request) for request in asks)))

    return asyncio.run(run())


class SteadyLoad:
    """`num_streams` streams at any time, in a thread of its own, until the block ends."""

    def __init__(
        self,
        url: str,
        asks: list[Ask],
        right: list[StreamResult],
        num_streams: int,
        key: str = "",
        limit_s: float = LIMIT_S,
    ) -> None:
        """key, limit_s: as for `make_client`."""
        self._url = url
        self._key, self._limit_s = key, limit_s
        self._asks = asks
        self._right = {result.ask.number: result for result in right}
        self._num_streams = num_streams
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.results: list[StreamResult] = []
        self.open: list[StreamResult] = []

    def __enter__(self) -> SteadyLoad:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self._thread.join(2 * LIMIT_S)

    def end(self) -> None:
        """Begin no further stream; those that are open end in their time."""
        self._stop.set()

    def outcomes(self) -> Counter[Outcome]:
        """Count how the streams ended."""
        return Counter(result.outcome(self._right[result.ask.number]) for result in self.results)

    def wrong(self) -> list[str]:
        """Return a line for each stream that was not the same."""
        return [
            f"request {result.ask.number} ({result.request_id}): {outcome}: {result.status} "
            f"{result.error or result.text[-80:]!r}"
            for result in self.results
            if (outcome := result.outcome(self._right[result.ask.number])) != "same"
        ]

    async def _run(self) -> None:
        async with make_client(self._num_streams, self._key, self._limit_s) as client:
            await asyncio.gather(*(self._client(client, k) for k in range(self._num_streams)))

    async def _client(self, client: httpx.AsyncClient, position: int) -> None:
        while not self._stop.is_set():
            request = self._asks[position % len(self._asks)]
            position += self._num_streams
            result = await ask(client, self._url, request, self.open)
            self.results.append(result)
            if result.status != 200:
                await asyncio.sleep(0.05)
