"""The router benchmark's client speaks as HAProxy does: its frames hold what the rendered spoe.conf names."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from benchmarks.router_rig import FakeReplica, gateway_spec
from benchmarks.spop_client import SpopClient, make_questions, notify_frame, request_id_of

from headrace.api.messages import gateway_of
from headrace.gateway import spop
from headrace.gateway.names import backend_name


def test_a_question_is_a_frame_with_every_argument_that_haproxy_sends(tmp_path: Path) -> None:
    spec = gateway_spec(tmp_path)
    questions = make_questions(spec, 21, 4096, seed=1)
    frame = notify_frame(7, request_id_of(7), questions[1])
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    decoded = spop.decode_frame(frame[4:])
    assert (decoded.kind, decoded.stream_id) == (spop.NOTIFY, 7)
    [(name, arguments)] = spop.decode_messages(decoded.payload)
    assert name == b"decide"
    assert {b"id", b"endpoint", b"tenant", b"client", b"head", b"size", b"explain"} <= arguments.keys()
    assert arguments[b"id"] == request_id_of(7).encode()
    assert gateway_of(request_id_of(7)) == spec.gateway_id
    assert arguments[b"endpoint"] == backend_name(spec.endpoints[0].name).encode()
    assert arguments[b"tenant"] == b"tenant-1"
    head = arguments[b"head"]
    assert isinstance(head, bytes)
    assert abs(len(head) - 4096) < 128
    assert arguments[b"size"] == len(head)
    assert json.loads(head)["model"] == spec.endpoints[0].name
    assert questions[1].head[:900] == questions[21 - 20 + 0].head[:900]


async def test_answers_cut_anywhere_are_put_together() -> None:
    seen: list[tuple[int, str]] = []
    client = SpopClient(lambda _, answers: seen.extend(answers))
    data = spop.encode_hello(65_532) + spop.encode_ack(300, 1, spop.encode_actions({b"server": b"chat-3"}))
    data += spop.encode_ack(301, 1, spop.encode_actions({b"refusal": b"{}", b"retry_after": b"1"}))
    for position in range(len(data)):
        client.data_received(data[position : position + 1])
    assert client.greeted.done()
    assert seen == [(300, "chat-3"), (301, "")]
    await asyncio.sleep(0)


def test_a_replica_reports_each_end_once_and_evicts_what_does_not_fit() -> None:
    replica = FakeReplica("chat-1", "127.0.0.1:1")
    for number in range(200):
        replica.finish(f"r{number}", "tenant-1", (1, 2, 3, 4, 1000 + number))
    report = replica.report()
    assert len(report.finished) == 200
    assert set(report.prefixes_removed) == {1000 + number for number in range(200 - 128)}
    assert replica.report().finished == []
