"""Tenants in the dispatcher: shares, limits and charges hold whatever is reported, how often, by whom."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.api.messages import (
    EndpointRule,
    EngineLoad,
    FinishedRequest,
    LoadReport,
    TenantDemand,
    TenantRule,
    TerminalState,
)
from headrace.gateway.dispatcher import Arrival, Bound, Dispatcher, Refused
from headrace.gateway.replicas import ReplicaTable
from headrace.policy.prompt import PromptHead

CHAT = EndpointRule("chat", "m", 8, 10.0, "least_loaded")
CODE = EndpointRule("code", "m", 8, 10.0, "least_loaded")
A, B = TenantRule("a"), TenantRule("b")


class World:
    """One gateway's dispatcher, and what it answered."""

    def __init__(self, *tenants: TenantRule, gateway_id: str = "g1") -> None:
        self.gateway_id = gateway_id
        self.table = ReplicaTable(gateway_id=gateway_id)
        self.dispatcher = Dispatcher([CHAT, CODE], self.table, tenants=tenants or (A, B))
        self.answers: dict[str, list[Bound | Refused]] = {}
        self.now_s = 100.0
        self.sequence = 0

    def report(self, replica_id: str = "chat-1", *finished: FinishedRequest, **changes: Any) -> None:
        self.sequence += 1
        endpoint = replica_id.partition("-")[0]
        values = {
            "endpoint": endpoint, "model": "m", "address": "127.0.0.1:9000", "pid": 1, "lease_s": 60.0,
            "state": "ready", "max_open": 2, "sequence": self.sequence,
        }  # fmt: skip
        report = LoadReport(replica_id=replica_id, finished=list(finished), **{**values, **changes})
        replica = self.table.observe(report, self, self.now_s)
        if replica is not None:
            replica.is_serving = True
        self.dispatcher.take_report(report, replica, self.now_s)
        self.dispatcher.pump(endpoint, self.now_s)

    def arrive(
        self, request_id: str, tenant: str = "a", endpoint: str = "chat", num_bytes: int = 400
    ) -> None:
        answers = self.answers.setdefault(request_id, [])
        prompt = PromptHead(num_bytes=num_bytes, max_output_tokens=100)
        arrival = Arrival(request_id, endpoint, answers.append, "spoe", request_id, tenant, prompt)
        self.dispatcher.arrive(arrival, self.now_s)

    def complete(self, request_id: str, state: TerminalState = TerminalState.FINISHED) -> None:
        self.dispatcher.complete(request_id, "chat", state)
        self.dispatcher.pump("chat", self.now_s)

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.table.expire(self.now_s)
        self.dispatcher.tick(self.now_s)

    def refusal(self, request_id: str) -> Refused:
        (answer,) = self.answers[request_id]
        assert isinstance(answer, Refused), answer
        return answer

    def bound(self) -> list[str]:
        return [name for name, answers in self.answers.items() if answers and isinstance(answers[0], Bound)]

    def counter(self, tenant: str) -> float:
        return self.dispatcher.endpoints["chat"].queue.counter(tenant)

    def account(self, tenant: str, endpoint: str = "chat") -> TenantDemand:
        demands = self.dispatcher.tenant_demands(self.now_s)
        return next(each for each in demands if (each.endpoint, each.tenant) == (endpoint, tenant))


def finish(
    request_id: str, tenant: str = "a", prompt: int = 100, output: int = 100, **changes: Any
) -> FinishedRequest:
    values = {"state": TerminalState.FINISHED, "cached": 0, "engine_s": 0.0, **changes}
    state, cached, engine_s = values["state"], values["cached"], values["engine_s"]
    return FinishedRequest(request_id, state, "stop", tenant, prompt, cached, output, 0.1, 1.0, engine_s)


def test_a_flood_of_one_tenant_delays_another_by_one_request() -> None:
    world = World()
    for number in range(7):
        world.arrive(f"flood{number}")
    world.arrive("light", "b")
    world.report(max_open=2)
    assert world.bound() == ["flood0", "light"]


