"""A system with a replica whose ranks are on two nodes: placed, answering, and back after a node is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.gateway_rig import wait_for
from tests.integration.hosts_rig import RunningSystem, free_port, last_words, running_system

from headrace.api.config import Config
from headrace.api.messages import NodeState
from headrace.fabric.host_keys import group_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_place", "library")]
LIMIT_S = 100.0
HEAD = NodeState("head", "127.0.0.2", True, {"CPU": 1.0})
OTHERS = [NodeState(f"other{n}", f"127.0.0.{n + 2}", True, {"CPU": 1.0}) for n in (1, 2)]


def make_config(directory: Path, port: int) -> Config:
    chat = {
        "model": "smollm2-135m-instruct",
        "engine": "native",
        "native": {"tensor_parallel": 2, "num_threads": 2, "dtype": "int8", "max_context_tokens": 256},
        "nodes": {"rank_strategy": "pack", "resources": {"CPU": 2}},
    }
    return Config.model_validate(
        {
            "launcher": "ray",
            "state_dir": str(directory / "state"),
            "endpoints": {"chat": chat},
            "gateway": {"bind": f"127.0.0.1:{port}"},
        }
    )


def is_serving(system: RunningSystem) -> bool:
    return [replica.state for replica in system.status().replicas] == ["ready"]


async def serves(system: RunningSystem) -> None:
    try:
        await wait_for(lambda: is_serving(system), "it serves", LIMIT_S)
    except AssertionError:
        print(system.status(), *last_words(), sep="\n")
        raise


def rank_nodes(system: RunningSystem) -> list[str]:
    """Of all ranks of the replica, rank 0's first."""
    (replica,) = system.status().replicas
    assert replica.arithmetic.endswith("in each of 2 ranks over TCP")
    keys = sorted(key for key in system.cluster.running if group_of(key) == replica.replica_id)
    return [system.cluster.running[key][1] for key in keys]


async def answer(system: RunningSystem) -> str:
    """The likeliest tokens, whoever computes them."""
    messages = [{"role": "user", "content": "Tell me about rivers."}]
    body = {"model": "chat", "max_tokens": 24, "temperature": 0, "messages": messages}
    response = await system.client.post(f"{system.url}/chat/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


async def test_a_replica_on_two_nodes_answers_and_comes_back_after_a_ranks_node_is_lost(
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path, free_port())
    async with running_system(config, [HEAD, OTHERS[0]]) as system:
        await serves(system)
        assert rank_nodes(system) == ["head", "other1"]
        expected = await answer(system)
        system.cluster.add_node(OTHERS[1])
        system.lose("other1")
        await wait_for(lambda: not is_serving(system), "the loss is seen", LIMIT_S)
        await serves(system)
        assert rank_nodes(system) == ["head", "other2"]
        assert await answer(system) == expected
