"""What a replica says of itself follows from its parts, whatever they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pytest

from headrace.api.messages import (
    EngineLoad,
    EngineReady,
    EngineSpec,
    GenerationRequest,
    KvPlace,
    LeaveBy,
    Placed,
    ReplicaSpec,
    SamplingParams,
    SetSleep,
    Sibling,
    Siblings,
)
from headrace.observability.front_metrics import FrontMetrics
from headrace.policy.resumption import guest_room
from headrace.replica.placed_guests import PlacedGuests
from headrace.replica.prefix_digest import PrefixNews
from headrace.replica.self_view import FrontTraits, SelfView

INFO = EngineReady("simulated", "toy", 256, 2048, 16, 100, 32, "none", {})


@dataclass
class FakeEngine:
    state: str = "ready"
    phase: str = ""
    info: EngineReady | None = INFO
    load: EngineLoad | None = None
    num_restarts: int = 0
    last_error: str = ""
    is_retryable: bool = True
    pid: int = 77
    kv_place: KvPlace | None = None

    def why_not_ready(self) -> str:
        return f"the engine is {self.state}"


@dataclass
class FakeParts:
    """All parts of a front in one: they are only looked at."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    has_text: bool = True
    num_open: int = 0
    num_hosted: int = 0
    num_waiting: int = 0
    num_guests: int = 0
    placed: PlacedGuests = field(default_factory=PlacedGuests)
    is_leaving: bool = False
    error: str = ""
    has_begun: bool = False
    level: int = -1
    siblings: list[str] = field(default_factory=list)
    left_told_s: float = -1.0
    num_checks: int = 0

    @property
    def ledger(self) -> FakeParts:
        return self

    keeper = guests = standby = departure = ledger

    def has_model(self) -> bool:
        return self.has_text

    def open_by_gateway(self) -> dict[str, int]:
        return {"g1": self.num_open}

    def open_by_tenant(self) -> dict[str, int]:
        return {}

    def left_s(self) -> float:
        return -1.0

    def set_level(self, level: int) -> None:
        self.level = level

    def set_siblings(self, siblings: Sequence[Sibling]) -> None:
        self.siblings = [sibling.replica_id for sibling in siblings]

    def on_notice(self, left_s: float) -> None:
        self.left_told_s = left_s

    def check_integrity(self) -> None:
        self.num_checks += 1


def make_view(parts: FakeParts) -> SelfView:
    spec = ReplicaSpec("chat-1", "chat", EngineSpec("simulated", "toy"), "", [], lease_s=3.0, max_open=8)
    return SelfView(spec, parts, FrontMetrics("chat", "chat-1"), FrontTraits(9, 5, busy_interval_s=0.05))


@pytest.mark.parametrize(
    ("parts", "state", "reason"),
    [
        (FakeParts(), "ready", ""),
        (FakeParts(has_text=False), "starting", "the model's tokenizer is being loaded"),
        (FakeParts(FakeEngine("starting")), "starting", "the engine is starting"),
        (FakeParts(FakeEngine("starting"), is_leaving=True), "starting", "the engine is starting"),
        (FakeParts(is_leaving=True), "standby", "this replica goes on standby"),
        (FakeParts(FakeEngine("asleep")), "standby", "the engine is asleep"),
        (FakeParts(FakeEngine("failed"), is_leaving=True), "failed", "the engine is failed"),
        (FakeParts(FakeEngine("failed")), "failed", "the engine is failed"),
        (FakeParts(FakeEngine("failed"), has_begun=True), "draining", "this replica is leaving"),
    ],
)
def test_a_state_follows_from_the_parts_with_its_reason(parts: FakeParts, state: str, reason: str) -> None:
    view = make_view(parts)
    assert view.state() == state
    assert view.why_not_ready().startswith(reason)
    assert bool(view.why_not_ready()) == bool(reason)


