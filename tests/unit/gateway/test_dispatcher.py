"""The dispatcher: whatever happens in whatever order, no request is lost or counted twice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.api.messages import EndpointRule, FinishedRequest, LoadReport, TerminalState
from headrace.gateway.decisions import Decision, DecisionLog
from headrace.gateway.dispatcher import (
    Arrival,
    Bound,
    Dispatcher,
    Refused,
)
from headrace.gateway.flights import LOG_GRACE_S, ORPHAN_LIMIT_S, RECONCILE_AFTER_S
from headrace.gateway.replicas import ReplicaTable
from headrace.policy.placement import Placement, RoundRobin
from headrace.policy.prompt import PromptHead

CHAT = EndpointRule("chat", "m", 3, 10.0)


class World:
    """A dispatcher, its replicas, and the answers that it gave."""

    def __init__(self, rules: tuple[EndpointRule, ...] = (CHAT,)) -> None:
        self.table = ReplicaTable()
        self.dispatcher = Dispatcher(rules, self.table)
        self.answers: dict[str, list[Bound | Refused]] = {}
        self.now_s = 100.0
        self.sequence = 0

    def report(self, replica_id: str = "chat-1", **changes: Any) -> None:
        self.sequence += 1
        values = {
            "endpoint": "chat", "model": "m", "address": "127.0.0.1:9000", "pid": 1, "lease_s": 60.0,
            "state": "ready", "max_open": 2,
        }  # fmt: skip
        report = LoadReport(replica_id=replica_id, sequence=self.sequence, **{**values, **changes})
        replica = self.table.observe(report, self, self.now_s)
        if replica is not None:
            replica.is_serving = True
        self.dispatcher.pump("chat", self.now_s)

    def arrive(self, request_id: str, owner: object = None, client: object = None) -> None:
        answers = self.answers.setdefault(request_id, [])
        arrival = Arrival(request_id, "chat", answers.append, owner, client)  # type: ignore[arg-type]
        self.dispatcher.arrive(arrival, self.now_s)

    def come_again(self, request_id: str, pass_name: str, owner: object = None) -> list[Bound | Refused]:
        """The relay sends a request again. Return what this pass is answered, now or later."""
        answers = self.answers.setdefault(f"{request_id}, pass {pass_name}", [])
        arrival = Arrival(request_id, "chat", answers.append, owner, pass_name=pass_name)
        self.dispatcher.arrive(arrival, self.now_s)
        return answers

    def complete(self, request_id: str, state: TerminalState = TerminalState.FINISHED) -> None:
        self.dispatcher.complete(request_id, "chat", state)
        self.dispatcher.pump("chat", self.now_s)

    def finish_at_front(self, request_id: str, state: TerminalState = TerminalState.FINISHED) -> None:
        finished = FinishedRequest(request_id, state, "stop", "", 1, 0, 1, 0.1, 0.1)
        self.dispatcher.front_finished(finished, self.now_s)
        self.dispatcher.pump("chat", self.now_s)

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.table.expire(self.now_s)
        self.dispatcher.tick(self.now_s)

    def replica_of(self, request_id: str) -> str:
        (answer,) = self.answers[request_id]
        assert isinstance(answer, Bound)
        return answer.replica_id

    def counts(self) -> dict[str, int]:
        demand = self.dispatcher.demand(self.now_s)[0]
        names = ("arrived", "num_held", "num_in_flight", "finished", "aborted", "refused", "failed")
        return {name: getattr(demand, name) for name in names if getattr(demand, name)}


def test_a_request_goes_to_a_replica_with_room_and_ends_with_the_log() -> None:
    world = World()
    world.report()
    world.arrive("a")
    assert world.answers["a"] == [Bound("chat-1")]
    world.complete("a")
    world.complete("a")
    assert world.counts() == {"arrived": 1, "finished": 1}


def test_held_requests_are_bound_in_their_order_when_room_comes() -> None:
    world = World()
    for name in "abc":
        world.arrive(name)
    world.report(max_open=2)
    assert (world.answers["a"], world.answers["b"], world.answers["c"]) == (
        [Bound("chat-1")],
        [Bound("chat-1")],
        [],
    )
    world.complete("a")
    assert world.answers["c"] == [Bound("chat-1")]


def test_a_client_of_a_held_request_that_left_is_named_by_its_request() -> None:
    world = World()
    world.arrive("a")
    world.arrive("b")
    assert world.dispatcher.knows("a")
    world.dispatcher.client_left("a", world.now_s)
    world.dispatcher.client_left("unknown", world.now_s)
    assert [answer.code for answer in world.answers["a"] if isinstance(answer, Refused)] == ["cancelled"]
    assert world.counts() == {"arrived": 2, "num_held": 1, "aborted": 1}
    world.report()
    world.dispatcher.client_left("b", world.now_s)  # bound by now: its completion line tells
    assert world.counts() == {"arrived": 2, "num_in_flight": 1, "aborted": 1}
    assert world.dispatcher.knows("a")
    assert not world.dispatcher.knows("unknown")


def test_a_front_that_reports_the_end_first_frees_the_slot_and_the_log_settles_the_state() -> None:
    world = World()
    world.report(max_open=1)
    world.arrive("a")
    world.arrive("b")
    world.finish_at_front("a")
    assert world.answers["b"] == [Bound("chat-1")]
    assert world.counts() == {"arrived": 2, "num_in_flight": 2}
    world.complete("a", TerminalState.ABORTED)
    assert world.counts() == {"arrived": 2, "num_in_flight": 1, "aborted": 1}


def test_an_answer_that_broke_in_the_front_is_failed_though_haproxy_saw_it_end_well() -> None:
    world = World()
    world.report()
    world.arrive("a")
    world.finish_at_front("a", TerminalState.FAILED)
    world.complete("a")
    assert world.counts() == {"arrived": 1, "failed": 1}


def test_a_lost_completion_is_made_good_by_the_fronts_word() -> None:
    world = World()
    world.report()
    world.arrive("a")
    world.finish_at_front("a")
    world.pass_time(LOG_GRACE_S + 1)
    assert world.counts() == {"arrived": 1, "finished": 1}
    assert world.dispatcher.num_lost_completions == 1


def test_a_request_that_its_replica_does_not_know_is_given_up_but_a_long_stream_is_not() -> None:
    world = World()
    world.report(max_open=9)
    world.arrive("lost")
    world.arrive("long")
    world.pass_time(RECONCILE_AFTER_S / 2)
    world.report(max_open=9, num_open=1)
    world.arrive("new")  # the replica has not reported it yet; that says nothing about the old ones
    world.pass_time(RECONCILE_AFTER_S / 2 + 1)
    assert world.counts() == {"arrived": 3, "num_in_flight": 2, "failed": 1}
    assert world.dispatcher.num_lost_completions == 1


def test_a_request_of_a_replica_that_is_gone_waits_long_for_its_log() -> None:
    world = World()
    world.report(lease_s=1.0)
    world.arrive("a")
    world.pass_time(60)
    assert world.counts() == {"arrived": 1, "num_in_flight": 1}
    world.pass_time(ORPHAN_LIMIT_S)
    assert world.counts() == {"arrived": 1, "failed": 1}


def test_a_full_queue_refuses_and_an_old_request_expires() -> None:
    world = World()
    for name in "abcd":
        world.arrive(name)
    (answer,) = world.answers["d"]
    assert isinstance(answer, Refused)
    assert answer.code == "queue_full"
    assert answer.retry_after_s >= 1
    world.pass_time(CHAT.max_wait_s)
    assert world.counts() == {"arrived": 4, "refused": 4}
    (answer,) = world.answers["a"]
    assert isinstance(answer, Refused)
    assert "10 s" in answer.message


def test_clients_and_connections_that_leave_take_their_requests_with_them() -> None:
    world = World()
    world.arrive("a", owner="connection 1", client="left")
    world.arrive("b", owner="connection 1", client="stays")
    world.arrive("c", owner="connection 2", client="stays")
    world.dispatcher.clients_left({"left"}, world.now_s)
    assert world.counts() == {"arrived": 3, "num_held": 2, "aborted": 1}
    world.dispatcher.owner_lost("connection 1", world.now_s)
    assert world.counts() == {"arrived": 3, "num_held": 1, "num_in_flight": 1, "aborted": 1}
    world.complete("b", TerminalState.REFUSED)
    assert world.counts() == {"arrived": 3, "num_held": 1, "aborted": 1, "refused": 1}
    world.report()
    assert world.answers == {"a": world.answers["a"], "b": [], "c": [Bound("chat-1")]}


def test_a_completion_that_overtakes_its_announcement_is_not_held() -> None:
    world = World()
    world.complete("a", TerminalState.ABORTED)
    world.arrive("a")
    assert world.counts() == {"arrived": 1, "aborted": 1}
    assert len(world.answers["a"]) == 1


def test_replicas_that_drain_stop_lose_their_connection_or_are_no_server_are_not_chosen() -> None:
    for change in ({"state": "draining"}, {"state": "failed"}, {"state": "starting"}):
        world = World()
        world.report(**change)
        world.arrive("a")
        assert not world.answers["a"], change
    world = World()
    world.report()
    world.table.connection_closed(world, world.now_s)
    world.arrive("a")
    assert not world.answers["a"]
    world.report()
    assert world.answers["a"] == [Bound("chat-1")]
    world.table.mark_serving(frozenset())
    world.arrive("b")
    assert not world.answers["b"]


def test_a_removed_endpoint_refuses_what_it_holds_and_a_smaller_queue_keeps_it() -> None:
    world = World()
    world.arrive("a")
    world.dispatcher.set_rules([EndpointRule("chat", "m", 0, 10.0)])
    assert world.counts() == {"arrived": 1, "num_held": 1}
    world.dispatcher.set_rules([EndpointRule("other", "m", 3, 10.0)])
    (answer,) = world.answers["a"]
    assert isinstance(answer, Refused)
    assert [demand.endpoint for demand in world.dispatcher.demand(world.now_s)] == ["other"]


def test_the_integrity_check_shows_the_sum_that_failed() -> None:
    world = World()
    world.dispatcher.endpoints["chat"].arrived += 1
    with pytest.raises(AssertionError, match="arrived 1 != held 0"):
        world.dispatcher.check_integrity()


def test_a_removed_endpoint_is_forgotten_when_its_last_request_has_ended() -> None:
    world = World()
    world.report()
    world.arrive("a")
    world.dispatcher.set_rules([])
    assert world.counts() == {"arrived": 1, "num_in_flight": 1}
    world.arrive("late")
    assert isinstance(world.answers["late"][0], Refused)
    world.complete("a")
    world.pass_time(2)
    assert world.dispatcher.demand(world.now_s) == []


class DispatcherMachine(RuleBasedStateMachine):
    """Random days: requests, completions in any order, replicas that come and go, time that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.ids: list[str] = []
        self.num_passes = 0

    @rule(owner=st.sampled_from(["s1", "s2"]), client=st.sampled_from(["c1", "c2", "c3"]))
    def a_request_arrives(self, owner: str, client: str) -> None:
        self.ids.append(f"r{len(self.ids)}")
        self.world.arrive(self.ids[-1], owner, client)

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), state=st.sampled_from(TerminalState))
    def a_completion_comes(self, data: st.DataObject, state: TerminalState) -> None:
        self.world.complete(data.draw(st.sampled_from([*self.ids, "unseen"])), state)

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), owner=st.sampled_from(["s1", "s2"]))
    def the_relay_sends_one_again(self, data: st.DataObject, owner: str) -> None:
        self.num_passes += 1
        self.world.come_again(data.draw(st.sampled_from(self.ids)), str(self.num_passes), owner)

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def a_pass_is_refused(self, data: st.DataObject) -> None:
        name = str(data.draw(st.integers(max(0, self.num_passes - 3), self.num_passes)))
        request_id = data.draw(st.sampled_from(self.ids))
        self.world.dispatcher.passes.refused(request_id, name, self.world.now_s)

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def a_first_pass_ends(self, data: st.DataObject) -> None:
        self.world.dispatcher.passes.first_ended(data.draw(st.sampled_from(self.ids)), self.world.now_s)

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), state=st.sampled_from(TerminalState))
    def a_front_reports_an_end(self, data: st.DataObject, state: TerminalState) -> None:
        self.world.finish_at_front(data.draw(st.sampled_from(self.ids)), state)

    @rule(
        number=st.integers(0, 2),
        num_open=st.integers(0, 3),
        max_open=st.integers(0, 3),
        state=st.sampled_from(["ready", "ready", "draining", "failed"]),
    )
    def a_replica_reports(self, number: int, num_open: int, max_open: int, state: str) -> None:
        self.world.report(f"chat-{number}", num_open=num_open, max_open=max_open, state=state, lease_s=20.0)

    @rule(owner=st.sampled_from(["s1", "s2"]))
    def a_connection_ends(self, owner: str) -> None:
        self.world.dispatcher.owner_lost(owner, self.world.now_s)

    @rule(client=st.sampled_from(["c1", "c2", "c3"]))
    def a_client_leaves(self, client: str) -> None:
        self.world.dispatcher.clients_left({client}, self.world.now_s)

    @rule(seconds=st.sampled_from([0.1, 1.0, 15.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @invariant()
    def no_request_is_lost_or_counted_twice(self) -> None:
        self.world.dispatcher.check_integrity()

    @invariant()
    def no_request_is_answered_twice(self) -> None:
        assert all(len(answers) <= 1 for answers in self.world.answers.values())

    @invariant()
    def no_replica_has_a_negative_number_of_requests(self) -> None:
        assert all(replica.num_in_flight >= 0 for replica in self.world.table.replicas.values())

    @invariant()
    def nothing_waits_while_a_replica_has_room(self) -> None:
        for replica in self.world.table.choosable("chat"):
            if max(replica.num_in_flight, replica.num_open) < replica.max_open:
                assert self.world.dispatcher.num_held == 0


TestDispatcherMachine = DispatcherMachine.TestCase
TestDispatcherMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_reasons_are_told_to_who_asks_and_the_last_decisions_are_kept() -> None:
    world = World()
    world.report()
    answers: list[Bound | Refused] = []
    prompt = PromptHead((1, 2), 700)
    world.dispatcher.arrive(
        Arrival("a", "chat", answers.append, None, prompt=prompt, wants_route=True), world.now_s
    )
    world.arrive("b")
    (bound,) = answers
    assert isinstance(bound, Bound)
    assert bound.explanation == "replica=chat-1; reason=least_loaded; cached=0.00; score=0"
    assert world.answers["b"] == [Bound("chat-1")]
    decision = world.dispatcher.decisions.get("a")
    assert decision is not None
    assert (decision.placement.replica_id, decision.num_prompt_bytes) == ("chat-1", 700)


def test_the_log_of_decisions_is_bounded() -> None:
    log = DecisionLog(3)
    for number in range(10):
        log.add(str(number), Decision(Placement("r", "prefix"), 1, 0.0))
    assert (len(log), log.get("6"), log.get("7") is None) == (3, None, False)


def test_a_request_goes_where_its_prefix_is_reported_until_the_replica_is_gone() -> None:
    world = World()
    prompt = PromptHead((1, 2, 3), 800)
    for replica_id in ("chat-1", "chat-2"):
        world.report(replica_id)
    reported = LoadReport("chat-2", "chat", "m", "127.0.0.1:9000", 1, 99, 60.0, "ready", prefix_epoch=1,
                          prefixes_added=[1, 2, 3], max_open=2)  # fmt: skip
    world.dispatcher.replica_reported(world.table.replicas["chat-2"], reported, world.now_s)

    def reason(request_id: str) -> tuple[str | None, str]:
        arrival = Arrival(request_id, "chat", lambda _: None, None, prompt=prompt)
        world.dispatcher.arrive(arrival, world.now_s)
        decision = world.dispatcher.decisions.get(request_id)
        assert decision is not None
        world.complete(request_id)
        return decision.placement.replica_id, decision.placement.reason

    assert reason("a") == ("chat-2", "prefix")
    world.dispatcher.replica_gone(world.table.replicas["chat-2"])
    assert reason("b") == ("chat-1", "least_loaded")


def test_a_new_rule_changes_the_placer_and_an_unchanged_one_does_not() -> None:
    world = World()
    before = world.dispatcher.endpoints["chat"].placer
    world.dispatcher.set_rules([CHAT])
    assert world.dispatcher.endpoints["chat"].placer is before
    world.dispatcher.set_rules([EndpointRule("chat", "m", 3, 10.0, "round_robin")])
    assert isinstance(world.dispatcher.endpoints["chat"].placer, RoundRobin)
