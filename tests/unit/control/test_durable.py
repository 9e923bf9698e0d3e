"""Durable fronts in the controller: at each gateway, of each text, and no replica's business."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.unit.control.test_system_state import World as SystemWorld

from headrace.api.config import Config
from headrace.api.config_loader import parse_config
from headrace.api.messages import (
    Demand,
    EndpointDemand,
    EngineReady,
    LoadReport,
    ProcessState,
    ReplicaSpec,
    ReplicaView,
)
from headrace.control.durable import DurableFronts, group_of, is_durable_front
from headrace.control.siblings import siblings_of
from headrace.control.slots import slot_prefix
from headrace.control.specs import durable_generation_of, durable_process
from headrace.control.system_state import SystemState
from headrace.errors import ConfigError
from headrace.replica.stream_class import text_class_of


def config(num_gateways: int = 1, num_fronts: int = 1, **chat: Any) -> Config:
    streams = {"durable": True, "durable_fronts": num_fronts}
    endpoint = {"model": "simulated", "engine": "simulated", "streams": streams, **chat}
    return parse_config(
        {"endpoints": {"chat": endpoint}, "gateway": {"bind": "127.0.0.1:8000", "count": num_gateways}}
    )


class World(SystemWorld):
    """Durable fronts report, too, and each gateway sends requests to its own."""

    def report(self, replica_id: str, **changes: Any) -> None:
        """Called once per turn and replica: durable fronts report with the first."""
        super().report(replica_id, **changes)
        self.report_fronts()

    def report_fronts(self) -> None:
        for front_id, slot in self.state.durable.fleet.slots.items():
            if slot.is_alive:
                gateway_id = front_id.partition(":")[2].partition("-")[0]
                report = LoadReport(
                    front_id, "chat", "m", "a:1", slot.pid, 1, 3.0, "ready",
                    generation=slot.generation, gateway_id=gateway_id,
                )  # fmt: skip
                self.state.on_report(report, self.clock.now_s())

    def demand(self) -> None:
        self.report_fronts()
        endpoints = [EndpointDemand(name, 0, 0.0, 0, 0, 0, 0, 0, 0) for name in self.state.config.endpoints]
        for gateway_id in self.state.gateway.pairs:
            fronts = [name for name in self.state.durable.fleet.slots if f":{gateway_id}-" in name]
            views = [ReplicaView(name, 0, True) for name in (*self.state.fleet.slots, *fronts)]
            self.state.gateway.on_demand(Demand(gateway_id, 0, endpoints, views), self.clock.now_s())

    def fronts(self) -> set[str]:
        return {name for name in self.launcher.alive if is_durable_front(name)}

    @property
    def is_ready(self) -> bool:
        return self.state.is_ready(self.clock.now_s())


def test_each_gateway_has_its_durable_fronts_and_the_system_waits_for_them() -> None:
    world = World(config(num_gateways=2, num_fronts=2, replicas={"min": 1}))
    world.turn()
    assert not world.is_ready
    world.settle(3)
    assert world.fronts() == {"chat:g1-1", "chat:g1-2", "chat:g2-1", "chat:g2-2"}
    assert set(world.state.fleet.slots) == {"chat-1"}
    assert world.is_ready
    num_started = world.launcher.num_started
    world.settle(50)
    assert world.launcher.num_started == num_started


def test_one_that_dies_is_started_again_and_nothing_else() -> None:
    world = World(config(replicas={"min": 1}))
    world.settle(3)
    world.launcher.end("chat:g1-1", -9)
    world.take_events()
    world.turn()
    assert not world.is_ready
    num_started = world.launcher.num_started
    world.settle(10)
    assert world.is_ready
    assert world.launcher.num_started == num_started + 1


def test_a_controller_that_stood_still_stops_none() -> None:
    """Their reports are on the way, and so may be streams."""
    world = World(config(replicas={"min": 1}))
    world.settle(3)
    world.clock.advance(60.0)
    assert world.state.plan(world.clock.now_s()) == []
    num_started = world.launcher.num_started
    world.settle(100)
    assert world.is_ready
    assert world.launcher.num_started == num_started


@pytest.mark.parametrize("who", ["a durable front", "a replica"])
def test_on_a_machine_with_a_notice_none_is_started_until_it_is_clear_that_it_stays(who: str) -> None:
    world = World(config(replicas={"min": 1}))
    world.settle(3)
    slot = world.state.durable.fleet.slots["chat:g1-1"]
    if who == "a replica":
        world.leave_by_notice("chat-1", 20.0)
        world.launcher.end("chat:g1-1", 0)
    else:
        report = LoadReport(
            "chat:g1-1", "chat", "m", "a:1", slot.pid, 2, 3.0, "draining",
            generation=slot.generation, gateway_id="g1", leave_by_s=20.0,
        )  # fmt: skip
        world.state.on_report(report, world.clock.now_s())
        world.launcher.end("chat:g1-1", 0)
    world.take_events()
    began_s = world.clock.now_s()
    while world.clock.now_s() < began_s + 25.0:
        world.turn()
        assert not world.fronts()
    while world.clock.now_s() < began_s + 60.0:
        world.turn()
    assert world.fronts() == {"chat:g1-1"}, "the machine was not taken away after all"


def test_the_notice_of_another_machine_than_its_gateways_keeps_no_durable_front_from_starting() -> None:
    world = World(config(replicas={"min": 1}))
    world.settle(3)
    world.state.fleet.slots["chat-1"].node = "another"
    world.leave_by_notice("chat-1", 20.0)
    world.launcher.end("chat:g1-1", -9)
    world.take_events()
    world.settle(10)
    assert world.fronts() == {"chat:g1-1"}


def test_engine_settings_restart_none_and_a_change_of_theirs_starts_the_new_one_first() -> None:
    world = World(config(replicas={"min": 1}))
    world.settle(3)
    world.apply(config(replicas={"min": 1}, simulated={"step_ms": 9}))
    world.settle(60)
    assert world.fronts() == {"chat:g1-1"}
    world.apply(config(replicas={"min": 1}, simulated={"step_ms": 9}, drain_grace_s=5))
    world.turn()
    assert world.fronts() == {"chat:g1-1", "chat:g1-2"}, "the old one stays until the new one is ready"
    world.settle(60)
    assert world.fronts() == {"chat:g1-2"}


def test_while_another_model_is_rolled_out_there_are_durable_fronts_for_both() -> None:
    rollout = {"min_requests": 1000, "stage_s": 1000}
    world = World(config(replicas={"min": 4}, rollout=rollout))
    world.settle(5)
    world.apply(config(replicas={"min": 4}, rollout=rollout, model="other"))
    world.settle(20)
    generations = {slot.generation for slot in world.state.durable.fleet.slots.values() if slot.is_alive}
    assert generations == {
        durable_generation_of(config(replicas={"min": 4}, rollout=rollout, model=model), "chat")
        for model in ("simulated", "other")
    }


def test_an_endpoint_that_is_durable_no_more_loses_its_fronts_and_keeps_its_replicas() -> None:
    world = World(config(replicas={"min": 1}))
    world.settle(3)
    plain = config(replicas={"min": 1}, streams={})
    world.apply(plain)
    world.settle(10)
    assert set(world.launcher.alive) == {"chat-1"}
    assert world.is_ready


def test_a_restarted_controller_takes_durable_fronts_for_what_they_are() -> None:
    state = SystemState(config(replicas={"min": 1}), 100.0)
    processes = [
        ProcessState(name, pid, True) for pid, name in enumerate(("chat-1", "chat:g1-1", "chat:g1-2"), 7)
    ]
    state.adopt(processes, 100.0)
    assert set(state.fleet.slots) == {"chat-1"}
    assert set(state.durable.fleet.slots) == {"chat:g1-1", "chat:g1-2"}
    assert state.plan(100.1) == [], "nothing is touched before all have reported"


def test_siblings_of_a_durable_front_are_all_replicas() -> None:
    world = World(config(replicas={"min": 2}))
    world.settle(3)
    info = EngineReady("simulated", "", 300, 4096, 16, 9, 9, "x", {})
    for slot in world.state.fleet.slots.values():
        assert slot.report is not None
        slot.report = msgspec.structs.replace(
            slot.report, peer_socket=f"/{slot.replica_id}", engine_info=info, text_class="T"
        )
    told = world.state.siblings()
    assert set(told) == {"chat-1", "chat-2", "chat:g1-1"}
    assert [(s.replica_id, s.text_class, s.vocab_size, s.max_context_tokens) for s in told["chat:g1-1"]] == [
        ("chat-1", "T", 300, 4096), ("chat-2", "T", 300, 4096),
    ]  # fmt: skip
    assert [sibling.replica_id for sibling in told["chat-1"]] == ["chat-2"]
    assert siblings_of([], {"chat:g1-1": "chat"}) == {"chat:g1-1": []}


@pytest.mark.parametrize("endpoint", ["chat", "a:g1", "team/chat", "chat-1", "a" * 100])
def test_names_of_replicas_and_durable_fronts_never_meet(endpoint: str) -> None:
    assert not is_durable_front(f"{slot_prefix(endpoint)}-1")
    assert is_durable_front(f"{group_of(endpoint, 'g1')}-1")


def test_a_durable_front_reports_to_its_gateway_alone_and_has_the_replicas_text() -> None:
    tree = config(num_gateways=2, replicas={"min": 1, "max": 3}, max_open=20)
    process = durable_process(tree, "chat", "chat:g2-1", "g2", Path("/run"))
    spec = msgspec.convert(json.loads(process.argv[-1]), ReplicaSpec)
    assert (spec.replica_id, spec.gateway_id, spec.max_open) == ("chat:g2-1", "g2", 60)
    assert spec.report_sockets == ["/run/g2/router.sock", "/run/controller.sock"]
    assert spec.generation == durable_generation_of(tree, "chat")
    assert text_class_of(spec.engine) == "bytes"


def test_a_durable_endpoint_must_allow_another_engine() -> None:
    with pytest.raises(ConfigError, match="durable is true and resume_attempts is 0"):
        config(streams={"durable": True, "resume_attempts": 0})


def test_nothing_is_wanted_without_durable_endpoints() -> None:
    fronts = DurableFronts(["g1"])
    fronts.want({}, config())
    assert fronts.plan(1.0) == []
    assert fronts.is_ready({})
