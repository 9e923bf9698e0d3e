"""When a replica can be expected, and what siblings a front is told of."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.api.endpoint_config import Endpoint
from headrace.api.messages import (
    Demand,
    EndpointOutlook,
    EngineLoad,
    EngineReady,
    LoadReport,
    Outlook,
    SetSleep,
    Siblings,
    VersionDemand,
)
from headrace.control.connections import Connections
from headrace.control.fleet import Fleet, Slot
from headrace.control.notices import HoldOff
from headrace.control.outlook import is_news, outlook_of
from headrace.control.reconciler import StartReplica, StopReplica
from headrace.control.siblings import LOAD_PERIOD_S, siblings_of
from headrace.control.start_times import DEFAULT_S, MAX_REMEMBERED, MIN_LATE_S, StartTimes
from headrace.control.version_counts import VersionCounts
from headrace.policy.rollout import Outcomes

NATIVE = Endpoint(model="m")


def slot(phase: str = "starting", replica_id: str = "chat-1", **fields: Any) -> Slot:
    made = Slot(replica_id, "chat", "g", 5.0, 100.0, phase=phase)  # type: ignore[arg-type]
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def expect(*slots: Slot, times: StartTimes | None = None, now_s: float = 102.0) -> EndpointOutlook:
    return outlook_of("chat", NATIVE, slots, times or StartTimes(), now_s)


def test_a_start_takes_what_earlier_ones_took_and_a_late_one_still_takes_a_little() -> None:
    times = StartTimes()
    assert times.remaining_s("cold", 1.0) == DEFAULT_S["cold"] - 1
    for seconds in (4.0, 9.0, 5.0, float("nan"), -1.0):
        times.add("cold", seconds)
    assert times.expected_s("cold") == 5.0
    assert times.remaining_s("cold", 2.0) == 3.0
    assert times.remaining_s("cold", 50.0) == 10.0
    assert times.remaining_s("cold", 5.0) == 1.0
    assert times.remaining_s("standby", 9e-9) >= MIN_LATE_S
    for _ in range(200):
        times.add("cold", 1.0)
    assert len(times.seconds["cold"]) == MAX_REMEMBERED


def test_while_starts_are_held_off_their_end_is_what_is_waited_for() -> None:
    def told(*slots: Slot) -> EndpointOutlook:
        return outlook_of("chat", NATIVE, slots, StartTimes(), 102.0, HoldOff("the machine goes", 20.0))

    assert told() == EndpointOutlook("chat", 20.0 + DEFAULT_S["cold"], "the machine goes")
    assert told(slot("draining")) == told(slot("pending")) == told()
    assert told(slot("starting"), slot("draining")).reason == "chat-1 starts (its process)"
    assert told(slot("ready")).eta_s == 0.0


def test_the_soonest_replica_is_what_is_waited_for() -> None:
    assert expect(slot("ready"), slot("starting")) == EndpointOutlook("chat", 0.0)
    starting, waking = slot("starting"), slot("standby", "chat-2", role="serving", change_since_s=101.9)
    assert expect(starting, waking) == EndpointOutlook("chat", pytest.approx(0.2), "chat-2 wakes")
    assert expect(starting) == EndpointOutlook("chat", 4.0, "chat-1 starts (its process)")
    assert expect(slot("standby", role="standby")).eta_s == DEFAULT_S["standby"]
    assert expect() == EndpointOutlook("chat", DEFAULT_S["cold"], "a request starts a replica")
    assert expect(slot("draining")).eta_s == DEFAULT_S["cold"]
    simulated = Endpoint(model="m", engine="simulated", simulated={"start_s": 2})  # type: ignore[arg-type]
    assert outlook_of("chat", simulated, [], StartTimes(), 0.0).eta_s == pytest.approx(2.7)


def test_what_failed_is_told_with_its_error_and_with_no_promise() -> None:
    again = slot("pending", failures=2, ended_s=101.5, last_error="it crashed", is_alive=False)
    assert expect(again) == EndpointOutlook("chat", 6.5, "chat-1 is started again after: it crashed")
    failed = slot("failed", failures=9, last_error="no such model")
    asleep = slot("standby", "chat-2", role="resting")
    outlook = expect(failed, asleep)
    assert outlook.eta_s < 0
    assert "chat-1 is failed, retried every 60 s: no such model" in outlook.reason
    assert "`headrace wake chat-2` wakes it" in outlook.reason


def test_a_shorter_time_alone_is_no_news() -> None:
    before = [EndpointOutlook("chat", 5.0, "chat-1 starts")]
    assert not is_news(before, [EndpointOutlook("chat", 4.0, "chat-1 starts")])
    assert is_news(before, [EndpointOutlook("chat", 0.0, "chat-1 starts")])
    assert is_news(before, [EndpointOutlook("chat", 5.0, "chat-1 wakes")])
    assert is_news(before, [])


def fleet_of(*replica_ids: str, **fields: Any) -> Fleet:
    fleet = Fleet()
    for replica_id in replica_ids:
        endpoint = replica_id.split("-")[0]
        fleet.start(StartReplica(replica_id, endpoint, "test", "g"), 5.0, 0.0)
        report(fleet, replica_id, **fields)
    fleet.observe(1.0)
    return fleet


def report(fleet: Fleet, replica_id: str, now_s: float = 1.0, **fields: Any) -> None:
    values: dict[str, Any] = {
        "state": "ready",
        "generation": "g",
        "peer_socket": f"/run/peer-{replica_id}.sock",
    }
    values |= {"stream_class": "c", "max_open": 8, "num_open": 1, "num_guests": 2} | fields
    endpoint = replica_id.split("-")[0]
    fleet.on_report(LoadReport(replica_id, endpoint, "m", "a:1", 0, 1, 3.0, **values), now_s)


def test_siblings_are_the_others_of_the_same_endpoint_that_offer_their_engines() -> None:
    fleet = fleet_of("chat-1", "chat-2", "chat-3", "other-1")
    report(fleet, "chat-3", peer_socket="")
    siblings = siblings_of(fleet.slots.values())
    assert {name: [s.replica_id for s in others] for name, others in siblings.items()} == {
        "chat-1": ["chat-2"],
        "chat-2": ["chat-1"],
        "other-1": [],
    }
    (sibling,) = siblings["chat-1"]
    assert (sibling.num_open, sibling.max_open, sibling.state) == (3, 8, "ready")
    fleet.stop(StopReplica("chat-2", "chat", 5.0, "test"))
    assert siblings_of(fleet.slots.values())["chat-1"][0].state == "draining"
    for now_s in range(2, 31):
        fleet.observe(float(now_s))
    assert siblings_of(fleet.slots.values())["chat-2"][0].state == "failed", "its word is too old"


class FakeChannel:
    """Takes what a connection is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def take(self) -> list[Any]:
        sent, self.sent = self.sent, []
        return sent


