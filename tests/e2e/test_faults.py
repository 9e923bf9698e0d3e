"""What breaks must not take anything else with it: every process of the system, killed or stopped under load.

The engines are simulated (the processes around them are real), so that a stream's timing is known.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest

from tests.e2e.conftest import RunningSystem, running, wait_until
from tests.e2e.load import Load

pytestmark = pytest.mark.slow
CONFIG = """
endpoints:
  chat:
    model: simulated
    engine: simulated
    replicas: {min: 2, max: 4}
    simulated: {step_ms: 5}
  other:
    model: simulated
    engine: simulated
    replicas: {min: 0, max: 1}
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    with running(CONFIG, tmp_path_factory.mktemp("run")) as system:
        yield system


def pids_of(system: RunningSystem, *titles: str) -> list[int]:
    return [system.find_process(title).pid for title in titles]


FRONTS_AND_ENGINES = ("headrace: front chat-1", "headrace: front chat-2", "headrace: engine chat-1")


def wait_replaced(system: RunningSystem, title: str, old_pid: int) -> psutil.Process:
    def replacement() -> psutil.Process | None:
        with contextlib.suppress(AssertionError):
            process = system.find_process(title)
            return process if process.pid != old_pid else None
        return None

    process: psutil.Process = wait_until(replacement, 15, f"a new process {title!r}")
    return process


def test_a_killed_router_costs_no_request(system: RunningSystem) -> None:
    before = pids_of(system, *FRONTS_AND_ENGINES)
    with Load(system.url) as load:
        load.wait_for(16)
        router = system.find_process("headrace: router")
        router.kill()
        load.wait_for(32)
        wait_replaced(system, "headrace: router", router.pid)
        load.wait_for(32)
    assert set(load.outcomes) == {"finished"}, load.outcomes
    assert pids_of(system, *FRONTS_AND_ENGINES) == before


def test_a_stopped_router_costs_no_request(system: RunningSystem) -> None:
    with Load(system.url) as load:
        load.wait_for(16)
        router = system.find_process("headrace: router")
        router.send_signal(signal.SIGSTOP)
        try:
            load.wait_for(32)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                router.send_signal(signal.SIGCONT)
        load.wait_for(32)
    assert set(load.outcomes) == {"finished"}, load.outcomes


def test_a_killed_controller_costs_no_request_and_touches_nothing_healthy(system: RunningSystem) -> None:
    before = pids_of(system, *FRONTS_AND_ENGINES, "headrace: router")
    with Load(system.url) as load:
        load.wait_for(16)
        controller = system.find_process("headrace: controller")
        controller.kill()
        wait_replaced(system, "headrace: controller", controller.pid)
        load.wait_for(32)
        wait_until(lambda: system.status().get("is_ready"), 20, "the new controller sees the system ready")
        load.wait_for(16)
    assert set(load.outcomes) == {"finished"}, load.outcomes
    assert pids_of(system, *FRONTS_AND_ENGINES, "headrace: router") == before


def test_a_killed_engine_costs_no_stream_and_comes_back(system: RunningSystem) -> None:
    with Load(system.url) as load:
        load.wait_for(16)
        engine = system.find_process("headrace: engine chat-1")
        engine.kill()
        load.wait_for(64)
        wait_replaced(system, "headrace: engine chat-1", engine.pid)
        load.wait_for(64)
    assert set(load.outcomes) == {"finished"}, load.outcomes


def test_a_killed_front_fails_only_its_own_streams_and_is_replaced(system: RunningSystem) -> None:
    with Load(system.url) as load:
        load.wait_for(16)
        front = system.find_process("headrace: front chat-2")
        front.kill()
        load.wait_for(64)
        wait_replaced(system, "headrace: front chat-2", front.pid)
        load.wait_for(64)
    others = {outcome: count for outcome, count in load.outcomes.items() if outcome != "finished"}
    assert set(others) <= {"cut", "error_event"}, load.outcomes
    assert sum(others.values()) <= 8, load.outcomes
    wait_until(lambda: system.status().get("is_ready"), 20, "both replicas are back")


def test_a_killed_haproxy_is_back_with_its_servers(system: RunningSystem) -> None:
    with Load(system.url) as load:
        load.wait_for(16)
        haproxy = next(process for process in system.descendants() if "haproxy" in process.name())
        haproxy.kill()
        load.wait_for(64)
    assert set(load.outcomes) <= {"finished", "cut", "connect_error"}, load.outcomes
    # HAProxy's worker may outlive its killed master by a moment, and takes connections until it ends too.
    assert load.outcomes["cut"] <= 16, load.outcomes


def test_an_endpoint_at_zero_holds_its_request_until_a_replica_is_up(system: RunningSystem) -> None:
    status = next(item for item in system.status()["endpoints"] if item["name"] == "other")
    assert status["ready"] == 0
    response = httpx.post(
        f"{system.url}/chat/completions",
        json={"model": "other", "max_tokens": 30, "messages": [{"role": "user", "content": "Hello"}]},
        timeout=30,
    )
    assert response.status_code == 200
    assert "simulated" in response.json()["choices"][0]["message"]["content"]
    assert response.headers["x-headrace-replica"] == "other-1"


