"""A hosted system: what is started, changed, awaited, called healthy and ended, with one that is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from headrace.api.config import Config
from headrace.api.messages import (
    AdminCommand,
    AdminReply,
    ApplyConfig,
    EndpointStatus,
    GatewayStatus,
    GetStatus,
    RolloutStatus,
    SystemStatus,
)
from headrace.control.admin import CommandRefused, NoAnswer, NotRunning
from headrace.control.hosted_system import HostedSystem, checked_config, why_not_serving
from headrace.control.serve import StartFailed
from headrace.errors import ConfigError, HeadraceError

EXAMPLES = Path(__file__).parents[3] / "examples"
CHAT: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "engine": "simulated",
    "replicas": {"min": 1, "max": 4},
}
TREE: dict[str, Any] = {
    "endpoints": {"chat": CHAT},
    "gateway": {"bind": "0.0.0.0:8123"},
    "tenants": {"team": {"keys": [f"sha256:{'0' * 64}"]}},
}


def status_of(*, ready: int = 1, desired: int = 1, failed: int = 0, is_ready: bool = False) -> SystemStatus:
    """A system with one endpoint, whose gateway answers."""
    endpoint = EndpointStatus(
        name="chat",
        model="m",
        engine="simulated",
        desired=desired,
        ready=ready,
        starting=0,
        failed=failed,
        num_held=0,
        oldest_held_s=0.0,
        num_in_flight=0,
        finished=0,
        aborted=0,
        refused=0,
        failed_requests=0,
        reason="",
    )
    gateway = GatewayStatus("g1", "running", "running", True, 0, 0.0, 0, ready)
    return SystemStatus(
        version="1",
        url="http://127.0.0.1:8123/v1",
        uptime_s=1.0,
        is_ready=is_ready,
        endpoints=[endpoint],
        replicas=[],
        processes=[],
        run_dir="/run",
        gateways=[gateway],
    )


class FakeSystem:
    """A system on a cluster that becomes what the test says."""

    def __init__(self) -> None:
        self.is_there = False
        self.statuses = [status_of(is_ready=True)]
        """What it answers one after another; the last one from then on."""
        self.refusal = ""
        self.silences = 0
        """So many questions get no answer."""
        self.failure = ""
        self.done: list[str] = []

    async def is_held(self) -> bool:
        return self.is_there

    async def start(self, config: Config) -> None:
        self.is_there = True
        self.done.append("start")

    async def ask(self, command: AdminCommand) -> AdminReply:
        if self.silences:
            self.silences -= 1
            raise NoAnswer("it is being restarted")
        if not self.is_there:
            raise NotRunning("no system called 'x' answers on this cluster")
        if isinstance(command, GetStatus):
            return AdminReply(status=self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0])
        assert isinstance(command, ApplyConfig)
        if self.refusal:
            raise CommandRefused(self.refusal)
        self.done.append("apply")
        return AdminReply(notes=["chat: changed"])

    async def find_failure(self, max_failures: int) -> str:
        return self.failure

    async def home_address(self) -> str:
        return "10.0.0.7"

    async def stop(self, grace_s: float, *, at_once: bool = False) -> None:
        self.is_there = False
        self.done.append("stop at once" if at_once else f"stop within {grace_s:.0f} s")

    def close(self) -> None:
        self.done.append("close")


@pytest.fixture
def system() -> FakeSystem:
    return FakeSystem()


def hosted(system: FakeSystem, ready_limit_s: float = 5.0) -> HostedSystem:
    async def connect(name: str) -> FakeSystem:
        return system

    return HostedSystem("x", ready_limit_s, connect)


async def test_the_first_config_starts_a_system_and_the_next_one_changes_it(system: FakeSystem) -> None:
    host = hosted(system)
    await host.apply(TREE)
    await host.check()
    await host.apply(TREE)
    assert system.done == ["start", "apply"]


async def test_a_system_that_runs_is_found_and_left_running_unless_the_application_is_deleted(
    system: FakeSystem,
) -> None:
    system.is_there = True
    first, second = hosted(system), hosted(system)
    await first.apply(TREE)
    await first.leave(is_deleted=False)
    assert system.done == ["apply", "close"]
    await second.apply(TREE)
    await second.leave(is_deleted=True)
    await second.leave(is_deleted=True)
    assert system.done[2:] == ["apply", "stop within 30 s", "close"]


async def test_a_wrong_config_is_refused_before_anything_is_asked_of_the_cluster(system: FakeSystem) -> None:
    system.is_there = True
    host = hosted(system)
    await host.apply(TREE)
    with pytest.raises(ConfigError, match=r"user_config: endpoints\.chat\.modell: unknown key"):
        await host.apply({**TREE, "endpoints": {"chat": {**CHAT, "modell": "x"}}})
    assert system.done == ["apply"]
    await host.check()


async def test_what_the_controller_refuses_is_told_and_what_ran_goes_on(system: FakeSystem) -> None:
    host = hosted(system)
    await host.apply(TREE)
    system.refusal = "gateway.count cannot be changed while it runs"
    with pytest.raises(CommandRefused, match=r"gateway\.count"):
        await host.apply(TREE)
    await host.check()
    assert system.done == ["start"]


async def test_a_start_that_cannot_succeed_is_told_at_once_and_leaves_nothing(system: FakeSystem) -> None:
    system.statuses = [status_of(ready=0, failed=1)]
    with pytest.raises(StartFailed, match="the gateway does not answer yet"):
        await hosted(system).apply(TREE)
    assert system.done == ["start", "stop at once"]


async def test_a_start_that_takes_too_long_is_given_up(system: FakeSystem) -> None:
    system.statuses = [status_of(ready=0)]
    with pytest.raises(StartFailed, match="not ready after 0 s"):
        await hosted(system, ready_limit_s=0.0).apply(TREE)
    assert system.done == ["start", "stop at once"]


async def test_a_controller_that_is_being_restarted_gets_its_config_once_it_is_back(
    system: FakeSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.control.hosted_system._POLL_S", 0.0)
    system.is_there, system.silences = True, 3
    await hosted(system).apply(TREE)
    assert system.done == ["apply"]


async def test_a_controller_that_keeps_ending_is_waited_for_no_longer(system: FakeSystem) -> None:
    system.is_there, system.silences, system.failure = True, 99, "the controller keeps ending:\nno memory"
    with pytest.raises(StartFailed, match="no memory"):
        await hosted(system).apply(TREE)
    assert system.done == [], "what is there was not started here, and is not ended here"


async def test_health_is_that_of_the_system(system: FakeSystem) -> None:
    host = hosted(system)
    with pytest.raises(StartFailed, match="there is no user_config"):
        await host.check()
    await host.apply(TREE)
    system.statuses = [status_of(ready=0)]
    with pytest.raises(StartFailed, match="chat has 0 of 1 replicas"):
        await host.check()
    system.silences = 1
    with pytest.raises(NoAnswer):
        await host.check()
    system.statuses = [status_of()]
    await host.check()


async def test_it_says_where_the_gateways_are_and_how_it_stands(system: FakeSystem) -> None:
    host = hosted(system)
    assert (await host.describe())["state"] == "nothing applied"
    await host.apply(TREE)
    state = await host.describe()
    assert (state["state"], state["gateways"]) == ("serving", ["http://10.0.0.7:8123/v1"])
    assert state["endpoints"] == {"chat": {"ready": 1, "wanted": 1, "held": 0}}
    system.silences = 1
    assert (await host.describe())["state"] == "not answering"


def test_healthy_is_the_least_that_the_config_names_at_a_gateway_that_answers() -> None:
    config = checked_config(TREE)
    more_wanted = status_of(ready=1, desired=3)
    assert why_not_serving(more_wanted, config) == ""
    assert "chat has 0 of 1" in why_not_serving(status_of(ready=0), config)
    assert why_not_serving(status_of(ready=0, desired=0), config) == "", "scaled to zero by hand"
    swapping = RolloutStatus("chat", "running", "a", "b", 0.5, "one stops first", 1.0)
    changing = msgspec.structs.replace(status_of(ready=0), rollouts=[swapping])
    assert why_not_serving(changing, config) == "", "with room for one only"
    hung = msgspec.structs.replace(status_of().gateways[0], router="silent")
    assert "no gateway answers" in why_not_serving(
        msgspec.structs.replace(status_of(), gateways=[hung]), config
    )
    at_zero = checked_config({**TREE, "endpoints": {"chat": {**CHAT, "replicas": {"min": 0, "max": 2}}}})
    assert why_not_serving(status_of(ready=0), at_zero) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"launcher": "local"}, "launcher is local"),
        ({"ray": {"address": "10.0.0.1:6379"}}, "ray is set"),
        ({"gateway": {"bind": "127.0.0.1:0"}}, "choose a port"),
        ({"endpoints": {"chat": {**CHAT, "model": "/no/such/model"}}}, "/no/such/model"),
    ],
)
def test_a_config_that_cannot_be_hosted_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        checked_config({**TREE, **change})


def applications() -> list[dict[str, Any]]:
    """The application of each example that hosts headrace."""
    service = yaml.safe_load((EXAMPLES / "kuberay" / "rayservice.yaml").read_text())
    configs = [
        yaml.safe_load((EXAMPLES / "ray_serve" / "headrace.yaml").read_text()),
        yaml.safe_load(service["spec"]["serveConfigV2"]),
    ]
    return [application for config in configs for application in config["applications"]]


@pytest.mark.parametrize("application", applications())
def test_each_example_names_our_application_and_holds_a_config_that_is_valid(
    application: dict[str, Any],
) -> None:
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))
    assert set(application["args"]) <= {"name", "ready_limit_s"}
    (deployment,) = application["deployments"]
    assert deployment["name"] == "Headrace"
    config = checked_config(deployment["user_config"])
    assert config.launcher == "ray"


def test_the_rayservice_has_the_shape_that_kuberay_takes() -> None:
    service = yaml.safe_load((EXAMPLES / "kuberay" / "rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for pod in pods for container in pod["template"]["spec"]["containers"]}
    assert len(images) == 1, "the same headrace on all nodes"
    assert cluster["rayVersion"].startswith("2.60.")
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    application = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]
    bind = application["deployments"][0]["user_config"]["gateway"]["bind"]
    assert int(bind.rpartition(":")[2]) in [port["containerPort"] for port in head["ports"]]


@pytest.mark.parametrize("args", [{"nam": "x"}, {"name": 3}, {"ready_limit_s": "long"}])
def test_arguments_that_are_not_the_builders_are_refused(args: dict[str, Any]) -> None:
    from headrace.ray_serve import app

    with pytest.raises(HeadraceError, match="known are name"):
        app(args)
