"""The fleet's memory: which process is which replica, what it last said, and how it ended."""

from __future__ import annotations

from typing import Any

from headrace.api.messages import LoadReport, ProcessState
from headrace.control.fleet import ADOPTION_LIMIT_S, Fleet
from headrace.control.reconciler import StartReplica, StopReplica
from headrace.control.slots import LOST_AFTER_S, phase_of


def report(replica_id: str = "chat-1", *, pid: int = 7, **fields: Any) -> LoadReport:
    values: dict[str, Any] = {
        "endpoint": "chat",
        "model": "m",
        "address": "127.0.0.1:1",
        "sequence": 1,
        "lease_s": 3.0,
        "state": "ready",
        "generation": "g",
    }
    return LoadReport(replica_id=replica_id, pid=pid, **{**values, **fields})


def started(now_s: float = 0.0) -> Fleet:
    fleet = Fleet()
    fleet.start(StartReplica("chat-1", "chat", "test", "g"), 5.0, now_s)
    fleet.on_started(ProcessState("chat-1", 7, True))
    return fleet


def ended(code: int, output: str = "", pid: int = 7) -> ProcessState:
    return ProcessState("chat-1", pid, False, code, output)


def test_a_report_gives_state_and_lease() -> None:
    fleet = started()
    fleet.on_report(report(num_open=4), 1.0)
    (replica,) = fleet.observe(1.0)
    assert (replica.report_state, replica.num_open, replica.lease_ends_s) == ("ready", 4, 4.0)
    assert replica.ready_since_s == 1.0


def test_reports_of_strangers_and_of_earlier_processes_are_ignored() -> None:
    fleet = started()
    fleet.on_report(report("other-1"), 1.0)
    fleet.on_report(report(pid=6), 1.0)
    assert [replica.report_state for replica in fleet.observe(1.0)] == [None]


def test_a_report_of_a_process_of_the_same_pid_on_another_node_is_ignored() -> None:
    fleet = Fleet()
    fleet.start(StartReplica("chat-1", "chat", "test", "g"), 5.0, 0.0)
    fleet.on_report(report(node_address="10.0.0.1"), 0.5)  # the one before it, on a node that was cut off
    fleet.on_started(ProcessState("chat-1", 7, True, node="b", node_address="10.0.0.2"))
    assert [replica.report_state for replica in fleet.observe(1.0)] == [None]
    fleet.on_report(report(node_address="10.0.0.1"), 1.0)
    assert [replica.report_state for replica in fleet.observe(1.0)] == [None]
    fleet.on_report(report(node_address="10.0.0.2"), 1.0)
    assert [replica.report_state for replica in fleet.observe(1.0)] == ["ready"]


def test_an_end_that_nobody_asked_for_is_a_failure_with_its_last_line() -> None:
    fleet = started()
    fleet.on_ended(ended(1, "first\nMemoryError: no room"), 2.0)
    (replica,) = fleet.observe(2.0)
    assert not replica.is_alive
    assert replica.failures == 1
    assert replica.last_error == "exited with 1: MemoryError: no room"
    fleet.start(StartReplica("chat-1", "chat", "again", "g"), 5.0, 3.0)
    fleet.on_started(ProcessState("chat-1", 8, True))
    fleet.on_ended(ended(-9, pid=8), 4.0)
    assert fleet.slots["chat-1"].last_error == "ended by signal 9"
    assert fleet.slots["chat-1"].failures == 2


def test_what_a_failed_replica_said_is_kept_over_how_it_ended() -> None:
    fleet = started()
    fleet.on_report(report(state="failed", last_error="no such model", is_retryable=False), 1.0)
    fleet.stop(StopReplica("chat-1", "chat", 0.0, "no such model", is_failure=True))
    fleet.on_ended(ended(-9), 2.0)
    slot = fleet.slots["chat-1"]
    assert slot.last_error == "no such model"
    assert not slot.is_retryable
    fleet.forgive("chat")
    assert slot.failures == 0
    assert slot.is_retryable


def test_a_drained_replica_gives_its_slot_up() -> None:
    fleet = started()
    fleet.stop(StopReplica("chat-1", "chat", 5.0, "not wanted"))
    fleet.on_ended(ended(0), 2.0)
    assert fleet.slots == {}


def test_a_start_that_the_launcher_refuses_is_a_failure() -> None:
    fleet = Fleet()
    fleet.start(StartReplica("chat-1", "chat", "test", "g"), 5.0, 0.0)
    fleet.on_refused("chat-1", "no such program", 1.0)
    (replica,) = fleet.observe(1.0)
    assert not replica.is_alive
    assert replica.last_error == "no such program"


