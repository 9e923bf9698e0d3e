"""The SPOE agent's connection: pipelining, late answers, and lies that end only the one connection."""

from __future__ import annotations

import asyncio

from tests.unit.gateway.test_spop import hello_payload, notify_payload

from headrace.gateway import spop
from headrace.gateway.spoe import Arguments, SpoeAgent, SpoeCall, SpoeConnection


class FakeTransport(asyncio.Transport):
    """Keeps what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.is_closed = False
        self.unsent = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True

    def frames(self) -> list[spop.Frame]:
        frames, data = [], bytes(self.sent)
        while data:
            length = int.from_bytes(data[:4], "big")
            frames.append(spop.decode_frame(data[4 : 4 + length]))
            data = data[4 + length :]
        return frames


class Rig:
    """An agent with one connection; calls are kept, not answered."""

    def __init__(self) -> None:
        self.calls: list[tuple[SpoeCall, bytes, dict[bytes, spop.SpopValue]]] = []
        self.lost: list[SpoeConnection] = []
        self.agent = SpoeAgent(self._on_notify, self.lost.append)
        self.connection = self.agent.make_connection()
        self.transport = FakeTransport()
        self.connection.connection_made(self.transport)

    def _on_notify(self, call: SpoeCall, name: bytes, arguments: Arguments) -> None:
        self.calls.append((call, name, dict(arguments)))

    def greet(self) -> None:
        self.connection.data_received(spop.encode_frame(spop.HAPROXY_HELLO, 0, 0, hello_payload()))
        self.transport.sent.clear()


def notify(stream_id: int, request_id: bytes = b"r") -> bytes:
    value = (b"\x08" + spop.write_string(request_id), request_id)
    return spop.encode_frame(spop.NOTIFY, stream_id, 1, notify_payload(b"decide", {b"id": value}))


def test_a_health_check_is_greeted_and_ended() -> None:
    rig = Rig()
    hello = hello_payload(is_healthcheck=True)
    rig.connection.data_received(spop.encode_frame(spop.HAPROXY_HELLO, 0, 0, hello))
    assert [frame.kind for frame in rig.transport.frames()] == [spop.AGENT_HELLO]
    assert rig.transport.is_closed


def test_frames_cut_anywhere_are_put_together_and_answered_in_any_order() -> None:
    rig = Rig()
    data = spop.encode_frame(spop.HAPROXY_HELLO, 0, 0, hello_payload()) + notify(5, b"a") + notify(6, b"b")
    for byte in data:
        rig.connection.data_received(bytes((byte,)))
    assert [arguments[b"id"] for _, _, arguments in rig.calls] == [b"a", b"b"]
    rig.transport.sent.clear()
    for call, _, _ in reversed(rig.calls):
        call.answer(spop.encode_actions({b"server": b"x"}))
        call.answer(spop.encode_actions({b"server": b"again"}))
    assert [(frame.kind, frame.stream_id) for frame in rig.transport.frames()] == [
        (spop.ACK, 6),
        (spop.ACK, 5),
    ]


def test_a_lie_ends_the_connection_with_a_reason() -> None:
    lies = {
        "before HELLO": notify(1),
        "announces": b"\xff\xff\xff\xff",
        "at least 7": b"\x00\x00\x00\x02ab",
        "kind 77": spop.encode_frame(77, 0, 0, b""),
        "sent twice": notify(1) + notify(1),
        "0 messages": spop.encode_frame(spop.NOTIFY, 1, 1, b""),
        "are left": spop.encode_frame(spop.NOTIFY, 1, 1, b"\x09dec"),
    }
    for text, data in lies.items():
        rig = Rig()
        if text != "before HELLO":
            rig.greet()
        rig.connection.data_received(data)
        assert rig.transport.is_closed, text
        assert text in rig.agent.last_error
        assert rig.transport.frames()[-1].kind == spop.AGENT_DISCONNECT


def test_an_answer_after_the_connections_end_is_ignored() -> None:
    rig = Rig()
    rig.greet()
    rig.connection.data_received(notify(1))
    rig.connection.connection_lost(None)
    rig.calls[0][0].answer(spop.encode_actions({b"server": b"x"}))
    assert not rig.transport.sent
    assert rig.lost == [rig.connection]


def test_a_reader_that_stops_reading_is_disconnected() -> None:
    rig = Rig()
    rig.greet()
    rig.connection.data_received(notify(1))
    rig.transport.unsent = 1 << 30
    rig.calls[0][0].answer(spop.encode_actions({b"server": b"x"}))
    assert rig.transport.is_closed


def test_haproxys_goodbye_is_answered() -> None:
    rig = Rig()
    rig.greet()
    rig.connection.data_received(spop.encode_frame(spop.HAPROXY_DISCONNECT, 0, 0, b""))
    assert rig.transport.frames()[-1].kind == spop.AGENT_DISCONNECT
    assert rig.transport.is_closed
