"""Durable endpoints: replicas killed whole in the middle of answers; all real but the simulated engines."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

import headrace
from headrace.api.messages import ReplicaStatus
from headrace.control.serve import System

pytestmark = pytest.mark.slow
LIMIT_S = 30.0
NUM_TOKENS = 160
SIMULATED = {
    "model": "simulated",
    "engine": "simulated",
    "simulated": {"step_ms": 3, "prefill_ms_per_token": 0.02},
}
DURABLE = {"durable": True, "handover_after_s": 0.2}
TREE: dict[str, Any] = {
    "endpoints": {
        "chat": {**SIMULATED, "replicas": {"min": 2, "max": 2}, "streams": DURABLE},
        "lazy": {
            **SIMULATED,
            "replicas": {"min": 0, "max": 1},
            "streams": DURABLE,
            "queue": {"tell_after_s": 0},  # the relay's head would say nothing of who serves
        },
        "small": {
            **SIMULATED,
            "replicas": {"min": 2, "max": 2},
            "streams": DURABLE,
            "max_open": 4,
            "native": {"max_running": 4},
        },
    },
    "gateway": {"bind": "127.0.0.1:0"},
}


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with headrace.serve(TREE) as system:
        yield system


def replicas(system: System, endpoint: str = "chat") -> list[ReplicaStatus]:
    return [replica for replica in system.status().replicas if replica.endpoint == endpoint]


def num_running(system: System, endpoint: str = "chat") -> int:
    return sum(replica.num_running for replica in replicas(system, endpoint))


def durable_front(system: System, endpoint: str = "chat") -> ReplicaStatus:
    (front,) = [front for front in system.status().durable_fronts if front.endpoint == endpoint]
    return front


@pytest.fixture
def ready(system: System) -> System:
    system.wait_until_ready(LIMIT_S)
    return system


def until(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    deadline_s = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"after {limit_s} s still not: {what}"
        time.sleep(0.01)
    return value


class Ask:
    """One answer, read in a thread."""

    def __init__(self, url: str, headers: dict[str, str] | None = None, uds: str = "", **fields: Any) -> None:
        self._body = {
            "model": "chat",
            "prompt": "Tell me",
            "max_tokens": NUM_TOKENS,
            "stream": True,
            **fields,
        }
        self._url, self._headers, self._uds = url, headers or {}, uds
        self.lines: list[str] = []
        self.status = 0
        self.headers: httpx.Headers = httpx.Headers()
        self.error = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        transport = httpx.HTTPTransport(uds=self._uds) if self._uds else None
        try:
            with (
                httpx.Client(transport=transport, timeout=LIMIT_S) as client,
                client.stream(
                    "POST", f"{self._url}/completions", json=self._body, headers=self._headers
                ) as answer,
            ):
                self.status, self.headers = answer.status_code, answer.headers
                self.lines += (line for line in answer.iter_lines() if line)
        except httpx.HTTPError as error:
            self.error = repr(error)

    def wait_lines(self, count: int) -> Ask:
        until(lambda: len(self.lines) >= count or not self._thread.is_alive(), f"{count} lines")
        return self

    def join(self) -> None:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    def text(self) -> str:
        """The body without what differs from call to call. Of several choices one after another."""
        self.join()
        assert (self.status, self.error) == (200, ""), (self.status, self.error, self.lines[-1:])
        lines = self.lines
        if self._body.get("n", 1) > 1:
            lines = sorted(lines, key=lambda line: (re.search(r'"index":\d+|$', line) or [""])[0] or "last")
        return re.sub(r'"(created":\d+|id":"[^"]*")', "", "\n".join(lines))


def ask_all(url: str) -> list[Ask]:
    return [
        Ask(url, seed=1),
        Ask(url, seed=2, n=2, logprobs=1),
        Ask(url, seed=3, stream=False),
        Ask(url, seed=4, stream=False, n=2),
        Ask(url, seed=13, stop=["never", "g slu"], max_tokens=400),
    ]


def kill(replica: ReplicaStatus) -> None:
    """The whole replica, at once."""
    for pid in (replica.pid, replica.engine_pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            assert pid == replica.engine_pid, "engines die with their fronts"


def busiest(system: System, endpoint: str = "chat") -> ReplicaStatus:
    return max(replicas(system, endpoint), key=lambda replica: replica.num_running)


def wait_idle(system: System) -> None:
    until(lambda: not any(r.num_open + r.num_in_flight for r in replicas(system)), "nothing is open", 5)


def request_log(system: System, request_id: str) -> dict[str, Any]:
    path = system.run_directory / "logs" / "requests-g1.jsonl"

    def find() -> dict[str, Any] | None:
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines() if request_id in line]
        return lines[-1] if lines else None

    line: dict[str, Any] = until(find, f"{request_id} is in the request log", 10)
    return line


def test_requests_are_a_durable_fronts_and_count_once_at_the_replica(ready: System) -> None:
    asks = [Ask(ready.url, seed=seed, n=2, max_tokens=300) for seed in range(3)]
    until(lambda: num_running(ready) == 6, "six choices run")
    front = durable_front(ready)
    assert (front.replica_id, front.num_open, front.num_hosted) == ("chat:g1-1", 3, 6)
    assert sorted((r.num_open, r.num_guests) for r in replicas(ready)) == [(1, 0), (2, 0)]
    until(lambda: sum(r.num_in_flight for r in replicas(ready)) == 3, "the router says so, too", 2)
    for ask in asks:
        ask.text()
        assert ask.headers["x-headrace-replica"] == front.replica_id
    line = request_log(ready, asks[0].headers["x-request-id"])
    assert line["replica"] in ("chat-1", "chat-2")
    assert (line["state"], line["output_tokens"], line["resumptions"]) == ("finished", 600, 0)
    assert line["engine_ms"] > 100, "its part of the steps that it shared"
    wait_idle(ready)


def test_a_new_router_learns_from_replicas_what_they_have_cached(ready: System) -> None:
    prompt = "A long story about a river and a mill, told again and again. " * 40
    headers = {"x-headrace-route": "1"}
    first = Ask(ready.url, headers, prompt=prompt, max_tokens=8)
    first.text()
    chosen = first.headers["x-headrace-route"].partition(";")[0]
    (router,) = [process for process in ready.status().processes if process.name == "router-g1"]
    os.kill(router.pid, signal.SIGKILL)
    until(lambda: any(p.name == "router-g1" and p.restarts for p in ready.status().processes), "a new router")
    ready.wait_until_ready(LIMIT_S)

    def is_asked() -> bool:
        """Whether HAProxy asks the new router. Until a check has found it, it chooses replicas by itself."""
        other = Ask(ready.url, headers, prompt="Something else", max_tokens=1)
        other.text()
        return "x-headrace-route" in other.headers

    until(is_asked, "HAProxy asks the new router")
    options = {"include_usage": True}
    again = Ask(ready.url, headers, prompt=prompt, max_tokens=8, stream_options=options)
    assert '"cached_tokens":2' in again.text()
    assert again.headers["x-headrace-route"].startswith(f"{chosen}; reason=prefix")


@pytest.mark.parametrize("at", [1, NUM_TOKENS - 1])
def test_a_replica_killed_whole_is_a_pause(ready: System, at: int) -> None:
    whole = [ask.text() for ask in ask_all(ready.url)]
    asks = ask_all(ready.url)
    asks[0].wait_lines(at)
    kill(busiest(ready))
    assert [ask.text() for ask in asks] == whole
    line = request_log(ready, asks[0].headers["x-request-id"])
    assert (line["state"], line["output_tokens"]) == ("finished", NUM_TOKENS)
    (endpoint,) = [each for each in ready.status().endpoints if each.name == "chat"]
    assert endpoint.failed_requests == endpoint.aborted == 0


def test_streams_outlive_all_replicas(ready: System) -> None:
    whole = [ask.text() for ask in ask_all(ready.url)]
    asks = ask_all(ready.url)
    asks[0].wait_lines(20)
    for replica in replicas(ready):
        kill(replica)
    assert [ask.text() for ask in asks] == whole


def test_moved_requests_take_their_slots_with_them(ready: System) -> None:
    asks = [Ask(ready.url, seed=seed, max_tokens=700) for seed in range(4)]
    until(lambda: num_running(ready) == 4, "all run")
    kill(busiest(ready))

    def other_has_all() -> bool:
        others = [r for r in replicas(ready) if r.num_running]
        return [(r.num_open, r.num_in_flight, r.num_guests) for r in others] == [(4, 4, 0)]

    until(other_has_all, "the other replica has four requests, each once", 5)
    for ask in asks:
        ask.text()
    wait_idle(ready)


def test_a_full_replica_refuses_guests_and_they_wait(ready: System) -> None:
    fields: dict[str, Any] = {"model": "small", "max_tokens": 500}
    whole = [ask.text() for ask in [Ask(ready.url, seed=seed, **fields) for seed in range(8)]]
    asks = [Ask(ready.url, seed=seed, **fields) for seed in range(8)]
    until(lambda: num_running(ready, "small") == 8, "all run")
    kill(busiest(ready, "small"))
    assert [ask.text() for ask in asks] == whole


def test_a_request_at_zero_replicas_is_held_and_then_durable(ready: System) -> None:
    ask = Ask(ready.url, model="lazy")
    ask.text()
    assert ask.headers["x-headrace-replica"] == "lazy:g1-1"
    assert request_log(ready, ask.headers["x-request-id"])["replica"] == "lazy-1"


def test_a_place_is_believed_from_gateways_alone(ready: System) -> None:
    """Idle replicas being equal, a front that chooses itself takes the first one."""
    front = durable_front(ready)
    headers = {"x-headrace-place": "chat-2"}

    def where(ask: Ask) -> list[str]:
        running: list[str] = until(
            lambda: [r.replica_id for r in replicas(ready) if r.num_running], "it runs", 5
        )
        ask.text()
        wait_idle(ready)
        return running

    wait_idle(ready)
    socket = str(ready.run_directory / f"front-{front.replica_id}.sock")
    assert where(Ask(f"http://{front.address}/v1", headers)) == ["chat-1"]
    assert where(Ask("http://front/v1", headers, uds=socket)) == ["chat-2"]
    for nonsense in ("chat-9", "x" * 300, "lazy-1"):
        Ask("http://front/v1", {"x-headrace-place": nonsense}, uds=socket, max_tokens=3).text()


def test_a_killed_durable_front_cuts_its_streams_and_nothing_else(ready: System) -> None:
    cut = Ask(ready.url, seed=1, max_tokens=5000).wait_lines(5)
    before = [(r.replica_id, r.pid, r.engine_pid) for r in replicas(ready)]
    os.kill(durable_front(ready).pid, signal.SIGKILL)
    meanwhile = Ask(ready.url, seed=2)
    meanwhile.text()
    assert meanwhile.headers["x-headrace-replica"] in ("chat-1", "chat-2"), "replicas stand in"
    cut.join()
    assert cut.error or cut.lines[-1] != "data: [DONE]"
    wait_idle(ready)
    ready.wait_until_ready(LIMIT_S)
    after = Ask(ready.url, seed=2)
    assert after.text() == meanwhile.text()
    assert after.headers["x-headrace-replica"].startswith("chat:g1-")
    assert before == [(r.replica_id, r.pid, r.engine_pid) for r in replicas(ready)]


def test_a_durable_front_that_is_wanted_no_more_ends_its_streams_first(ready: System) -> None:
    before = [(r.replica_id, r.pid) for r in replicas(ready)]
    streaming = Ask(ready.url, seed=1, max_tokens=800).wait_lines(5)
    chat = {**TREE["endpoints"]["chat"], "streams": {**DURABLE, "durable": False}}
    ready.apply({**TREE, "endpoints": {**TREE["endpoints"], "chat": chat}})
    until(lambda: durable_front(ready).state == "draining", "the durable front leaves", 5)
    plain = Ask(ready.url, seed=1, max_tokens=800)
    whole = plain.text()
    assert plain.headers["x-headrace-replica"] in ("chat-1", "chat-2")
    assert streaming.text() == whole
    until(lambda: all(f.endpoint != "chat" for f in ready.status().durable_fronts), "it is gone", 10)
    ready.apply(TREE)
    ready.wait_until_ready(LIMIT_S)
    durable = Ask(ready.url, seed=1, max_tokens=800)
    assert (durable.text(), durable.headers["x-headrace-replica"]) == (whole, "chat:g1-1")
    assert before == [(r.replica_id, r.pid) for r in replicas(ready)], "replicas stay as they are"