def test_a_new_controller_adopts_what_runs_and_waits_for_its_word() -> None:
    fleet = Fleet()
    processes = [ProcessState(name, 1, True) for name in ("controller", "router", "chat-2", "a-b-1")]
    fleet.adopt(processes, {"chat": "g"}, 0.0)
    assert set(fleet.slots) == {"chat-2", "a-b-1"}
    assert fleet.slots["chat-2"].generation == "g"
    assert fleet.slots["a-b-1"].endpoint == "a-b"
    assert not fleet.is_settled(1.0)
    fleet.on_report(report("chat-2", pid=1), 1.0)
    fleet.on_ended(ProcessState("a-b-1", 1, False, 0), 1.0)
    assert fleet.is_settled(1.0)
    fleet.adopt(processes, {"chat": "g"}, 10.0)
    assert fleet.is_settled(10.1 + ADOPTION_LIMIT_S)


def test_a_replica_that_a_user_put_to_sleep_is_nobody_elses_to_wake() -> None:
    fleet = started()
    fleet.on_report(report(), 1.0)
    fleet.rest("chat-1", is_asleep=True)
    fleet.on_report(report(state="standby", phase="asleep at level 1"), 2.0)
    assert fleet.observe(2.0)[0].role == "resting"
    fleet.rest("chat-1", is_asleep=False)
    fleet.on_report(report(), 3.0)
    assert fleet.observe(3.0)[0].role == "serving"


def test_a_sleeping_replica_of_an_earlier_controller_is_a_standby_only_where_there_are_some() -> None:
    for with_standby, role in ((["chat"], "standby"), ([], "resting")):
        fleet = Fleet()
        fleet.adopt([ProcessState("chat-1", 7, True)], {"chat": "g"}, 0.0, with_standby)
        fleet.on_report(report(state="standby", phase="asleep at level 1"), 1.0)
        assert fleet.observe(1.0)[0].role == role


def test_another_version_in_a_slot_did_nothing_wrong_yet() -> None:
    fleet = started()
    fleet.on_ended(ended(1), 2.0)
    fleet.start(StartReplica("chat-1", "chat", "test", "g"), 5.0, 3.0)
    assert fleet.slots["chat-1"].failures == 1
    fleet.on_started(ProcessState("chat-1", 8, True))
    fleet.on_ended(ended(1, pid=8), 4.0)
    fleet.start(StartReplica("chat-1", "chat", "test", "other"), 5.0, 5.0)
    assert fleet.slots["chat-1"].failures == 0


def test_a_replica_that_waits_for_a_place_is_not_lost_and_says_what_it_waits_for() -> None:
    fleet = Fleet()
    fleet.start(StartReplica("chat-1", "chat", "wanted", "a"), 30.0, 0.0)
    for now_s in range(1, 100):
        fleet.on_waiting("chat-1", "waits for a node", float(now_s))
        fleet.observe(float(now_s))
        assert fleet.slots["chat-1"].phase == "starting"
    assert fleet.slots["chat-1"].waiting_for == "waits for a node"
    fleet.on_started(ProcessState("chat-1", 7, True, node="there"))
    assert (fleet.slots["chat-1"].waiting_for, fleet.slots["chat-1"].node) == ("", "there")


def test_a_replica_whose_host_is_gone_says_why() -> None:
    fleet = Fleet()
    fleet.start(StartReplica("chat-1", "chat", "wanted", "a"), 30.0, 0.0)
    fleet.on_started(ProcessState("chat-1", 7, True, node="there"))
    fleet.on_ended(ProcessState("chat-1", 7, False, None, "its node is gone", "there"), 1.0)
    assert (fleet.slots["chat-1"].last_error, fleet.slots["chat-1"].node) == ("its node is gone", "")


def test_nobody_is_lost_because_the_controller_stood_still() -> None:
    """Reports that came meanwhile are read after the first look."""
    fleet = started()
    fleet.on_report(report(lease_s=3.0), 1.0)
    fleet.observe(1.2)
    woke_s = 100.0
    (replica,) = fleet.observe(woke_s)
    assert phase_of(replica, woke_s) == "ready"
    assert woke_s > replica.lease_ends_s, "nor does it count as heard"
    fleet.on_report(report(lease_s=3.0), woke_s)
    assert _phases(fleet, woke_s, woke_s + 3.0 + LOST_AFTER_S) == {"ready"}


def test_who_hangs_is_lost_though_the_controller_stood_still() -> None:
    fleet = started()
    fleet.on_report(report(lease_s=3.0), 1.0)
    assert _phases(fleet, 1.0, 10.0) == {"ready"}  # silent for 6 s of its own
    assert _phases(fleet, 50.0, 50.0 + LOST_AFTER_S - 6.1) == {"ready"}
    assert _phases(fleet, 50.0 + LOST_AFTER_S - 5.9, 60.0) == {"lost"}


def _phases(fleet: Fleet, from_s: float, to_s: float) -> set[str]:
    """Look five times a second."""
    moments = [from_s + 0.2 * number for number in range(int((to_s - from_s) / 0.2) + 1)]
    return {phase_of(replica, now_s) for now_s in moments for replica in fleet.observe(now_s)}