def test_a_flood_that_fills_the_queue_leaves_places_for_others() -> None:
    world = World()
    for number in range(9):
        world.arrive(f"flood{number}")
    assert world.refusal("flood8").status == 503
    assert world.refusal("flood8").code == "queue_full"
    world.arrive("light", "b")
    assert world.answers["light"] == []
    assert world.refusal("flood7").code == "queue_full", "the flood's youngest made room"
    world.dispatcher.check_integrity()


def test_a_tenant_at_its_limit_waits_while_others_pass_and_goes_on_when_one_ends() -> None:
    world = World(TenantRule("a", max_concurrent=1), B)
    world.report(max_open=9)
    for name in ("a0", "a1"):
        world.arrive(name)
    world.arrive("b0", "b")
    assert world.bound() == ["a0", "b0"]
    world.complete("a0")
    assert world.bound() == ["a0", "a1", "b0"]
    world.dispatcher.check_integrity()


def test_a_limit_on_requests_at_a_time_holds_over_endpoints() -> None:
    world = World(TenantRule("a", max_concurrent=1), B)
    world.report("chat-1", max_open=9)
    world.report("code-1", max_open=9)
    world.arrive("a0")
    world.arrive("a1", endpoint="code")
    assert world.bound() == ["a0"]
    world.complete("a0")  # of the other endpoint
    assert world.bound() == ["a0", "a1"]


def test_rates_refuse_with_429_and_say_when_to_come_again() -> None:
    world = World(TenantRule("a", requests_per_minute=2), TenantRule("b", tokens_per_minute=1000))
    for number in range(3):
        world.arrive(f"a{number}", "a")
    refusal = world.refusal("a2")
    assert (refusal.status, refusal.code, refusal.retry_after_s) == (429, "rate_limit_exceeded", 30)
    for number in range(6):
        world.arrive(f"b{number}", "b")  # 100 prompt tokens and 100 of the answer, as expected
    assert world.refusal("b5").retry_after_s == 12
    assert world.account("b").refused == 1
    world.pass_time(9)
    world.arrive("a3", "a")
    assert world.refusal("a3").retry_after_s == 21
    world.dispatcher.check_integrity()


def test_what_was_not_served_is_given_back_to_the_tokens() -> None:
    world = World(TenantRule("a", tokens_per_minute=400))
    world.arrive("a0")
    world.arrive("a1")
    world.dispatcher.clients_left({"a0"}, world.now_s)
    world.arrive("a2")
    assert world.answers["a2"] == []
    world.arrive("a3")
    assert world.refusal("a3").status == 429


def test_a_tenants_own_queue_limit_is_429_and_its_own_longest_wait_503() -> None:
    world = World(TenantRule("a", max_queued=2, max_wait_s=3.0), B)
    for number in range(3):
        world.arrive(f"a{number}")
    refusal = world.refusal("a2")
    assert (refusal.status, refusal.code) == (429, "rate_limit_exceeded")
    assert "limits.max_queued is 2" in refusal.message
    world.arrive("b0", "b")
    world.pass_time(3)
    assert world.refusal("a0").status == 503
    assert "3 s (limits.max_wait_s of tenant `a`)" in world.refusal("a0").message
    assert world.answers["b0"] == []


@pytest.mark.parametrize("is_log_first", [True, False])
def test_the_fronts_word_corrects_the_charge_before_or_after_the_log_and_once(is_log_first: bool) -> None:
    world = World(TenantRule("a", tokens_per_minute=10_000), B)
    world.report(engine=EngineLoad(prefill_token_s=0.001, decode_token_s=0.01))
    world.arrive("x")
    assert world.counter("a") == pytest.approx(100 * 0.001 + 100 * 0.01)
    if is_log_first:
        world.complete("x")
    done = finish("x", prompt=50, output=10, cached=40)
    world.report("chat-1", done)
    if not is_log_first:
        world.complete("x")
    for _ in range(3):
        world.report("chat-1", done)
    assert world.counter("a") == pytest.approx(10 * 0.001 + 10 * 0.01)
    account = world.account("a")
    assert (account.prompt_tokens, account.output_tokens) == (50, 10)
    assert account.work_s == pytest.approx(0.11)
    assert world.dispatcher._tenants.limits["a"]._tokens.level(world.now_s) == 10_000 - 60