def test_reports_are_numbered_and_say_what_is() -> None:
    parts = FakeParts(num_open=3, num_guests=2, num_hosted=1)
    view = make_view(parts)
    view.address = "127.0.0.1:80"
    for number in (1, 2):
        assert view.next_sequence == number
        report = view.make_report([], PrefixNews())
        assert report.sequence == number
    assert (report.state, report.address, report.pid, report.engine_pid) == ("ready", "127.0.0.1:80", 9, 77)
    assert (report.num_open, report.num_guests, report.num_hosted) == (3, 2, 1)
    assert report.open_by_gateway == {"g1": 3}
    assert report.stream_class == view.stream_class() != ""


def test_what_routers_placed_here_is_reported_as_its_own_requests() -> None:
    parts = FakeParts(num_open=3, num_guests=4)
    placed = Placed("hr-g1-7", "chat-1")
    for _ in range(2):
        parts.placed.add(placed, "acme")
    parts.placed.add(Placed("hr-g2-8", "chat-1"), "")
    view = make_view(parts)
    report = view.make_report([], PrefixNews())
    assert (report.num_open, report.num_guests) == (5, 1)
    assert report.open_by_gateway == {"g1": 4, "g2": 1}
    assert report.open_by_tenant == {"acme": 1, "": 1}
    parts.num_open = guest_room(8)
    guest = GenerationRequest("r", [1], SamplingParams(), stream_class=view.stream_class())
    assert "is all that it takes" in view.why_no_guest(guest)
    assert view.why_no_guest(msgspec.structs.replace(guest, placed=placed)) == "", "a choice of what is here"


@pytest.mark.parametrize(("engine_state", "phase"), [("ready", "cannot sleep"), ("starting", "loading")])
def test_a_wish_that_came_to_nothing_is_told_unless_the_engine_has_more_to_say(
    engine_state: str, phase: str
) -> None:
    parts = FakeParts(FakeEngine(engine_state, phase="loading"), error="cannot sleep")
    assert make_view(parts).make_report([], PrefixNews()).phase == phase


@pytest.mark.parametrize("parts", [FakeParts(num_open=1), FakeParts(num_guests=1), FakeParts(has_begun=True)])
def test_a_busy_replica_reports_often_and_an_idle_one_within_its_lease(parts: FakeParts) -> None:
    assert make_view(parts).report_interval_s() == 0.05
    assert make_view(FakeParts()).report_interval_s() == 1.0


def test_a_guest_is_refused_with_the_reason() -> None:
    parts = FakeParts()
    view = make_view(parts)
    guest = GenerationRequest("r", [1], SamplingParams(), stream_class=view.stream_class())
    other = GenerationRequest("r", [1], SamplingParams(), stream_class="another")
    assert view.why_no_guest(guest) == ""
    assert view.why_no_guest(other) == "this engine computes differently"
    parts.num_open = guest_room(8) - 1
    parts.num_guests = 1
    assert "is all that it takes" in view.why_no_guest(guest)
    parts.has_begun = True
    assert view.why_no_guest(guest) == "this replica is draining"


@pytest.mark.parametrize(
    ("engine_state", "place"), [("ready", "ready"), ("starting", "starting"), ("asleep", "gone")]
)
def test_the_own_engine_is_a_place_for_streams_unless_it_is_gone(engine_state: str, place: str) -> None:
    parts = FakeParts(FakeEngine(engine_state))
    view = make_view(parts)
    assert view.own_engine().state == place
    assert not view.own_engine().is_leaving
    parts.is_leaving = True
    assert view.own_engine().is_leaving


def test_orders_reach_the_part_that_they_are_for_and_nobody_is_its_own_sibling() -> None:
    parts = FakeParts()
    view = make_view(parts)
    view.follow(SetSleep(2))
    assert parts.level == 2
    view.follow(Siblings([Sibling(name, "", "", "ready") for name in ("chat-1", "chat-2")]))
    assert parts.siblings == ["chat-2"]
    view.follow(LeaveBy(30.0))
    assert parts.left_told_s == 30.0


def test_metrics_show_the_gauges_of_now_after_a_check() -> None:
    parts = FakeParts(FakeEngine(num_restarts=4), num_open=3, num_waiting=1)
    metrics = make_view(parts).update_metrics()
    assert (metrics.num_open, metrics.num_engine_restarts, metrics.num_stranded) == (3, 4, 1)
    assert metrics.is_ready
    assert parts.num_checks == 3
