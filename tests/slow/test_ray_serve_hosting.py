"""headrace as an application of a real Ray Serve: deployed, changed, broken, killed and deleted."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from tests.e2e.conftest import ROOT, free_port
from tests.slow.ray_serve_rig import ServeCluster, log_of, read_yaml, serve_cluster, wait_until

from headrace.engine.model_files.resolve import resolve_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces of its own for Ray need root"),
]
EXAMPLE = ROOT / "examples" / "ray_serve" / "headrace.yaml"
DEPLOY_LIMIT_S = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[ServeCluster]:
    with serve_cluster() as cluster:
        yield cluster


class Application:
    """The example's application on a cluster, with a simulated engine and ports of its own."""

    def __init__(self, cluster: ServeCluster) -> None:
        self.cluster = cluster
        self.gateway = f"http://127.0.0.1:{free_port()}"
        self.config: dict[str, Any] = read_yaml(EXAMPLE)
        self.config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
        self.route = f"http://127.0.0.1:{self.config['http_options']['port']}/headrace"
        (self.application,) = self.config["applications"]
        (self.deployment,) = self.application["deployments"]
        self.deployment["user_config"] = {
            "endpoints": {
                "chat": {
                    "model": str(resolve_model("smollm2-135m-instruct").path),
                    "engine": "simulated",
                    "replicas": {"min": 1, "max": 4},
                }
            },
            "gateway": {"bind": self.gateway.removeprefix("http://")},
        }

    def deploy(self, **chat: object) -> None:
        """Give it to Ray Serve, with other settings of its endpoint."""
        config = copy.deepcopy(self.config)
        config["applications"][0]["deployments"][0]["user_config"]["endpoints"]["chat"].update(chat)
        self.cluster.deploy(config)

    def wait_for(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Wait until what Ray Serve says of it is as `condition` wants."""
        name = str(self.application["name"])

        def seen() -> dict[str, Any]:
            found = self.cluster.application(name)
            return found if found and condition(found) else {}

        found: dict[str, Any] = wait_until(
            seen, lambda: (self.cluster.application(name), log_of(self.cluster.directory)), DEPLOY_LIMIT_S
        )
        return found

    def state(self) -> dict[str, Any]:
        """What it says at its route; empty while nobody answers there."""
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(self.route, timeout=30, trust_env=False)
            if answer.status_code == 200:
                return dict(answer.json())
        return {}

    def ask(self) -> int:
        body = {"model": "chat", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
        url = f"{self.gateway}/v1/chat/completions"
        return httpx.post(url, json=body, timeout=60, trust_env=False).status_code

    def fronts(self) -> set[int]:
        return {process.pid for process in self.cluster.processes("headrace: front")}


def message_of(found: dict[str, Any]) -> str:
    """What Ray Serve tells of the deployment, our error with it."""
    return str(found["deployments"].get("Headrace", {}).get("message", ""))


def is_running(found: dict[str, Any]) -> bool:
    return bool(found["status"] == "RUNNING")


def test_ray_serve_deploys_changes_and_deletes_a_system_which_serves_whatever_becomes_of_the_deployment(
    cluster: ServeCluster,
) -> None:
    application = Application(cluster)
    application.deploy()
    application.wait_for(is_running)
    state = wait_until(application.state, lambda: "no answer at its route", 30)
    assert (state["state"], state["gateways"]) == ("serving", [f"{application.gateway}/v1"])
    assert state["endpoints"]["chat"]["ready"] == 1
    assert application.ask() == 200
    (first,) = application.fronts()

    application.deploy(replicas={"min": 2, "max": 4})
    wait_until(
        lambda: application.state().get("endpoints", {}).get("chat", {}).get("ready") == 2,
        application.state,
        DEPLOY_LIMIT_S,
    )
    fronts = application.fronts()
    assert first in fronts, "what was healthy was left alone"

    application.deploy(replicas={"min": 3, "max": 2})
    failed = application.wait_for(lambda found: found["status"] in ("DEPLOY_FAILED", "UNHEALTHY"))
    assert "min must be at most max" in message_of(failed)
    assert application.ask() == 200
    assert application.fronts() == fronts, "the old config keeps running"

    application.deploy(replicas={"min": 2, "max": 4})
    application.wait_for(is_running)
    assert application.fronts() == fronts

    for process in cluster.processes("ray::ServeReplica"):
        process.kill()
    assert application.ask() == 200
    wait_until(lambda: application.state().get("state") == "serving", application.state, DEPLOY_LIMIT_S)
    assert application.fronts() == fronts

    cluster.delete()
    wait_until(lambda: not cluster.processes("headrace:"), lambda: cluster.processes("headrace:"), 60)
    with pytest.raises(httpx.ConnectError):
        application.ask()


def test_a_first_config_that_is_wrong_is_said_and_starts_nothing(cluster: ServeCluster) -> None:
    application = Application(cluster)
    application.deploy(modell="x")
    failed = application.wait_for(lambda found: found["status"] == "DEPLOY_FAILED")
    assert "Did you mean 'model'?" in message_of(failed)
    assert not cluster.processes("headrace:")
    began_s = time.monotonic()
    application.deploy()
    application.wait_for(is_running)
    print(f"deployed within {time.monotonic() - began_s:.1f} s")
    assert application.ask() == 200
    cluster.delete()
    wait_until(lambda: not cluster.processes("headrace:"), lambda: cluster.processes("headrace:"), 60)