@pytest.mark.parametrize("gateway", ["here", "elsewhere"])
def test_a_request_is_charged_the_engine_time_that_was_measured_for_it(gateway: str) -> None:
    world = World()
    world.report()
    done = finish("x" if gateway == "here" else "hr-g2-1", prompt=50, output=10, engine_s=0.375)
    if gateway == "here":
        world.arrive("x")
    # The costs come with the same report: what ended is charged in seconds all the same.
    world.report("chat-1", done, engine=EngineLoad(prefill_token_s=0.001, decode_token_s=0.01))
    assert world.counter("a") == pytest.approx(0.375)
    assert world.account("a").share == 1.0
    if gateway == "here":
        assert world.account("a").work_s == pytest.approx(0.375)


def test_engine_time_that_cannot_be_is_not_believed() -> None:
    world = World()
    world.report(engine=EngineLoad(prefill_token_s=0.001, decode_token_s=0.01))
    world.arrive("x")
    world.report("chat-1", finish("x", prompt=10, output=10, engine_s=1000.0))  # open for 1 s
    assert world.counter("a") == pytest.approx(0.11)


def test_a_finish_that_never_comes_leaves_the_estimate_and_no_slot() -> None:
    world = World(TenantRule("a", max_concurrent=1))
    world.report(engine=EngineLoad(prefill_token_s=0.001, decode_token_s=0.01))
    world.arrive("x")
    world.complete("x", TerminalState.FAILED)
    assert world.counter("a") == pytest.approx(1.1)
    assert world.dispatcher._tenants.limits["a"].num_bound == 0
    world.dispatcher.check_integrity()


def test_a_request_that_was_retried_is_charged_by_the_report_that_has_tokens() -> None:
    world = World()
    world.report(engine=EngineLoad(prefill_token_s=0.001, decode_token_s=0.01))
    world.arrive("x")
    world.report("chat-1", finish("x", prompt=0, output=0, state=TerminalState.REFUSED))
    assert world.counter("a") == 0
    world.report("chat-1", finish("x", prompt=10, output=10))
    assert world.counter("a") == pytest.approx(0.11)


@pytest.mark.parametrize(
    "nonsense", [{"prompt": -1}, {"output": -5}, {"cached": 101}, {"prompt": 10**12}, {"cached": -1}]
)
def test_a_report_with_impossible_numbers_frees_the_slot_and_leaves_the_estimate(
    nonsense: dict[str, int],
) -> None:
    world = World(TenantRule("a", max_concurrent=1))
    world.report()
    world.arrive("x")
    before = world.counter("a")
    world.report("chat-1", finish("x", **nonsense), finish("hr-g2-1", **nonsense))
    assert world.counter("a") == before
    assert world.dispatcher.num_ignored_finishes == 2
    assert world.dispatcher._tenants.limits["a"].num_bound == 0


def test_what_another_gateway_served_is_charged_here_once() -> None:
    world = World(TenantRule("a", tokens_per_minute=1000, requests_per_minute=5), B)
    world.report(engine=EngineLoad(prefill_token_s=0.001, decode_token_s=0.01))
    done = finish("hr-g2-1", prompt=400, output=200)
    for _ in range(3):
        world.report("chat-1", done)
    assert world.counter("a") == pytest.approx(2.4)
    world.arrive("x", num_bytes=2000)  # 500 + 100 tokens: too many after those 600
    assert world.refusal("x").status == 429
    for number in range(2, 6):
        world.report("chat-1", finish(f"hr-g2-{number}", prompt=1, output=0))
    world.arrive("y", num_bytes=4)
    assert "requests_per_minute" in world.refusal("y").message
    assert world.account("a").prompt_tokens == 0, "other routers count theirs themselves"
    assert world.account("a").share == 1.0


def test_a_request_that_haproxy_served_without_asking_is_charged_to_its_tenant() -> None:
    for is_log_first in (True, False):
        world = World()
        world.report(engine=EngineLoad(prefill_token_s=0.001, decode_token_s=0.01))
        if is_log_first:
            world.complete("hr-g1-1")
        for _ in range(2):
            world.report("chat-1", finish("hr-g1-1", "b", prompt=100, output=10))
        if not is_log_first:
            world.complete("hr-g1-1")
        assert world.counter("b") == pytest.approx(0.2)
        world.dispatcher.check_integrity()


