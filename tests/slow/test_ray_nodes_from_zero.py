"""Demand that fits nowhere makes Ray's own autoscaler add a node, and a node that has nothing left goes.

The autoscaler is the real one (version 2); its provider starts "nodes" as processes of this machine.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.cluster.ray_rig import RayCluster, ray_cluster
from tests.cluster.test_ray_system import System, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
HEAD_NODE_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""What the provider calls the head; it is told to take this id."""
HEAD_NODE_TYPE = "ray.head.default"
"""What the fake provider calls it."""
IDLE_MINUTES = 0.1
UNUSED_LISTS = [
    *(f"{kind}setup_commands" for kind in ("", "head_", "worker_")),
    *("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"),
    *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
]


def autoscaler_config(cluster: RayCluster) -> Path:
    """A head that holds no replica, and nodes of one kind that do."""
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    tree = {
        "cluster_name": "fake",
        "max_workers": 2,
        "upscaling_speed": 100,
        "idle_timeout_minutes": IDLE_MINUTES,
        "head_node_type": HEAD_NODE_TYPE,
        "provider": {
            "type": "external",
            "module": provider,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_NODE_ID,
            "gcs_address": cluster.address,
        },
        "available_node_types": {
            HEAD_NODE_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "slot": 1},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in UNUSED_LISTS},
    }
    path = cluster.directory / "autoscaler.json"
    path.write_text(json.dumps(tree))
    return path


def prepare(cluster: RayCluster) -> list[str]:
    cluster.environment |= {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID,
    }
    return ["--num-cpus=1", f"--autoscaling-config={autoscaler_config(cluster)}"]


def test_nodes_from_zero_come_with_demand_and_go_when_idle() -> None:
    nodes = {"resources": {"CPU": 0.5, "slot": 1}}
    with (
        ray_cluster(prepare=prepare) as cluster,
        running(cluster, replicas={"min": 0, "max": 2}, nodes=nodes, queue={"max_wait_s": 180}) as system,
    ):
        assert len(system.status()["nodes"]) == 1
        timeline = Timeline(system)
        timeline.ask()
        timeline.wait("the node is there", lambda status: num_alive(status) == 2)
        timeline.wait("its replica is ready", lambda status: status["endpoints"][0]["ready"] == 1)
        timeline.wait_answer()
        (replica,) = system.status()["replicas"]
        assert replica["node"] not in ("", HEAD_NODE_ID)
        assert cluster.headrace("scale", "chat", "0").returncode == 0
        began_s = time.monotonic()
        system.wait(lambda status: not status["replicas"])
        left_s = time.monotonic()
        system.wait(lambda status: num_alive(status) == 1)
        print(f"the replica had left after {left_s - began_s:.1f} s, and the node after", end=" ")
        print(f"{time.monotonic() - left_s:.1f} s more; Ray was told {60 * IDLE_MINUTES:.0f} s")


def num_alive(status: dict[str, Any]) -> int:
    return sum(node["is_alive"] for node in status["nodes"])


class Timeline:
    """What happens after one request, with its seconds."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._began_s = time.monotonic()
        self._first_token_s = 0.0
        self._asking = threading.Thread(target=self._ask, daemon=True)

    def ask(self) -> None:
        """Send a request that finds no replica: that is the demand."""
        self._began_s = time.monotonic()
        self._asking.start()

    def wait(self, what: str, condition: Callable[[dict[str, Any]], bool]) -> None:
        self._system.wait(condition, 180)
        print(f"{what} after {time.monotonic() - self._began_s:.1f} s")

    def wait_answer(self) -> None:
        self._asking.join(60)
        assert self._first_token_s, "no token came"
        print(f"the first token came after {self._first_token_s:.1f} s")

    def _ask(self) -> None:
        body = {
            "model": "chat",
            "max_tokens": 4,
            "stream": True,
            "messages": [{"role": "user", "content": "hi"}],
        }
        url = f"http://127.0.0.1:{self._system.port}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=200) as answer:
            for line in answer.iter_lines():
                if '"content":"' in line.replace(" ", "") and not self._first_token_s:
                    self._first_token_s = time.monotonic() - self._began_s
