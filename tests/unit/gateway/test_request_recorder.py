"""The per-request line: joined from what router, HAProxy and front say, in any order, once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.messages import FinishedRequest, TerminalState
from headrace.clock import VirtualClock
from headrace.gateway.completions import Completion
from headrace.gateway.dispatcher import Bound, Refused
from headrace.gateway.request_recorder import MAX_EARLY, PARTS_LIMIT_S, RequestRecorder
from headrace.observability.request_record import RequestRecord

ID = "hr-g1-1"
BOUND = Bound("chat-1", replica_id="chat-1", reason="least_loaded", cached_ratio=0.5)


def completion(request_id: str = ID, **fields: object) -> Completion:
    values = {
        "client_id": "mine",
        "tenant": "-",
        "path": "/v1/completions",
        "backend": "ep-chat",
        "server": "chat-1",
        "status": 200,
        "request_ms": 1,
        "wait_ms": 20,
        "connect_ms": 2,
        "first_byte_ms": 30,
        "total_ms": 100,
        "bytes_in": 10,
        "bytes_out": 20,
        "retries": "+2",
    }
    return Completion(request_id, **{**values, **fields})  # type: ignore[arg-type]


def finished(request_id: str = ID) -> FinishedRequest:
    return FinishedRequest(
        request_id, TerminalState.FINISHED, "stop", "acme", 7, 3, 5, 0.025, 0.1, 0.012345678, 1, ["chat-2"]
    )


class World:
    def __init__(self) -> None:
        self.clock = VirtualClock(100.0)
        self._records: list[RequestRecord] = []
        self.recorder = RequestRecorder("g1", self.clock, self._records.append)

    @property
    def records(self) -> list[RequestRecord]:
        """All records until now."""
        self.recorder.hand_out()
        return self._records

    def arrive(self, request_id: str = ID) -> None:
        self.recorder.arrived(request_id, "chat", "acme", "/v1/completions", self.clock.now_s())

    def bind(self, request_id: str = ID) -> None:
        self.recorder.answered(request_id, BOUND, self.clock.now_s())

    def complete(self, request_id: str = ID, **fields: object) -> None:
        """As the router does: the dispatcher first, which ends what it knows."""
        self.recorder.ended(request_id, "chat", TerminalState.FINISHED)
        self.recorder.completed(completion(request_id, **fields))

    def let_time_pass(self) -> None:
        self.clock.advance(PARTS_LIMIT_S)
        self.recorder.tick(self.clock.now_s())


def test_a_record_holds_what_each_of_them_said() -> None:
    world = World()
    world.arrive()
    world.clock.advance(0.25)
    world.bind()
    world.complete()
    assert world.records == [], "the front has not spoken yet"
    world.recorder.front_finished(finished())
    assert world.records == [
        RequestRecord(
            id=ID,
            client_id="mine",
            gateway="g1",
            endpoint="chat",
            model="chat",
            tenant="acme",
            path="/v1/completions",
            arrived_s=100.0,
            held_ms=250.0,
            replica="chat-1",
            placement="least_loaded",
            cached_ratio=0.5,
            retries=2,
            first_byte_ms=53,
            ttft_ms=48.0,
            total_ms=100,
            status=200,
            state="finished",
            code="",
            finish_reason="stop",
            prompt_tokens=7,
            cached_tokens=3,
            output_tokens=5,
            engine_ms=12.345678,
            bytes_in=10,
            bytes_out=20,
            resumptions=1,
            hosts=["chat-2"],
        )
    ]


def test_an_adapter_is_told_beside_its_endpoint_and_nothing_of_what_came_while_the_router_was_away() -> None:
    world = World()
    world.recorder.arrived(ID, "chat", "acme", "/v1/completions", world.clock.now_s(), "chat-law")
    world.bind()
    world.complete()
    world.complete("hr-g1-8")
    world.let_time_pass()
    told = {record.id: (record.endpoint, record.model) for record in world.records}
    assert told == {ID: ("chat", "chat-law"), "hr-g1-8": ("chat", "")}


def test_without_the_fronts_word_it_is_written_after_a_while() -> None:
    world = World()
    world.arrive()
    world.bind()
    world.complete()
    world.let_time_pass()
    assert [(record.state, record.output_tokens) for record in world.records] == [("finished", None)]
    assert world.recorder.num_incomplete == 1
    world.recorder.front_finished(finished())
    world.let_time_pass()
    assert len(world.records) == 1, "late words change nothing"


def test_without_haproxys_line_it_is_written_after_a_while() -> None:
    world = World()
    world.arrive()
    world.bind()
    world.recorder.front_finished(finished())
    world.recorder.ended(ID, "chat", TerminalState.FAILED)  # the dispatcher gave it up
    world.let_time_pass()
    (record,) = world.records
    assert (record.state, record.status, record.replica, record.output_tokens) == (
        "failed",
        None,
        "chat-1",
        5,
    )


def test_a_refusal_needs_no_front_and_says_why() -> None:
    world = World()
    world.arrive()
    world.recorder.ended(ID, "chat", TerminalState.REFUSED)
    world.recorder.answered(ID, Refused("full", "queue_full", 3), world.clock.now_s())
    world.recorder.completed(completion(server="<NOSRV>", status=503, connect_ms=-1, first_byte_ms=-1))
    (record,) = world.records
    assert (record.state, record.code, record.status, record.replica) == ("refused", "queue_full", 503, "")


def test_what_haproxy_refused_itself_has_a_record_at_once() -> None:
    world = World()
    line = completion(backend="-", server="<NOSRV>", status=401, tenant="-", connect_ms=-1, total_ms=500)
    world.recorder.answered_by_haproxy(line)
    (record,) = world.records
    assert (record.state, record.status, record.endpoint, record.tenant) == ("refused", 401, "", "")
    assert record.arrived_s == 99.5


def test_a_request_that_the_router_never_saw_is_joined_too() -> None:
    world = World()
    world.recorder.front_finished(finished())
    world.complete()
    (record,) = world.records
    assert (record.endpoint, record.held_ms, record.output_tokens) == ("chat", None, 5)


def word_of(state: TerminalState, num_output_tokens: int) -> FinishedRequest:
    return FinishedRequest(ID, state, "x", "acme", 7, 0, num_output_tokens, 0.0, 0.1, 0.0, 0, [])


@pytest.mark.parametrize("state", [TerminalState.REFUSED, TerminalState.ABORTED, TerminalState.FAILED])
@pytest.mark.parametrize("order", ["words first", "line first", "line between"])
def test_of_a_request_that_was_sent_again_the_try_counts_that_answered(
    state: TerminalState, order: str
) -> None:
    """HAProxy sends what a front refused, or broke off before its first byte, to another one."""
    world = World()
    world.arrive()
    world.bind()
    said = [
        lambda: world.recorder.front_finished(word_of(state, 0)),
        lambda: world.recorder.front_finished(finished()),
    ]
    said.insert({"words first": 2, "line first": 0, "line between": 1}[order], world.complete)
    for say in said:
        assert not world.records
        say()
    [record] = world.records
    assert (record.output_tokens, record.finish_reason) == (5, "stop")
    world.let_time_pass()
    assert len(world.records) == 1


@pytest.mark.parametrize("state", [TerminalState.REFUSED, TerminalState.ABORTED, TerminalState.FAILED])
def test_where_only_a_try_that_failed_was_heard_of_the_answers_tokens_are_unknown(
    state: TerminalState,
) -> None:
    world = World()
    world.arrive()
    world.bind()
    world.recorder.front_finished(word_of(state, 0))
    world.complete()
    world.let_time_pass()
    assert [(r.state, r.output_tokens, r.finish_reason) for r in world.records] == [("finished", None, "")]


def test_a_late_word_of_the_try_that_failed_changes_nothing() -> None:
    world = World()
    world.recorder.front_finished(finished())
    world.recorder.front_finished(word_of(TerminalState.REFUSED, 0))
    world.complete()
    assert [record.output_tokens for record in world.records] == [5]


def test_a_stream_that_ended_with_an_error_event_is_written_with_its_fronts_word() -> None:
    world = World()
    world.arrive()
    world.bind()
    world.recorder.front_finished(word_of(TerminalState.FAILED, 3))
    world.recorder.ended(ID, "chat", TerminalState.FAILED)  # the dispatcher believes the front
    world.recorder.completed(completion())
    assert not world.records
    world.let_time_pass()
    assert [record.output_tokens for record in world.records] == [3]


def test_what_fronts_say_of_other_gateways_or_too_much_is_not_kept() -> None:
    world = World()
    for number in range(2 * MAX_EARLY):
        world.recorder.front_finished(finished(f"hr-g1-{number}"))
        world.recorder.front_finished(finished(f"hr-g2-{number}"))
    assert len(world.recorder._early) == MAX_EARLY
    assert world.records == []


EVENTS = ("arrive", "bind", "complete", "finish", "tick", "complete again")


@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 3)), max_size=40))
def test_any_order_gives_each_ended_request_one_record_and_leaves_nothing(
    events: list[tuple[str, int]],
) -> None:
    world = World()
    is_ended: set[str] = set()
    for event, number in events:
        request_id = f"hr-g1-{number}"
        match event:
            case "arrive" if request_id not in is_ended:
                world.arrive(request_id)
            case "bind":
                world.bind(request_id)
            case "complete" if request_id not in is_ended:  # the dispatcher ends each once
                is_ended.add(request_id)
                world.complete(request_id)
            case "complete again" if request_id in is_ended:
                world.recorder.completed(completion(request_id))
            case "finish":
                world.recorder.front_finished(finished(request_id))
            case "tick":
                world.let_time_pass()
    world.let_time_pass()
    assert Counter(record.id for record in world.records) == dict.fromkeys(is_ended, 1)
    assert set(world.recorder._open) & is_ended == set()


def test_clocks_that_jump_harm_nothing() -> None:
    world = World()
    world.arrive()
    world.clock.wall_s = lambda: -5e9  # type: ignore[method-assign]
    world.bind()
    world.complete()
    world.let_time_pass()
    assert world.records[0].held_ms == 0.0


def test_records_are_handed_out_in_batches_in_their_order() -> None:
    world = World()
    handed_out: list[str] = []
    recorder = RequestRecorder("g1", world.clock, lambda record: handed_out.append(record.id))
    for number in range(5):
        recorder.answered_by_haproxy(completion(f"hr-g1-{number}", status=401))
    assert handed_out == [], "nothing is joined while decisions are made"
    assert recorder.hand_out(2)
    assert recorder.hand_out(2)
    assert not recorder.hand_out(2)
    assert handed_out == [f"hr-g1-{number}" for number in range(5)]
    recorder.answered_by_haproxy(completion("hr-g1-5", status=401))
    recorder.flush()
    assert handed_out[-1] == "hr-g1-5"