def test_bad_requests_lose_nothing_else_in_flight(system: RunningSystem) -> None:
    chat = f"{system.url}/chat/completions"
    message = {"role": "user", "content": "Hello"}
    cases: list[tuple[int, dict[str, object]]] = [
        (400, {"content": b"{not json"}),
        (400, {"json": {"model": "chat", "messages": []}}),
        (400, {"json": {"model": "chat", "messages": "hello"}}),
        (404, {"json": {"model": "nope", "messages": [message]}}),
        (400, {"json": {"model": "chat", "messages": [message], "max_tokens": 0}}),
        (400, {"json": {"model": "chat", "messages": [message], "max_tokens": 10**9}}),
        (400, {"json": {"model": "chat", "messages": [message], "stop": 5}}),
        (400, {"json": {"model": "chat", "messages": [{"role": "user", "content": "x" * 40_000}]}}),
        (413, {"json": {"model": "chat", "messages": [message]}, "headers": {"x-long": "x" * 60_000}}),
        (413, {"content": b"x" * (33 * 2**20)}),
    ]
    with Load(system.url) as load:
        for expected, arguments in cases:
            response = httpx.post(chat, timeout=30, **arguments)  # type: ignore[arg-type]
            assert response.status_code == expected, (
                arguments.keys(),
                response.status_code,
                response.text[:300],
            )
            assert response.json()["error"]["message"], response.text
        assert httpx.delete(chat, timeout=30).status_code == 405
        assert httpx.get(f"{system.url}/nothing", timeout=30).status_code == 404
        load.wait_for(8)
    assert set(load.outcomes) == {"finished"}, load.outcomes


def test_a_long_body_finds_its_model_wherever_it_stands_and_survives_the_relays_end(
    system: RunningSystem,
) -> None:
    client = openai.OpenAI(base_url=system.url, api_key="none", max_retries=0, timeout=30)
    with pytest.raises(openai.BadRequestError, match="context") as caught:  # said by the front: it got there
        client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "x " * 500_000}])
    assert caught.value.response.headers["x-headrace-replica"].startswith("chat-")

    # A field that is ignored, before the model: as long as a prompt, without its tokens.
    message = {"role": "user", "content": "Hello"}
    tree = {"metadata": {"note": "x" * 5_000_000}, "messages": [message], "max_tokens": 5, "model": "chat"}

    def ask() -> httpx.Response:
        return httpx.post(f"{system.url}/chat/completions", json=tree, timeout=30)

    assert ask().status_code == 200
    relay = system.find_process("headrace: relay")
    relay.kill()
    wait_replaced(system, "headrace: relay", relay.pid)
    wait_until(lambda: ask().status_code == 200, 10, "the new relay is used")
    too_long = {**tree, "metadata": {"note": "x" * 40_000_000}}
    response = httpx.post(f"{system.url}/chat/completions", json=too_long, timeout=30)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")


def test_clients_that_leave_free_their_place(system: RunningSystem) -> None:
    body = {
        "model": "chat",
        "stream": True,
        "max_tokens": 20_000,
        "messages": [{"role": "user", "content": "Go"}],
    }
    for _ in range(5):
        with httpx.stream("POST", f"{system.url}/chat/completions", json=body, timeout=30) as response:
            next(response.iter_bytes())

    def is_free() -> bool:
        return all(replica["num_running"] == 0 for replica in system.status()["replicas"])

    wait_until(is_free, 10, "engines run nothing after their clients left")


def test_every_request_ends_in_exactly_one_state(system: RunningSystem) -> None:
    """Runs last, over the counters of everything above."""

    def is_conserved() -> bool:
        endpoints = system.status().get("endpoints", [])
        return bool(endpoints) and all(
            endpoint["num_in_flight"] == 0
            and endpoint["num_held"] == 0
            and endpoint["arrived"]
            == endpoint["finished"] + endpoint["aborted"] + endpoint["refused"] + endpoint["failed_requests"]
            for endpoint in endpoints
        )

    try:
        # A request that died with HAProxy on its way to a front is given up RECONCILE_AFTER_S (30 s) later.
        wait_until(is_conserved, 40, "arrived = finished + aborted + refused + failed")
    except AssertionError as error:
        raise AssertionError(f"{error}: {system.status().get('endpoints')}") from None
    assert sum(endpoint["finished"] for endpoint in system.status()["endpoints"]) > 0


def test_sigkill_of_the_supervisor_ends_everything(system: RunningSystem) -> None:
    processes = system.descendants()
    system.process.kill()
    system.process.wait(10)
    deadline = time.monotonic() + 5
    _, alive = psutil.wait_procs(processes, timeout=max(0.0, deadline - time.monotonic()))
    assert alive == []
