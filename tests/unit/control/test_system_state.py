"""The controller's knowledge as a whole, driven through a fake launcher on a virtual clock."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.api.config import Config, Tenant
from headrace.api.config_loader import parse_config
from headrace.api.messages import (
    Demand,
    EndpointDemand,
    LauncherError,
    LoadReport,
    Nodes,
    NodeState,
    ProcessEnded,
    ProcessSpec,
    ProcessStarted,
    ReplicaView,
)
from headrace.clock import VirtualClock
from headrace.control.reconciler import StartReplica, StopReplica
from headrace.control.status import describe
from headrace.control.system_state import SystemState
from headrace.errors import ConfigError
from headrace.fabric.launcher import FakeLauncher


def config(bind: str = "127.0.0.1:8000", **endpoints: Any) -> Config:
    base = {"model": "simulated", "engine": "simulated"}
    tree = {name: {**base, **fields} for name, fields in endpoints.items()}
    return parse_config({"endpoints": tree, "gateway": {"bind": bind}})


STEP_BY_STEP = "changed; its replicas are replaced step by step (`headrace rollout status`)"


class World:
    """Launcher, fronts and router, played."""

    def __init__(self, config: Config) -> None:
        self.clock = VirtualClock(100.0)
        self.launcher = FakeLauncher()
        self.state = SystemState(config, self.clock.now_s())
        for process in self.state.gateway.processes.values():
            process.on_start(100.0)
        for gateway_id in self.state.gateway.pairs:
            self.state.gateway.on_probe(gateway_id, True, 100.0)
        self.held: dict[str, int] = {}
        self.open: dict[str, int] = {}

    def apply(self, config: Config) -> list[str]:
        return self.state.apply(config, self.clock.now_s())

    def turn(self) -> None:
        """One tick: decide, act, let drains end, report, 0.2 s pass."""
        now_s = self.clock.now_s()
        for action in self.state.plan(now_s):
            if isinstance(action, StartReplica):
                self.launcher.start(ProcessSpec(action.replica_id, ["front"]))
            elif isinstance(action, StopReplica):
                self.launcher.stop(action.replica_id, action.grace_s)
        for name in list(self.launcher.stopping):
            self.launcher.end(name, 0)
        self.take_events()
        for replica_id, slot in list(self.state.fleet.slots.items()):
            if slot.is_alive:
                self.report(replica_id)
        self.demand()
        self.clock.advance(0.2)

    def take_events(self) -> None:
        for event in self.launcher.take_events():
            match event:
                case ProcessStarted():
                    self.state.on_started(event)
                case ProcessEnded():
                    self.state.on_ended(event, self.clock.now_s())
                case LauncherError(name, error):
                    self.state.on_refused(name, error, self.clock.now_s())

    def report(self, replica_id: str, **fields: Any) -> None:
        slot = self.state.fleet.slots[replica_id]
        report = LoadReport(
            replica_id, slot.endpoint, "m", "a:1", slot.pid, 1, 3.0, "ready", generation=slot.generation
        )
        self.state.fleet.on_report(msgspec.structs.replace(report, **fields), self.clock.now_s())

    def leave_by_notice(self, replica_id: str, leave_by_s: float) -> None:
        """It says that its machine goes, and is gone."""
        self.report(replica_id, state="draining", leave_by_s=leave_by_s)
        self.launcher.end(replica_id, 0)
        self.take_events()

    def demand(self) -> None:
        endpoints = [
            EndpointDemand(name, self.held.get(name, 0), 0.0, self.open.get(name, 0), 0, 0, 0, 0, 0)
            for name in self.state.config.endpoints
        ]
        views = [ReplicaView(name, 0, True) for name in self.state.fleet.slots]
        for gateway_id in self.state.gateway.pairs:
            self.state.gateway.on_demand(Demand(gateway_id, 0, endpoints, views), self.clock.now_s())

    def settle(self, num_turns: int = 20) -> None:
        for _ in range(num_turns):
            self.turn()


def test_a_fresh_system_gets_ready_and_then_rests() -> None:
    world = World(config(chat={"replicas": 2}, other={}))
    assert not world.state.is_ready(world.clock.now_s())
    world.settle(3)
    assert set(world.launcher.alive) == {"chat-1", "chat-2", "other-1"}
    assert world.state.is_ready(world.clock.now_s())
    num_started = world.launcher.num_started
    world.settle(100)
    assert world.launcher.num_started == num_started


def test_an_endpoint_at_zero_wakes_for_held_requests_and_sleeps_when_idle() -> None:
    world = World(config(chat={"replicas": {"min": 0, "max": 2}, "scaling": {"idle_to_zero_s": 30}}))
    world.settle()
    assert not world.launcher.alive
    assert world.state.is_ready(world.clock.now_s()), "nothing is wanted, nothing is missing"
    world.held = {"chat": 3}
    world.settle(3)
    assert set(world.launcher.alive) == {"chat-1"}
    assert world.state.desired(world.clock.now_s())[0].reason
    world.held = {}
    world.settle(100)
    assert world.launcher.alive, "it stays for a while"
    world.settle(60)
    assert not world.launcher.alive


def test_on_a_machine_with_a_notice_nothing_is_started_until_it_is_clear_that_it_stays() -> None:
    world = World(config(chat={"replicas": {"min": 1, "max": 2}}, other={"replicas": {"min": 0, "max": 1}}))
    world.settle(3)
    assert set(world.launcher.alive) == {"chat-1"}
    world.leave_by_notice("chat-1", 20.0)
    num_started, began_s = world.launcher.num_started, world.clock.now_s()
    world.held = {"other": 1}
    world.settle(100)
    assert world.launcher.num_started == num_started, "neither in its place nor for what is held"
    now_s = world.clock.now_s()
    told = describe(world.state, Path(), now_s)
    end_s = 30.0 - (now_s - began_s)
    words = f"this machine goes away by a notice; nothing is started for {math.ceil(end_s)} s more"
    assert told.warnings == [f"chat: {words}", f"other: {words}"]
    assert [endpoint.eta_s > end_s for endpoint in told.endpoints] == [True, True]
    assert not told.is_ready
    world.settle(60)
    assert set(world.launcher.alive) == {"chat-1", "other-1"}, "it was not taken away after all"
    assert describe(world.state, Path(), world.clock.now_s()).warnings == []


def test_in_a_cluster_the_notice_of_one_node_keeps_nothing_from_the_others() -> None:
    world = World(config(chat={"replicas": 1}))
    world.state.nodes = Nodes([NodeState("a", "1.1.1.1"), NodeState("b", "1.1.1.2")], "a")
    world.settle(3)
    world.state.fleet.slots["chat-1"].node = "a"
    world.leave_by_notice("chat-1", 20.0)
    world.settle(3)
    assert set(world.launcher.alive) == {"chat-1"}
    world.state.fleet.slots["chat-1"].node = "a"  # the launcher chose it again
    num_started = world.launcher.num_started
    world.leave_by_notice("chat-1", 19.0)
    world.settle(40)
    assert world.launcher.num_started == num_started
    world.settle(20)
    assert world.launcher.num_started == num_started + 1


def test_the_replica_of_a_drained_node_leaves_when_another_one_is_ready() -> None:
    world = World(config(chat={"replicas": 1}))
    nodes = [NodeState("a", "1.1.1.1"), NodeState("b", "1.1.1.2")]
    world.state.on_nodes(Nodes(nodes, "b"), 100.0, 1000.0)
    world.settle(3)
    world.state.fleet.slots["chat-1"].node = "a"
    drained = msgspec.structs.replace(nodes[0], is_draining=True, drain_deadline_s=1060.0)
    now_s = world.clock.now_s()
    world.state.on_nodes(Nodes([drained, nodes[1]], "b"), now_s, 1000.0)
    world.turn()
    assert set(world.launcher.alive) == {"chat-1", "chat-2"}
    assert world.state.leaving() == {}, "the other one is not ready yet"
    world.state.fleet.slots["chat-2"].node = "b"
    world.settle(2)
    assert world.state.leaving() == {"chat-1": now_s + 60.0}
    told = describe(world.state, Path(), now_s + 1.0)
    assert [node.leaving for node in told.nodes] == ["draining for 59 s more, by Ray", ""]
    world.leave_by_notice("chat-1", 59.0)
    world.settle()
    assert set(world.launcher.alive) == {"chat-2"}
    assert world.state.leaving() == {}
    assert set(world.state.fleet.notices.avoided(world.clock.now_s())) == {"a"}


def test_a_drained_node_of_the_controller_is_warned_of() -> None:
    world = World(config(chat={"replicas": 1}))
    drained = NodeState("a" * 20, "1.1.1.1", is_draining=True)
    world.state.on_nodes(Nodes([drained], drained.node_id), 100.0, 1000.0)
    (warning,) = describe(world.state, Path(), 100.0).warnings
    assert warning.startswith("node aaaaaaaa is draining, by Ray, without a deadline: the controller")


def test_scaling_to_zero_is_obeyed_at_once() -> None:
    world = World(config(chat={"replicas": {"min": 0, "max": 2}}))
    world.held = {"chat": 1}
    world.settle(3)
    world.held = {}
    world.settle(2)
    world.open = {"chat": 2}
    world.settle(2)
    world.state.scale("chat", 0)
    world.settle(3)
    assert not world.launcher.alive
    world.open, world.held = {}, {"chat": 1}
    world.settle(3)
    assert set(world.launcher.alive) == {"chat-1"}


def test_an_apply_replaces_changed_endpoints_only() -> None:
    world = World(config(chat={"replicas": 2}, other={}))
    world.settle()
    notes = world.apply(config(chat={"replicas": 2, "max_open": 3}, other={"queue": {"max_requests": 5}}))
    assert notes == [f"chat: {STEP_BY_STEP}", "other: queue limits changed"]
    assert not world.state.is_ready(world.clock.now_s()), "ready means: of the current config"
    world.settle(100)
    assert world.state.is_ready(world.clock.now_s())
    assert world.launcher.num_started == 5
    assert len(world.launcher.alive) == 3


def test_an_apply_of_the_same_config_does_nothing() -> None:
    world = World(config(chat={}))
    world.settle()
    assert world.apply(config(chat={})) == ["nothing changed"]
    world.settle()
    assert world.launcher.num_started == 1


def test_port_zero_keeps_the_port_that_was_found_and_another_address_is_refused() -> None:
    world = World(config(chat={}))
    world.apply(config("127.0.0.1:0", chat={}))
    assert world.state.config.gateway.bind == "127.0.0.1:8000"
    with pytest.raises(ConfigError, match=r"gateway\.bind"):
        world.apply(config("127.0.0.1:9000", chat={"max_open": 1}))
    assert world.state.config.endpoints["chat"].max_open == 64


def test_an_apply_tells_which_tenants_change_and_replaces_nothing_but_for_the_first() -> None:
    world = World(config(chat={}))
    world.settle()

    def apply(**tenants: Tenant) -> list[str]:
        return world.apply(world.state.config.model_copy(update={"tenants": tenants}))

    notes = apply(acme=Tenant(), small=Tenant())
    assert notes == [
        "chat: changed; its replicas are replaced one by one",
        "tenant acme: added",
        "tenant small: added",
        "the gateway asks for keys now",
    ]
    assert apply(acme=Tenant(weight=2)) == [
        "tenant small: removed; its keys stop working",
        "tenant acme: changed",
    ]
    assert apply(acme=Tenant(weight=2)) == ["nothing changed"]
    assert apply()[-1] == "the gateway takes requests without keys now"


def test_the_state_directory_is_kept_and_cannot_change() -> None:
    world = World(config(chat={}).model_copy(update={"state_dir": "/a"}))
    world.apply(config(chat={}))
    assert world.state.config.state_dir == "/a"
    with pytest.raises(ConfigError, match="state_dir: is '/a' and cannot become '/b'"):
        world.apply(config(chat={}).model_copy(update={"state_dir": "/b"}))


def test_wrong_scales_are_refused_with_what_is_allowed() -> None:
    world = World(config(chat={"replicas": {"min": 1, "max": 2}}))
    with pytest.raises(ConfigError, match=r"replicas\.max is 2"):
        world.state.scale("chat", 3)
    with pytest.raises(ConfigError, match="there are: chat"):
        world.state.scale("nope", 1)
    assert world.state.scale("chat", 2) == "chat: 1 -> 2 replicas"


def test_threads_that_follow_from_the_scale_replace_nothing() -> None:
    world = World(config(chat={"engine": "native", "replicas": {"min": 1, "max": 4}}))
    world.settle()
    world.state.scale("chat", 2)
    world.settle()
    assert world.launcher.num_started == 2


def test_a_launcher_that_cannot_start_anything_is_asked_ever_more_slowly() -> None:
    world = World(config(chat={}))
    world.launcher.refuse_starts = "no such program"
    world.settle(300)
    slot = world.state.fleet.slots["chat-1"]
    assert slot.phase == "failed"
    assert slot.last_error == "no such program"
    assert 5 <= slot.num_starts <= 7
    assert not world.state.is_ready(world.clock.now_s())