def test_what_others_have_open_counts_against_the_limit_until_they_are_done_or_the_replica_is_gone() -> None:
    world = World(TenantRule("a", max_concurrent=2), B)
    world.report(max_open=9, num_open=2, open_by_tenant={"a": 2})
    world.arrive("x")
    assert world.bound() == []
    world.arrive("y", "b")
    assert world.bound() == ["y"]
    world.report(max_open=9, num_open=2, open_by_tenant={"a": 1, "b": 1})
    assert world.bound() == ["x", "y"]
    world.complete("x")
    world.report(max_open=9, num_open=3, open_by_tenant={"a": 2, "b": 1}, lease_s=1.0)
    world.arrive("z")
    assert world.answers["z"] == []
    world.pass_time(2.0)  # the replica's lease ends
    world.report("chat-2", max_open=9)
    assert "z" in world.bound()


def test_open_requests_that_do_not_add_up_are_not_believed() -> None:
    world = World(TenantRule("a", max_concurrent=2), B)
    world.report(max_open=9, num_open=1, open_by_tenant={"a": 1000})
    world.report(max_open=9, num_open=1, open_by_tenant={"a": 1000, "b": -999})
    world.arrive("x")
    assert world.bound() == ["x"]


def test_a_late_report_changes_no_load_but_its_ends_count() -> None:
    world = World(TenantRule("a", max_concurrent=1))
    world.report()
    world.arrive("x")
    world.report("chat-1", finish("x"), sequence=0, num_open=2, open_by_tenant={"a": 2})
    world.arrive("y")
    assert world.bound() == ["x", "y"]


def test_tenants_change_at_run_time_and_held_requests_keep_their_place() -> None:
    world = World(A, B, TenantRule("gone"))
    for number in range(3):
        world.arrive(f"a{number}", "a")
    world.arrive("g0", "gone")
    world.arrive("b0", "b")
    world.dispatcher.set_tenants(
        [TenantRule("a", max_concurrent=1), TenantRule("b", priority=0)], world.now_s
    )
    assert "was removed" in world.refusal("g0").message
    world.report(max_open=9)
    assert world.bound() == ["a0", "b0"]
    world.dispatcher.set_tenants([A, B], world.now_s)
    assert world.bound() == ["a0", "a1", "a2", "b0"]
    world.arrive("g1", "gone")
    assert world.refusal("g1").status == 503
    world.dispatcher.check_integrity()


def test_requests_of_a_removed_tenant_that_run_are_finished_and_free_their_slots() -> None:
    world = World()
    world.report()
    world.arrive("x")
    world.dispatcher.set_tenants([B], world.now_s)
    world.report("chat-1", finish("x"))
    world.complete("x")
    assert world.table.replicas["chat-1"].num_in_flight == 0
    world.dispatcher.check_integrity()


def test_the_clock_may_jump_and_the_rates_go_on() -> None:
    world = World(TenantRule("a", requests_per_minute=60), B)
    world.report(lease_s=60.0)
    for jump_s in (-1e6, 1e9, -1e9, 5.0):
        world.now_s += jump_s
        world.dispatcher.tick(world.now_s)
        world.dispatcher.check_integrity()
    world.arrive("x")
    assert len(world.answers["x"]) <= 1
    world.pass_time(1.5)
    assert world.dispatcher._second_started_s == world.now_s


def test_the_share_lately_and_the_totals_are_told() -> None:
    world = World()
    world.report(max_open=9)
    for number, tenant in enumerate("aaab"):
        world.arrive(f"r{number}", tenant)
    world.report("chat-1", *(finish(f"r{number}", "aaab"[number]) for number in range(4)))
    for number in range(4):
        world.complete(f"r{number}")
    assert world.account("a").share == pytest.approx(0.75)
    assert world.account("b").finished == 1
    world.pass_time(1.0)
    assert world.account("a").share == pytest.approx(0.75)
    world.arrive("held", "b")
    assert world.account("b").arrived == 2


