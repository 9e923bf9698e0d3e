"""Requests of durable endpoints: a durable front is the server, a replica has the slot; each counted once."""

from __future__ import annotations

from typing import Any

from tests.unit.gateway.test_dispatcher import CHAT, World

from headrace.api.messages import EndpointRule, FinishedRequest, LoadReport, TerminalState
from headrace.gateway.answers import Answers
from headrace.gateway.arrivals import Bound
from headrace.gateway.flights import RECONCILE_AFTER_S

DURABLE = EndpointRule("chat", "m", 3, 10.0, is_durable=True)
FRONT = "chat:g1-1"


class DurableWorld(World):
    """With a dispatcher that takes whole reports."""

    def __init__(self, *replica_ids: str) -> None:
        super().__init__((DURABLE,))
        for replica_id in replica_ids or ("chat-1", "chat-2"):
            self.report(replica_id, generation=f"v-{replica_id}")
        self.report_front()

    def report_front(self, replica_id: str = FRONT, **changes: Any) -> None:
        self.report(replica_id, **{"gateway_id": "g1", "generation": "front", "max_open": 10, **changes})

    def tell(self, replica_id: str, **fields: Any) -> None:
        """A report that the dispatcher hears, too."""
        self.report_front(replica_id) if ":" in replica_id else self.report(replica_id)
        replica = self.table.replicas[replica_id]
        report = LoadReport(
            replica_id, "chat", "m", "127.0.0.1:9000", 1, 0, 9.0, "ready",
            gateway_id=replica.gateway_id, generation=replica.generation, **fields,
        )  # fmt: skip
        self.dispatcher.take_report(report, replica, self.now_s)
        self.dispatcher.check_integrity()

    def in_flight(self) -> dict[str, int]:
        counts = {name: replica.num_in_flight for name, replica in self.table.replicas.items()}
        return {name: count for name, count in counts.items() if count}

    def place(self, request_id: str) -> tuple[str, str]:
        self.arrive(request_id)
        bound = self.answers[request_id][-1]
        assert isinstance(bound, Bound)
        return bound.server_name, bound.place


def finished(request_id: str, state: TerminalState = TerminalState.FINISHED) -> FinishedRequest:
    return FinishedRequest(request_id, state, "stop", "", 5, 0, 3, 0.1, 0.2, engine_s=0.1)


def test_the_server_is_a_durable_front_and_the_slot_a_replicas() -> None:
    world = DurableWorld()
    places = {world.place("a"), world.place("b")}
    assert places == {(FRONT, "chat-1"), (FRONT, "chat-2")}
    assert world.in_flight() == {"chat-1": 1, "chat-2": 1, FRONT: 2}
    world.tell(FRONT, finished=[finished("a")])
    assert sorted(world.in_flight().values()) == [1, 1], "both slots came free"
    world.complete("a")
    world.complete("b")
    assert world.in_flight() == {}
    assert world.counts() == {"arrived": 2, "finished": 2}
    world.dispatcher.check_integrity()


def test_nothing_is_bound_to_a_durable_front_itself() -> None:
    world = DurableWorld()
    assert {replica.replica_id for replica in world.table.choosable("chat")} == {"chat-1", "chat-2"}
    world = World((DURABLE,))
    world.report(FRONT, gateway_id="g1")
    world.arrive("a")
    assert world.counts() == {"arrived": 1, "num_held": 1}, "without a replica it is held"


def test_the_least_busy_durable_front_of_the_replicas_text_is_taken() -> None:
    world = DurableWorld("chat-1")
    world.report("chat-1", text_class="T", max_open=9)
    world.report_front(text_class="other")
    assert world.place("a") == ("chat-1", ""), "no durable front of its text: its own front"
    world.report_front("chat:g1-2", text_class="T", max_open=1)
    world.report_front("chat:g1-3", text_class="T", max_open=1)
    assert {world.place("b")[0], world.place("c")[0]} == {"chat:g1-2", "chat:g1-3"}
    assert world.place("d") == ("chat-1", ""), "none has room"


def test_a_plain_endpoint_has_no_use_for_durable_fronts() -> None:
    world = World((CHAT,))
    world.report()
    world.report(FRONT, gateway_id="g1")
    world.arrive("a")
    assert world.answers["a"] == [Bound("chat-1")]


def test_a_slot_moves_with_its_stream_once() -> None:
    world = DurableWorld()
    _, place = world.place("a")
    other = "chat-2" if place == "chat-1" else "chat-1"
    for _ in range(3):
        world.tell(FRONT, moved={"a": other, "unknown": other})
        assert world.in_flight() == {other: 1, FRONT: 1}
    for nonsense in ("chat-9", FRONT):
        world.tell(FRONT, moved={"a": nonsense})
        assert world.in_flight() == {other: 1, FRONT: 1}
    world.tell("chat-1", moved={"a": place})
    assert world.in_flight() == {other: 1, FRONT: 1}, "only its durable front can tell"
    world.tell(FRONT, finished=[finished("a")])
    world.tell(FRONT, moved={"a": place})
    assert world.in_flight() == {}, "a freed slot stays free"


def test_whether_a_request_lives_is_the_durable_fronts_to_say() -> None:
    world = DurableWorld("chat-1")
    world.place("a")
    world.report("chat-1", num_open=0)  # it is continued elsewhere
    world.report_front(num_open=1)
    world.pass_time(RECONCILE_AFTER_S + 1)
    assert world.counts() == {"arrived": 1, "num_in_flight": 1}
    world.report_front(num_open=0)
    world.pass_time(1.1)
    assert world.counts() == {"arrived": 1, "failed": 1}


def test_ends_are_judged_for_the_replicas_version_and_a_lost_front_for_none() -> None:
    world = DurableWorld("chat-1")
    world.place("a")
    world.place("b")
    world.tell(FRONT, finished=[finished("a")])
    world.complete("a")
    world.complete("b", TerminalState.FAILED)  # cut: the durable front died
    versions = {v.generation: (v.finished, v.failed) for v in world.dispatcher.version_demands()}
    assert versions == {"v-chat-1": (1, 0)}


def test_replicas_of_durable_endpoints_are_backups() -> None:
    table = DurableWorld().table
    revision = table.revision
    table.set_durable(frozenset(["chat"]))
    assert table.revision > revision
    assert {server.replica_id: server.is_backup for server in table.wanted_servers()} == {
        "chat-1": True, "chat-2": True, FRONT: False,
    }  # fmt: skip
    table.set_durable(frozenset())
    assert not any(server.is_backup for server in table.wanted_servers())


def test_the_answer_names_the_place_and_is_kept_apart_from_others() -> None:
    answers = Answers()
    first = answers.bound(Bound(FRONT, replica_id="chat-1", front_id=FRONT), is_shared=False)
    second = answers.bound(Bound(FRONT, replica_id="chat-2", front_id=FRONT), is_shared=False)
    assert b"place" in first
    assert b"chat-1" in first
    assert b"chat-2" in second
    assert b"place" not in answers.bound(Bound("chat-1", replica_id="chat-1"), is_shared=False)
