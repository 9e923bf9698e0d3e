"""Two gateways side by side on one port: each dies by itself, and the other does not notice.

The engines are simulated; HAProxies, routers, fronts and the controller are real.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
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
    replicas: {min: 2, max: 3}
    simulated: {step_ms: 5}
gateway:
  count: 2
"""
BACK_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    with running(CONFIG, tmp_path_factory.mktemp("run")) as system:
        yield system


def gateway_of_one_request(system: RunningSystem) -> str:
    """Send one request over a connection of its own; return the gateway that took it."""
    body = {"model": "chat", "max_tokens": 2, "messages": [{"role": "user", "content": "Go"}]}
    connection = http.client.HTTPConnection("127.0.0.1", system.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        response = connection.getresponse()
        assert response.status == 200, response.read()
        return response.headers["x-request-id"].split("-")[1]


@dataclass
class Stream:
    """One long answer, read in a thread of its own."""

    url: str
    gateway: str = ""
    num_events: int = 0
    outcome: str = ""

    def run(self) -> None:
        body = {
            "model": "chat",
            "stream": True,
            "max_tokens": 1000,
            "messages": [{"role": "user", "content": "Count"}],
        }
        try:
            with httpx.stream("POST", f"{self.url}/chat/completions", json=body, timeout=30) as response:
                self.gateway = response.headers["x-request-id"].split("-")[1]
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.outcome = "finished"
                    elif line.startswith("data: "):
                        assert "error" not in json.loads(line[6:]), line
                        self.num_events += 1
        except httpx.HTTPError as error:
            self.outcome = type(error).__name__


def processes_of(system: RunningSystem, name: str) -> list[psutil.Process]:
    """The process that status calls `name`, with its children."""
    pid = next(process["pid"] for process in system.status()["processes"] if process["name"] == name)
    process = psutil.Process(pid)
    return [process, *process.children()]


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    psutil.wait_procs(processes, 5)


def test_the_kernel_spreads_connections_and_both_gateways_know_every_replica(system: RunningSystem) -> None:
    taken = Counter(gateway_of_one_request(system) for _ in range(30))
    assert set(taken) == {"g1", "g2"}, taken
    status = system.status()
    names = {process["name"]: process["state"] for process in status["processes"]}
    assert {names[f"{kind}-{gateway}"] for kind in ("router", "haproxy") for gateway in taken} == {"running"}
    wait_until(
        lambda: system.status()["endpoints"][0]["finished"] >= 30, 5, "both routers' counts are added up"
    )


def test_a_killed_haproxy_costs_only_its_own_open_connections(system: RunningSystem) -> None:
    streams = [Stream(system.url) for _ in range(16)]
    threads = [threading.Thread(target=stream.run) for stream in streams]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(stream.num_events for stream in streams), 10, "all streams run")
    by_gateway = Counter(stream.gateway for stream in streams)
    assert set(by_gateway) == {"g1", "g2"}, by_gateway
    doomed = processes_of(system, "haproxy-g1")
    were_open = [stream for stream in streams if stream.gateway == "g1" and not stream.outcome]
    assert were_open, "the streams were over before they could be cut"
    kill(doomed)
    killed_s = time.monotonic()
    assert {gateway_of_one_request(system) for _ in range(4)} <= {"g1", "g2"}, "new connections work at once"
    wait_until(
        lambda: gateway_of_one_request(system) == "g1", BACK_WITHIN_S, "the killed one takes requests again"
    )
    assert time.monotonic() - killed_s < BACK_WITHIN_S
    for thread in threads:
        thread.join(30)
    assert Counter(s.outcome for s in streams if s.gateway == "g2") == {"finished": by_gateway["g2"]}
    assert "finished" not in {stream.outcome for stream in were_open}
    wait_until(lambda: system.status()["is_ready"], 5, "ready again")


def test_a_killed_router_costs_nothing(system: RunningSystem) -> None:
    with Load(system.url, num_clients=6, num_tokens=10) as load:
        load.wait_for(10)
        old = processes_of(system, "router-g2")
        kill(old)
        load.wait_for(30)
        wait_until(
            lambda: processes_of(system, "router-g2")[0].pid != old[0].pid and system.status()["is_ready"],
            10,
            "it is started again",
        )
        load.wait_for(10)
    assert set(load.outcomes) == {"finished"}, load.outcomes


def test_replicas_come_and_go_at_both_gateways_without_an_error(system: RunningSystem) -> None:
    with Load(system.url, num_clients=6, num_tokens=10) as load:
        load.wait_for(10)
        for count in (3, 1, 2):
            assert system.command("scale", "chat", str(count)).returncode == 0
            wait_until(
                lambda count=count: system.status()["is_ready"] and len(system.status()["replicas"]) == count,
                20,
                f"{count} replicas",
            )
            load.wait_for(10)
    assert set(load.outcomes) == {"finished"}, load.outcomes
