"""Versions of endpoints through the controller's whole knowledge: rollouts, standby, notices, restarts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from headrace.api.config import Config, Tenant
from headrace.api.config_loader import parse_config
from headrace.api.messages import ChangeRollout, Demand, LoadReport, ProcessState, VersionDemand
from headrace.control.reconciler import PromoteReplica, RestReplica, StartReplica
from headrace.control.rollouts import KeptRollout, Rollouts
from headrace.control.system_state import SystemState
from headrace.control.version_counts import VersionCounts
from headrace.errors import ConfigError


def config(**chat: Any) -> Config:
    base = {"model": "simulated", "engine": "simulated", "rollout": {"stage_s": 5, "min_requests": 4}}
    return parse_config({"endpoints": {"chat": {**base, **chat}}, "gateway": {"bind": "127.0.0.1:8000"}})


class World:
    """Fronts and launcher, played: what is started is ready in the next turn, or fails if it is broken."""

    def __init__(self, config: Config) -> None:
        self.now_s = 100.0
        self.state = SystemState(config, self.now_s)
        self.broken: set[str] = set()
        """Generations that cannot start."""
        self.demands: list[VersionDemand] = []
        self.pids = 0
        self.most_alive = 0

    def turn(self) -> None:
        state, now_s = self.state, self.now_s
        for action in state.plan(now_s):
            slot = state.fleet.slots.get(action.replica_id)
            if isinstance(action, StartReplica) and slot is not None:
                self.pids += 1
                slot.pid = self.pids
        self.most_alive = max(self.most_alive, sum(slot.is_alive for slot in state.fleet.slots.values()))
        for slot in list(state.fleet.slots.values()):
            if slot.is_stopping:
                state.fleet.on_ended(_ended(slot.replica_id, slot.pid), now_s)
            elif slot.is_alive:
                self.report(slot.replica_id)
        state.gateway.on_demand(Demand("g1", 0, [], [], versions=self.demands), now_s)
        self.now_s += 0.2

    def report(self, replica_id: str, **fields: Any) -> None:
        slot = self.state.fleet.slots[replica_id]
        is_standby = slot.role == "standby"
        values: dict[str, Any] = {
            "state": "standby" if is_standby else "ready",
            "phase": "asleep at level 1" if is_standby else "",
            "generation": slot.generation,
        }
        if slot.generation in self.broken:
            values |= {"state": "failed", "last_error": "no such model", "is_retryable": False}
        values |= fields
        report = LoadReport(replica_id, "chat", "m", "a:1", slot.pid, 1, 3.0, **values)
        self.state.fleet.on_report(report, self.now_s)

    def settle(self, seconds: float = 4.0) -> None:
        for _ in range(round(seconds / 0.2)):
            self.turn()

    def generations(self) -> list[str]:
        return sorted(slot.generation for slot in self.state.fleet.slots.values())

    def rollout(self) -> tuple[str, str]:
        counts = {"chat": self.state.scaling("chat", self.now_s).count}
        status = self.state.rollouts.statuses(self.state.fleet.of("chat"), counts, self.now_s)[0]
        return status.state, status.reason


def _ended(name: str, pid: int, code: int = 0) -> ProcessState:
    return ProcessState(name, pid, False, code)


def old_and_new(world: World) -> tuple[str, str]:
    kept = world.state.rollouts
    return kept.main_generation("chat"), next(iter(kept.traffic("chat", 2)))


def test_requests_that_fail_on_the_new_version_take_it_back_and_traffic_follows_each_step() -> None:
    world = World(config(replicas=2))
    world.settle()
    assert world.state.traffic(world.now_s) == {}
    world.state.apply(config(replicas=2, max_open=3), world.now_s)
    old, new = old_and_new(world)
    assert world.state.traffic(world.now_s) == {"chat": {new: 0.0, old: 1.0}}
    world.settle(1)
    assert world.state.traffic(world.now_s) == {"chat": {new: 0.1, old: 0.9}}
    assert world.generations() == sorted([old, old, new])
    world.demands = [VersionDemand("chat", old, 50, 0), VersionDemand("chat", new, 1, 3)]
    world.settle(2)
    assert world.rollout()[0] == "rolled_back"
    assert "3 of 4 requests of the new version failed" in world.rollout()[1]
    assert world.state.notes[-1].startswith("chat: rolled back: 3 of 4 requests")
    assert world.generations() == [old, old]
    assert world.state.traffic(world.now_s) == {}
    assert world.state.config.endpoints["chat"].max_open == 3, "what was applied stays the config"
    assert world.state.rollouts.section("chat").max_open == 64


def test_a_version_that_cannot_start_is_taken_back_and_the_same_config_may_be_tried_again() -> None:
    world = World(config())
    world.settle()
    before = set(world.state.fleet.slots["chat-1"].generation)
    world.state.apply(config(max_open=3), world.now_s)
    old, new = old_and_new(world)
    world.broken = {new}
    world.settle()
    assert world.rollout() == ("rolled_back", "the new version cannot start: no such model")
    assert world.generations() == [old]
    assert set(world.state.fleet.slots["chat-1"].generation) == before
    world.broken = set()
    world.state.apply(config(max_open=3), world.now_s)
    world.settle(20)
    assert world.rollout()[0] == "promoted"
    assert world.generations() == [new]


def test_with_room_for_one_the_old_is_stopped_first_and_comes_back_if_the_new_one_cannot_start() -> None:
    rules = {"surge": 0}
    world = World(config(rollout=rules))
    world.settle()
    world.state.apply(config(rollout=rules, max_open=3), world.now_s)
    new = world.state.rollouts.versions("chat", 1)[0].generation
    world.broken = {new}
    old = world.state.rollouts.main_generation("chat")
    world.settle()
    assert world.rollout()[0] == "rolled_back"
    assert world.generations() == [old]
    assert world.most_alive == 1


def test_a_third_config_wins_and_the_old_version_stays_what_undo_goes_back_to() -> None:
    world = World(config(replicas=2))
    world.settle()
    old = world.state.rollouts.main_generation("chat")
    world.state.apply(config(replicas=2, max_open=3), world.now_s)
    world.settle(2)
    world.state.apply(config(replicas=2, max_open=4), world.now_s)
    world.settle(2)
    assert world.state.rollouts.main_generation("chat") == old
    assert world.generations().count(old) == 2
    world.state.change_rollout(ChangeRollout("chat", "undo"), world.now_s)
    world.settle(2)
    assert world.generations() == [old, old]
    # The old version's own config ends the matter.
    world.state.apply(config(replicas=2), world.now_s)
    world.settle(2)
    assert world.state.rollouts.statuses([], {}, world.now_s) == []
    with pytest.raises(ConfigError, match="nothing to undo"):
        world.state.change_rollout(ChangeRollout("chat", "undo"), world.now_s)


def test_applying_the_old_config_while_its_rollout_runs_goes_back() -> None:
    world = World(config())
    world.settle()
    world.state.apply(config(max_open=3), world.now_s)
    world.settle(1)
    assert world.state.apply(config(), world.now_s) == ["chat: back to its old version"]
    world.settle(2)
    assert world.rollout() == ("rolled_back", "a config of the old version was applied")
    assert len(world.generations()) == 1


def test_wishes_that_make_no_sense_are_refused_with_what_can_be_done() -> None:
    world = World(config())
    world.settle()
    for action in ("pause", "resume", "promote", "undo"):
        with pytest.raises(ConfigError):
            world.state.change_rollout(ChangeRollout("chat", action), world.now_s)
        with pytest.raises(ConfigError, match="there are: chat"):
            world.state.change_rollout(ChangeRollout("nope", action), world.now_s)
    world.state.apply(config(max_open=3), world.now_s)
    with pytest.raises(ConfigError, match="no replica of the new version of 'chat' is ready"):
        world.state.change_rollout(ChangeRollout("chat", "promote"), world.now_s)
    with pytest.raises(ConfigError, match="is not paused"):
        world.state.change_rollout(ChangeRollout("chat", "resume"), world.now_s)
    world.state.change_rollout(ChangeRollout("chat", "pause"), world.now_s)
    with pytest.raises(ConfigError, match="is paused already"):
        world.state.change_rollout(ChangeRollout("chat", "pause"), world.now_s)
    world.settle(2)
    world.state.change_rollout(ChangeRollout("chat", "promote"), world.now_s)
    world.settle(2)
    assert world.rollout() == ("promoted", "promoted by a user")


def test_what_is_kept_lets_a_restarted_controller_go_on_and_undo() -> None:
    world = World(config(replicas=2))
    world.settle()
    old = world.state.rollouts.main_generation("chat")
    world.state.apply(config(replicas=2, max_open=3), world.now_s)
    world.settle(5)
    text = msgspec.json.encode(world.state.rollouts.keep())
    (kept,) = msgspec.json.decode(text, type=list[KeptRollout])
    assert (kept.state, kept.stage) == ("running", 1)
    later = Rollouts(world.state.config, VersionCounts())
    later.restore([kept, msgspec.structs.replace(kept, endpoint="gone")], 0.0)
    assert later.main_generation("chat") == old
    assert later.traffic("chat", 2)[old] == 0.9, "as far as it was, until its replicas are seen"
    later.undo("chat", 1.0)
    assert later.versions("chat", 2)[0].generation == old
    assert later.section("chat").max_open == 64


def test_a_change_that_concerns_all_replaces_without_a_canary() -> None:
    world = World(config())
    world.settle()
    tenants = world.state.config.model_copy(update={"tenants": {"acme": Tenant()}})
    assert world.state.apply(tenants, world.now_s)[0] == "chat: changed; its replicas are replaced one by one"
    world.settle(2)
    assert world.generations() == [world.state.rollouts.main_generation("chat")]


def test_a_standby_that_cannot_wake_is_left_for_another_one() -> None:
    world = World(config(replicas={"min": 1, "max": 4, "standby": 2}))
    world.settle()
    roles = {slot.replica_id: slot.role for slot in world.state.fleet.slots.values()}
    assert sorted(roles.values()) == ["serving", "standby", "standby"]
    world.state.scale("chat", 2)
    (action,) = [a for a in world.state.plan(world.now_s) if isinstance(a, PromoteReplica)]
    error = {"state": "standby", "phase": "no room for keys and values"}
    world.report(action.replica_id, **error)
    assert "could not wake: no room" in world.state.fleet.slots[action.replica_id].last_error
    (other,) = [a for a in world.state.plan(world.now_s) if isinstance(a, PromoteReplica)]
    assert other.replica_id != action.replica_id
    world.settle()
    assert world.state.fleet.slots[other.replica_id].phase == "ready"
    assert world.state.fleet.slots[action.replica_id].role == "standby"


def test_a_standby_that_says_nothing_is_given_up_after_its_limit() -> None:
    world = World(config(replicas={"min": 1, "max": 2, "standby": 1}))
    world.settle()
    world.state.scale("chat", 2)
    (action,) = [a for a in world.state.plan(world.now_s) if isinstance(a, PromoteReplica)]
    slot = world.state.fleet.slots[action.replica_id]
    for _ in range(70):
        world.now_s += 0.2
        for name in list(world.state.fleet.slots):
            if name == action.replica_id:
                world.report(name, state="standby", phase="waking")
            else:
                world.report(name)
        world.state.plan(world.now_s)
        if slot.role == "standby":
            break
    assert "could not wake: it did not within 10 s" in slot.last_error
    assert len(world.state.fleet.slots) == 3, "a cold start serves instead"


def test_a_replica_too_many_rests_unless_it_has_work_and_one_that_refuses_is_stopped() -> None:
    world = World(config(replicas={"min": 2, "max": 2, "standby": 1}))
    world.settle()
    world.state.scale("chat", 1)
    (action,) = world.state.plan(world.now_s)
    assert isinstance(action, RestReplica)
    world.report(action.replica_id, state="ready", phase="it cannot sleep: 2 requests are open", num_open=2)
    actions = world.state.plan(world.now_s)
    assert not any(
        isinstance(again, RestReplica) and again.replica_id == action.replica_id for again in actions
    )
    world.settle()
    assert sorted(slot.role for slot in world.state.fleet.slots.values()) == ["serving", "standby"]


def test_a_replica_that_leaves_by_itself_is_replaced_at_once_and_its_end_is_no_failure() -> None:
    world = World(config(replicas={"min": 1, "max": 2}))
    world.settle()
    slot = world.state.fleet.slots["chat-1"]
    world.report("chat-1", state="draining")
    actions = world.state.plan(world.now_s)
    assert [(type(action), action.replica_id) for action in actions] == [(StartReplica, "chat-2")]
    world.state.fleet.on_ended(_ended("chat-1", slot.pid), world.now_s)
    world.settle(1)
    assert list(world.state.fleet.slots) == ["chat-2"]
    assert world.state.fleet.slots["chat-2"].failures == 0
