"""A system over several hosts: each has its own address on loopback and its own run directory, with real
keepers, tunnels, fronts and gateway, on a cluster that tests play."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import httpx
import psutil
import pytest
from tests.integration.gateway_rig import wait_for
from tests.integration.hosts_rig import LIMIT_S, free_port, running_system

from headrace.api.config import Config
from headrace.api.messages import NodeState
from headrace.api.run_paths import IDENTITY_FILE
from headrace.fabric.shared_run_directory import host_run_directory

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_place")]
HEAD = NodeState("head", "127.0.0.2", True, {"CPU": 1.0}, {}, {"kind": "head"})
WORKERS = [
    NodeState(f"worker{n}", f"127.0.0.{n + 2}", True, {"CPU": 0.1}, {}, {"kind": "worker"}) for n in (1, 2)
]


def processes_that_show(secret: str) -> list[str]:
    """The children of this process in whose arguments or environment the secret is."""
    return [
        f"{process.name()}: {kind}"
        for process in psutil.Process(os.getpid()).children(recursive=True)
        for kind in ("cmdline", "environ")
        if secret.encode() in Path(f"/proc/{process.pid}/{kind}").read_bytes()
    ]


def make_config(state_dir: Path, **endpoint: object) -> Config:
    chat = {
        "model": "smollm2-135m-instruct",
        "engine": "simulated",
        "replicas": {"min": 1, "max": 2},
        "nodes": {"labels": {"kind": "worker"}},
        **endpoint,
    }
    return Config.model_validate(
        {
            "launcher": "ray",
            "state_dir": str(state_dir),
            "endpoints": {"chat": chat},
            "gateway": {"bind": f"127.0.0.1:{free_port()}", "metrics_bind": ""},
        }
    )


async def test_a_replica_of_another_host_serves_and_one_whose_host_dies_is_replaced(tmp_path: Path) -> None:
    async with running_system(make_config(tmp_path), [HEAD, *WORKERS]) as system:
        await system.until("it serves", ready=1)
        answer = await system.ask()
        assert answer.status_code == 200, answer.text
        (replica,) = system.status().replicas
        first = next(node for node in WORKERS if node.node_id == replica.node)
        assert replica.address.startswith(f"{first.address}:")
        directory = host_run_directory("demo", first.address)
        for path in (directory / IDENTITY_FILE, directory / "controller.sock", directory / "g1/router.sock"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        secret = (directory / IDENTITY_FILE).read_text().splitlines()[1]
        assert processes_that_show(secret) == []
        system.lose(first.node_id)
        await wait_for(
            lambda: system.node_of("chat-1") not in ("", first.node_id), "another host has it", LIMIT_S
        )
        await system.until("it serves again", ready=1)
        answer = await system.ask()
        assert answer.status_code == 200, answer.text
        (replica,) = system.status().replicas
        assert "its node is gone" in replica.last_error


async def test_a_durable_stream_outlives_the_host_that_computes_it(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        replicas={"min": 2, "max": 2},
        streams={"durable": True},
        simulated={"step_ms": 20},
    )
    body = {
        "model": "chat",
        "max_tokens": 100,
        "seed": 1,
        "stream": True,
        "messages": [{"role": "user", "content": "hi"}],
    }
    async with running_system(config, [HEAD, *WORKERS]) as system:
        await system.until("both serve", ready=2)
        whole = await system.client.post(f"{system.url}/chat/completions", json={**body, "stream": False})
        expected = whole.json()["choices"][0]["message"]["content"]
        pieces: list[str] = []
        async with system.client.stream("POST", f"{system.url}/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    delta = httpx.Response(200, content=line[6:]).json()["choices"][0]["delta"]
                    pieces.append(delta.get("content") or "")
                    if len(pieces) == 10:
                        hosts = {r.node for r in system.status().replicas if r.num_open or r.num_guests}
                        assert hosts
                        system.lose(hosts.pop())
        assert "".join(pieces) == expected
