"""Gateways on nodes of their own: two hosts have one each, a third has the replica, a fourth the rest."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import httpx
import pytest
from tests.integration.gateway_rig import wait_for
from tests.integration.hosts_rig import LIMIT_S, RunningSystem, free_port, running_system

from headrace.api.config import Config
from headrace.api.messages import CreateKey, NodeState
from headrace.control import essentials, gateway_state
from headrace.fabric.shared_run_directory import host_run_directory

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_place")]
KEY = "hr-test-key"
HEAD = NodeState("head", "127.0.0.2", True, {"CPU": 1.0}, {}, {"kind": "head"})
EDGES = [NodeState(f"edge{n}", f"127.0.0.{n + 2}", True, {"CPU": 1.0}, {}, {"kind": "edge"}) for n in (1, 2)]
SPARE = NodeState("edge3", "127.0.0.5", True, {"CPU": 1.0}, {}, {"kind": "edge"})
WORKER = NodeState("worker", "127.0.0.6", True, {"CPU": 1.0}, {}, {"kind": "worker"})


def make_config(state_dir: Path, bind: str, **endpoint: object) -> Config:
    chat = {
        "model": "smollm2-135m-instruct",
        "engine": "simulated",
        "nodes": {"labels": {"kind": "worker"}},
        **endpoint,
    }
    return Config.model_validate(
        {
            "launcher": "ray",
            "state_dir": str(state_dir),
            "endpoints": {"chat": chat},
            "tenants": {"acme": {"keys": [f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"]}},
            "gateway": {"bind": bind, "count": 2, "placement": {"labels": {"kind": "edge"}}},
        }
    )


def urls(system: RunningSystem) -> list[str]:
    return [gateway.url for gateway in system.status().gateways]


async def test_each_gateway_has_a_node_and_one_whose_node_is_lost_comes_again_on_another(
    tmp_path: Path,
) -> None:
    port = free_port()
    config = make_config(tmp_path, f"node:{port}")
    async with running_system(config, [HEAD, *EDGES, WORKER]) as system:
        await system.until("both gateways serve", ready=1)
        assert sorted(urls(system)) == [f"http://127.0.0.{n}:{port}/v1" for n in (3, 4)]
        for url in urls(system):
            assert (await system.ask(url, KEY)).status_code == 200
            assert (await system.ask(url, "hr-no-key")).status_code == 401
        first, second = system.gateway("g1"), system.gateway("g2")
        log = host_run_directory("demo", first.url.split("//")[1].split(":")[0]) / "logs/requests-g1.jsonl"

        def is_recorded() -> bool:
            return log.exists() and "acme" in log.read_text()

        await wait_for(
            lambda: log.exists() and "acme" in log.read_text(),
            "its requests are recorded where it is",
            LIMIT_S,
        )
        system.lose(first.node)
        assert (await system.ask(second.url, KEY)).status_code == 200
        await wait_for(
            lambda: "each of the 1 nodes that would do has one already" in system.gateway("g1").waiting_for,
            "the lost one waits for a node",
            LIMIT_S,
        )
        assert system.gateway("g1").url == ""
        assert (await system.ask(second.url, KEY)).status_code == 200
        system.cluster.add_node(SPARE)
        await system.until("it is there again", ready=1)
        assert system.gateway("g1").url == f"http://{SPARE.address}:{port}/v1"
        assert system.gateway("g2") == second or system.gateway("g2").node == second.node
        for url in urls(system):
            assert (await system.ask(url, KEY)).status_code == 200


async def test_gateways_that_are_cut_off_from_the_controller_serve_and_are_told_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, f"node:{free_port()}", streams={"durable": True})
    async with running_system(config, [HEAD, *EDGES, WORKER]) as system:
        await system.until("both gateways serve", ready=1)
        fronts = {front.replica_id: front.node for front in system.status().durable_fronts}
        assert sorted(fronts.values()) == [node.node_id for node in EDGES]
        for gateway in system.status().gateways:
            answer = await system.ask(gateway.url, KEY)
            assert fronts[answer.headers["x-headrace-replica"]] == gateway.node, (
                "they stand beside their gateway"
            )
        before = {process.name: process.pid for process in system.status().processes}
        monkeypatch.setattr(essentials, "HUNG_AFTER_S", 5.0)
        monkeypatch.setattr(gateway_state, "HUNG_AFTER_S", 5.0)
        tunnels = system.launcher._own_tunnels
        run_directory, tunnels._run_directory = tunnels._run_directory, None
        tunnels.set(None)
        await wait_for(
            lambda: sum("nothing is heard of it" in text for text in system.status().warnings) == 2,
            "the controller hears neither",
            LIMIT_S,
        )
        routers = [pair.router for pair in system.controller._state.gateway.pairs.values()]
        await wait_for(
            lambda: all(time.monotonic() - router.heard_s > 6.0 for router in routers),
            "they would be killed, were they on this node",
            LIMIT_S,
        )
        key = system.controller._obey(CreateKey("acme")).key
        for url in urls(system):
            assert (await system.ask(url, KEY)).status_code == 200
            assert (await system.ask(url, key)).status_code == 401
        tunnels._run_directory = run_directory
        system.launcher._replan.set()
        await system.until("they are heard again", ready=1)
        for url in urls(system):
            assert (await system.ask(url, key)).status_code == 200
        after = {process.name: process.pid for process in system.status().processes}
        assert after == before, "nobody was taken for hung"


async def test_a_gateway_leaves_a_drained_node_when_its_streams_have_ended_and_comes_again_on_another(
    tmp_path: Path,
) -> None:
    simulated = {"engine": "simulated", "simulated": {"step_ms": 20}, "streams": {"durable": True}}
    config = make_config(tmp_path, f"node:{free_port()}", **simulated)
    async with running_system(config, [HEAD, *EDGES, SPARE, WORKER]) as system:
        await system.until("both gateways serve", ready=1)
        left, kept = system.gateway("g1"), system.gateway("g2")
        [free] = {node.node_id for node in (*EDGES, SPARE)} - {left.node, kept.node}
        body = {"model": "chat", "stream": True, "max_tokens": 150, "ignore_eos": True}
        body["messages"] = [{"role": "user", "content": "hi"}]
        url, headers = f"{left.url}/chat/completions", {"authorization": f"Bearer {KEY}"}
        async with (
            httpx.AsyncClient(timeout=LIMIT_S) as client,  # its connection ends with the block
            client.stream("POST", url, json=body, headers=headers) as answer,
        ):
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            system.cluster.drain_node(left.node, time.time() + 60.0)
            await wait_for(
                lambda: any("takes no more connections" in text for text in system.status().warnings),
                "it leaves",
                LIMIT_S,
            )
            texts = [line async for line in lines if line]
        assert texts[-1] == "data: [DONE]"
        assert sum('"content"' in text for text in texts) >= 149
        await wait_for(lambda: system.gateway("g1").node == free, "it is on the free node", LIMIT_S)
        await system.until("both serve again", ready=1)
        assert system.gateway("g2") == kept or system.gateway("g2").node == kept.node
        for gateway in system.status().gateways:
            assert (await system.ask(gateway.url, KEY)).status_code == 200
        fronts = {front.node for front in system.status().durable_fronts}
        assert fronts == {free, kept.node}