def test_fronts_are_told_changes_at_once_loads_once_a_second_and_all_when_they_come_back() -> None:
    fleet = fleet_of("chat-1", "chat-2")
    connections, channel = Connections(), FakeChannel()
    connections.add_front("chat-1", channel)  # type: ignore[arg-type]

    def tell(now_s: float) -> list[Any]:
        connections.send_siblings(siblings_of(fleet.slots.values()), now_s)
        return channel.take()

    assert [type(message) for message in tell(1.0)] == [Siblings]
    assert tell(1.1) == []
    report(fleet, "chat-2", num_open=5)
    assert tell(1.2) == []
    assert tell(1.0 + LOAD_PERIOD_S)[0].siblings[0].num_open == 7
    report(fleet, "chat-2", state="draining")
    assert tell(2.1)[0].siblings[0].state == "draining"
    connections.remove(channel)  # type: ignore[arg-type]
    assert not connections.set_sleep("chat-1", 1)
    connections.add_front("chat-1", channel)  # type: ignore[arg-type]
    assert len(tell(2.2)) == 1
    assert connections.set_sleep("chat-1", 1)
    assert channel.take() == [SetSleep(1)]


def test_routers_hear_news_at_once_and_times_every_second_while_somebody_waits() -> None:
    connections, router = Connections(), FakeChannel()
    assert connections.add_router("g1", router)  # type: ignore[arg-type]
    assert not connections.add_router("g1", router)  # type: ignore[arg-type]

    def tell(eta_s: float, now_s: float) -> int:
        connections.send_outlooks([EndpointOutlook("chat", eta_s, "it starts")], now_s)
        return len(router.take())

    assert [tell(5.0, 10.0), tell(4.5, 10.5), tell(4.0, 11.0), tell(0.0, 11.1), tell(0.0, 99.0)] == [
        1,
        0,
        1,
        1,
        0,
    ]
    late = FakeChannel()
    connections.add_router("g2", late)  # type: ignore[arg-type]
    assert late.take() == [Outlook([EndpointOutlook("chat", 0.0, "it starts")])]


def test_versions_are_counted_over_routers_and_their_restarts() -> None:
    counts = VersionCounts()

    def say(pid: int, finished: int, failed: int, router_id: str = "g1") -> Outcomes:
        version = VersionDemand("chat", "a", finished, failed)
        counts.observe(Demand(router_id, pid, [], [], versions=[version]))
        return counts.of("chat", "a")

    assert say(1, 5, 1) == Outcomes(5, 1)
    assert say(1, 7, 1) == Outcomes(7, 1)
    assert say(2, 2, 0) == Outcomes(9, 1), "a new process counts from zero"
    assert say(9, 4, 4, "g2") == Outcomes(13, 5)
    assert counts.of("chat", "b") == Outcomes()
    counts.forget_all_but([])
    assert say(2, 3, 0) == Outcomes(1, 0)


def test_the_loss_of_a_replica_costs_its_open_tokens_and_what_its_cache_spared_lately() -> None:
    fleet = fleet_of("chat-1")
    info = EngineReady("simulated", "x", 9, 9, 16, 100, 8, "path", {})
    load = EngineLoad(num_free_blocks=90, num_total_blocks=100, prefix_hit_tokens=500)
    report(fleet, "chat-1", engine=load, engine_info=info)
    (replica,) = fleet.observe(1.0)
    assert replica.lost_tokens == 10 * 16 + 500
    (replica,) = fleet.observe(1000.0)
    assert replica.lost_tokens == pytest.approx(160, abs=1)
