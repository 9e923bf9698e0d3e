"""A replica with ranks on two of three hosts: the answers of one process, and back after a host is killed.

`sh tests/cluster/in_namespaces.sh pytest tests/slow/test_ranks_on_hosts.py` (part of `make test-slow`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.cluster.hosts_rig import Host, wait_for
from tests.slow.ray_hosts import KEY, RayHosts, Status, serving_hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NATIVE = {"dtype": "int8", "max_context_tokens": 512, "kv_cache_mb": 32}
MODEL = {"model": "smollm2-135m-instruct", "engine": "native"}
ENDPOINTS = {
    "split": {
        **MODEL,
        "native": {**NATIVE, "tensor_parallel": 2, "num_threads": 2},
        "nodes": {"rank_strategy": "pack", "resources": {"CPU": 1.2}},  # each host has one: two are needed
    },
    "alone": {**MODEL, "native": {**NATIVE, "num_threads": 1}, "nodes": {"resources": {"CPU": 0.4}}},
}
READY_LIMIT_S = 180.0
HEALED_LIMIT_S = 60.0
"""For Ray's connections to come back, and what was given up to end."""
NUM_TOKENS = 48


@pytest.fixture
def cluster() -> Iterator[RayHosts]:
    with serving_hosts(ENDPOINTS) as cluster:
        yield cluster


def answer(cluster: RayHosts, model: str) -> str:
    body = {
        "model": model,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Tell me about rivers."}],
    }
    headers = {"authorization": f"Bearer {KEY}"}
    response = httpx.post(f"{cluster.url}/chat/completions", json=body, headers=headers, timeout=90)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    assert reply["usage"]["completion_tokens"] == NUM_TOKENS
    text: str = reply["choices"][0]["message"]["content"]
    return text


def hosts_of_ranks(cluster: RayHosts) -> list[Host]:
    """Where rank 0 and rank 1 are."""
    has_rank_0 = [host for host in cluster.hosts if any(" rank " not in title for title in engines(host))]
    return has_rank_0 + [host for host in cluster.hosts if has_rank_1(host)]


def has_rank_1(host: Host) -> bool:
    return any(" rank 1" in title for title in engines(host))


def explain(cluster: RayHosts) -> str:
    logs = [path for host in cluster.hosts for path in host.disk.glob("headrace-*/*/logs/split-*.log")]
    seen = [f"---- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs]
    return "\n".join([*seen, cluster.explain(cluster.status())])


def engines(host: Host) -> list[str]:
    return host.titles("headrace: engine split-")


def are_ready(status: Status) -> bool:
    replicas = status["replicas"]
    return bool(status["is_ready"]) and sorted((r["endpoint"], r["state"]) for r in replicas) == [
        ("alone", "ready"),
        ("split", "ready"),
    ]


@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_ranks_on_two_hosts_answer_as_one_process_and_come_back_when_a_host_is_lost(
    cluster: RayHosts, how: str
) -> None:
    before = cluster.wait("both serve", are_ready, READY_LIMIT_S)
    expected = answer(cluster, "alone")
    assert answer(cluster, "split") == expected
    (front,) = [r for r in before["replicas"] if r["endpoint"] == "split"]
    assert front["arithmetic"].endswith("in each of 2 ranks over TCP"), front["arithmetic"]
    order = 1 if how == "killed" else -1  # either rank's, where none is on the head
    victim = next(host for host in hosts_of_ranks(cluster)[::order] if host is not cluster.head)
    number = int(has_rank_1(victim))
    killed_s = time.monotonic()
    victim.kill() if how == "killed" else victim.cut()

    def is_missed(status: Status) -> bool:
        found = [r for r in status["replicas"] if r["endpoint"] == "split"]
        return [(r["replica_id"], r["pid"]) for r in found] != [(front["replica_id"], front["pid"])]

    cluster.wait("the loss is seen", is_missed, 60)
    noticed_s = time.monotonic() - killed_s
    cluster.wait("both serve again", are_ready, READY_LIMIT_S)
    print(
        f"the host of rank {number} {how}: replaced {noticed_s:.1f} s later, "
        f"ready after {time.monotonic() - killed_s:.1f} s"
    )
    ranks = [host for host in hosts_of_ranks(cluster) if host is not victim]
    assert len(ranks) == 2, f"{ranks}: {explain(cluster)}"
    assert ranks[0] is not ranks[1]
    assert answer(cluster, "split") == expected
    if how == "cut off":
        victim.heal()
        wait_for("nothing of the old ranks is left", lambda: not engines(victim), HEALED_LIMIT_S)
        cluster.wait("both serve", are_ready, READY_LIMIT_S)
