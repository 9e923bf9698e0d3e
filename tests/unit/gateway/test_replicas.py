"""The replica table: what a report may say, and when a replica is gone."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.api.messages import EngineLoad, EngineReady, LoadReport
from headrace.errors import ProtocolError
from headrace.gateway.replicas import CLOSED_GRACE_S, ReplicaTable


def report(sequence: int = 1, **changes: Any) -> LoadReport:
    values = {
        "replica_id": "chat-1", "endpoint": "chat", "model": "m", "address": "127.0.0.1:9000", "pid": 7,
        "lease_s": 3.0, "state": "ready", "max_open": 4,
    }  # fmt: skip
    return LoadReport(sequence=sequence, **{**values, **changes})


def test_a_replica_is_there_while_it_reports_and_gone_when_its_lease_ends() -> None:
    table = ReplicaTable()
    assert table.observe(report(1), "c", 0.0) is not None
    assert table.observe(report(2), "c", 2.0) is not None
    assert table.expire(4.9) == []
    assert [replica.replica_id for replica in table.expire(5.0)] == ["chat-1"]
    assert not table.wanted_servers()
    assert list(table.known_paths) == ["ep-chat/chat-1", "ep-chat_h2/chat-1"]


def test_a_closed_connection_ends_the_lease_after_a_grace_unless_it_reports_again() -> None:
    table = ReplicaTable()
    table.observe(report(1), "old", 0.0)
    assert table.connection_closed("old", 1.0)
    assert table.expire(1.0 + CLOSED_GRACE_S - 0.01) == []
    table.observe(report(2), "new", 1.2)
    assert table.expire(1.0 + CLOSED_GRACE_S) == []
    assert not table.connection_closed("old", 1.5)
    table.connection_closed("new", 2.0)
    assert len(table.expire(2.0 + CLOSED_GRACE_S)) == 1


def test_old_reports_and_those_of_a_second_process_are_ignored_until_the_first_one_left() -> None:
    table = ReplicaTable()
    table.observe(report(5, num_open=5), "c", 0.0)
    assert table.observe(report(4, num_open=4), "c", 0.0) is None
    assert table.replicas["chat-1"].num_open == 5
    with pytest.raises(ProtocolError, match="process 8 reports as chat-1, which process 7 still does"):
        table.observe(report(1, pid=8), "c2", 0.0)
    assert table.replicas["chat-1"].pid == 7
    table.connection_closed("c", 0.0)
    replica = table.observe(report(1, pid=8), "c2", 0.0)
    assert replica is not None
    assert replica.pid == 8
    assert table.observe(report(6, pid=9), "c2", 0.0) is None


def test_two_processes_of_one_pid_on_different_hosts_are_two() -> None:
    table = ReplicaTable()
    here, there = {"node_address": "10.0.0.1"}, {"node_address": "10.0.0.2"}
    table.observe(report(5, **here), "here", 0.0)
    with pytest.raises(
        ProtocolError, match=r"7 of 10\.0\.0\.2 reports as chat-1, which process 7 of 10\.0\.0\.1"
    ):
        table.observe(report(6, **there), "there", 0.0)
    table.connection_closed("here", 0.0)
    assert table.observe(report(1, **there), "there", 0.1) is not None, "the first number of another process"
    with pytest.raises(ProtocolError):
        table.observe(report(6, **here), "here again", 0.2)
    assert table.replicas["chat-1"].node_address == "10.0.0.2"


def test_a_starting_replica_without_an_address_is_not_yet_known() -> None:
    table = ReplicaTable()
    assert table.observe(report(1, address="", state="starting"), "c", 0.0) is None
    table.observe(report(2), "c", 0.0)
    replica = table.observe(report(3, address="", state="failed"), "c", 0.0)
    assert replica is not None
    assert replica.server.port == 9000
    assert not table.wanted_servers()


@pytest.mark.parametrize(
    "change",
    [
        {"replica_id": "a b"},
        {"replica_id": "a\nadd server x"},
        {"replica_id": ""},
        {"address": "example.com:80"},
        {"address": "127.0.0.1"},
        {"address": "127.0.0.1:0"},
        {"address": "127.0.0.1:99999"},
        {"address": "127.0.0.1:80 ssl"},
        {"lease_s": 0.0},
        {"lease_s": float("nan")},
        {"lease_s": 1e9},
        {"max_open": -1},
        {"num_open": -1},
    ],
)
def test_nonsense_is_refused_and_changes_nothing(change: dict[str, Any]) -> None:
    table = ReplicaTable()
    with pytest.raises(ProtocolError):
        table.observe(report(1, **change), "c", 0.0)
    assert not table.replicas


def test_a_replica_cannot_change_its_endpoint() -> None:
    table = ReplicaTable()
    table.observe(report(1), "c", 0.0)
    with pytest.raises(ProtocolError, match="endpoint"):
        table.observe(report(2, endpoint="other"), "c", 0.0)


def test_the_revision_grows_only_when_the_servers_may_have_changed() -> None:
    table = ReplicaTable()
    table.observe(report(1), "c", 0.0)
    revision = table.revision
    table.observe(report(2, num_open=3), "c", 0.0)
    assert table.revision == revision
    table.observe(report(3, state="draining"), "c", 0.0)
    assert table.revision == revision + 1


@pytest.mark.parametrize(
    ("socket_path", "address"),
    [
        ("/run/x/front-chat-1.sock", "unix@/run/x/front-chat-1.sock"),
        ("/run/other/front-chat-1.sock", "127.0.0.1:9000"),
        ("/run/x/haproxy.sock", "127.0.0.1:9000"),
        ("/run/x/front-chat-1.sock ssl", "127.0.0.1:9000"),
        ("", "127.0.0.1:9000"),
    ],
)
def test_only_the_socket_of_a_replica_on_this_machine_is_used(socket_path: str, address: str) -> None:
    table = ReplicaTable("/run/x")
    replica = table.observe(report(1, socket_path=socket_path), "c", 0.0)
    assert replica is not None
    assert replica.server.address == address
    assert table.observe(report(2, socket_path=socket_path), "c", 0.1) is replica
    assert replica.server.address == address


INFO = EngineReady("native", "fake", 61, 4096, 16, 100, 32, "", {})


def test_what_placement_looks_at_comes_from_the_report() -> None:
    table = ReplicaTable(gateway_id="g1")
    load = EngineLoad(num_waiting=3, num_free_blocks=40, num_total_blocks=100, prefill_token_s=1e-4)
    replica = table.observe(
        report(1, num_open=7, open_by_gateway={"g1": 2, "g2": 4, "": 1}, engine=load, engine_info=INFO),
        "c",
        0.0,
    )
    assert replica is not None
    assert (replica.num_open, replica.num_open_elsewhere) == (2, 5)
    assert (replica.max_running, replica.num_waiting, replica.num_free_tokens) == (32, 3, 640)
    assert (replica.prefill_token_s, replica.decode_token_s) == (1e-4, 0.0)
    table.observe(report(2, num_open=7), "c", 0.1)
    assert (replica.num_open, replica.num_open_elsewhere, replica.max_running) == (7, 0, 0)
    assert (replica.num_waiting, replica.num_free_tokens) == (0, -1)
    assert replica.num_connections == 0
    table.observe(report(3), "c2", 0.2)
    assert replica.num_connections == 1


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -1.0, 1e9])
def test_impossible_figures_count_as_unknown(cost: float) -> None:
    table = ReplicaTable(gateway_id="g1")
    load = EngineLoad(num_waiting=-3, num_total_blocks=0, prefill_token_s=cost, decode_token_s=cost)
    replica = table.observe(
        report(1, num_open=3, open_by_gateway={"g1": -7, "g2": 99}, engine=load, engine_info=INFO), "c", 0.0
    )
    assert replica is not None
    assert (replica.prefill_token_s, replica.decode_token_s, replica.num_waiting) == (0.0, 0.0, 0)
    assert (replica.num_open, replica.num_open_elsewhere, replica.num_free_tokens) == (0, 3, -1)


def test_a_replica_that_speaks_http_2_is_two_servers_where_that_is_wanted() -> None:
    for uses_h2, speaks_h2, expected in (
        (True, True, [False, True]),
        (True, False, [False]),
        (False, True, [False]),
    ):
        table = ReplicaTable(uses_h2=uses_h2)
        replica = table.observe(report(1, speaks_h2=speaks_h2), "c", 0.0)
        assert replica is not None
        assert [server.is_shared for server in table.wanted_servers()] == expected
        table.mark_serving(frozenset(server.path for server in table.wanted_servers()))
        assert replica.is_serving
        assert replica.is_shared_serving == (expected == [False, True])


def test_the_list_of_replicas_is_the_same_until_one_of_them_reports_or_changes() -> None:
    table = ReplicaTable()
    for name in ("chat-1", "chat-2"):
        table.observe(report(1, replica_id=name), name, 0.0)
    table.mark_serving(frozenset({"ep-chat/chat-1", "ep-chat/chat-2"}))
    changes = [
        lambda: table.observe(report(2), "chat-1", 0.0),
        lambda: table.connection_closed("chat-2", 0.0),
        lambda: table.mark_serving(frozenset({"ep-chat/chat-1"})),
        lambda: table.expire(10.0),
    ]
    for change in changes:
        before = table.choosable("chat")
        before[0].num_in_flight += 1
        assert table.choosable("chat") is before
        change()
        assert table.choosable("chat") is not before
    assert table.choosable("chat") == []