class TenantMachine(RuleBasedStateMachine):
    """Random days of tenants with limits: reports late, twice, of strangers; rules that change; clocks that
    jump."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(
            TenantRule("a", max_concurrent=2, tokens_per_minute=5000), TenantRule("b", priority=0)
        )
        self.ids: list[tuple[str, str]] = []

    @rule(tenant=st.sampled_from(["a", "b", "stranger"]), endpoint=st.sampled_from(["chat", "code"]))
    def a_request_arrives(self, tenant: str, endpoint: str) -> None:
        request_id = f"hr-g1-{len(self.ids)}"
        self.ids.append((request_id, tenant))
        self.world.arrive(request_id, tenant, endpoint)

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), state=st.sampled_from(TerminalState))
    def a_completion_comes(self, data: st.DataObject, state: TerminalState) -> None:
        self.world.complete(data.draw(st.sampled_from(self.ids))[0], state)

    @rule(
        data=st.data(),
        replica=st.sampled_from(["chat-1", "code-1"]),
        open_by_tenant=st.dictionaries(st.sampled_from(["a", "b", ""]), st.integers(-1, 3)),
        excess=st.sampled_from([0, 0, 0, 1]),
        sequence=st.sampled_from([None, None, 0]),
    )
    def a_replica_reports(
        self,
        data: st.DataObject,
        replica: str,
        open_by_tenant: dict[str, int],
        excess: int,
        sequence: int | None,
    ) -> None:
        ids = [*self.ids, ("hr-g2-1", "a"), ("hr-g2-2", "b"), ("hr-g1-unseen", "a")]
        ended = data.draw(st.lists(st.sampled_from(ids), max_size=3))
        finished = [
            finish(request_id, tenant, data.draw(st.integers(-1, 50)), data.draw(st.integers(0, 50)))
            for request_id, tenant in ended
        ]
        changes = {} if sequence is None else {"sequence": sequence}
        num_open = max(0, sum(open_by_tenant.values()) + excess)
        engine = EngineLoad(prefill_token_s=0.001, decode_token_s=data.draw(st.sampled_from([0.0, 0.01])))
        self.world.report(
            replica, *finished, num_open=num_open, open_by_tenant=open_by_tenant, engine=engine, **changes
        )

    @rule(max_concurrent=st.integers(0, 2), band=st.integers(0, 2), has_b=st.booleans())
    def rules_change(self, max_concurrent: int, band: int, has_b: bool) -> None:
        rules = [TenantRule("a", 2.0, band, max_concurrent=max_concurrent, max_queued=3)]
        self.world.dispatcher.set_tenants(rules + [B] * has_b, self.world.now_s)

    @rule(seconds=st.sampled_from([0.1, 1.0, 15.0, 700.0, -50.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule()
    def the_connection_ends(self) -> None:
        self.world.dispatcher.owner_lost("spoe", self.world.now_s)

    @invariant()
    def nothing_is_lost_and_no_slot_leaks(self) -> None:
        self.world.dispatcher.check_integrity()

    @invariant()
    def no_request_is_answered_twice(self) -> None:
        assert all(len(answers) <= 1 for answers in self.world.answers.values())

    @invariant()
    def nothing_waits_while_its_tenant_and_a_replica_have_room(self) -> None:
        dispatcher = self.world.dispatcher
        for name, endpoint in dispatcher.endpoints.items():
            room = endpoint.placer.place(self.world.table.choosable(name), PromptHead(), self.world.now_s)
            if room.replica_id is not None:
                for tenant, limits in dispatcher._tenants.limits.items():
                    assert not (endpoint.queue.num_held(tenant) and limits.has_room()), (name, tenant)

    @invariant()
    def a_tenants_requests_at_a_time_are_within_its_limit(self) -> None:
        for limits in self.world.dispatcher._tenants.limits.values():
            assert limits.num_bound >= 0


def test_a_slot_that_comes_free_at_one_endpoint_is_used_there_whoever_looks_next() -> None:
    world = World(TenantRule("a"))
    world.report("code-1")
    for number in range(3):
        world.arrive(f"r{number}", "a", "code")
    assert not world.answers["r2"]
    world.complete("r0")  # its line names another endpoint
    assert isinstance(world.answers["r2"][0], Bound)


TestTenantMachine = TenantMachine.TestCase
TestTenantMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
