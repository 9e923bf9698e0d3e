"""The SPOE agent's connection: pipelining, late answers, and lies that end only the one connection."""

from __future__ import annotations

import asyncio
import socket

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


class SocketTransport(FakeTransport):
    """Has a real socket below it, as the event loop's transports have."""

    def __init__(self, ours: socket.socket) -> None:
        super().__init__()
        self._socket = ours

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._socket if name == "socket" else default


def received(theirs: socket.socket) -> bytes:
    data = b""
    while True:
        try:
            data += theirs.recv(65_536)
        except BlockingIOError:
            return data


def test_the_last_answer_leaves_before_its_handler_returns_and_others_leave_with_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        seen: list[int] = []

        def on_notify(call: SpoeCall, name: bytes, arguments: Arguments) -> None:
            call.answer(spop.encode_actions({b"server": b"x"}))
            seen.append(len(received(theirs)))

        connection = SpoeAgent(on_notify, lambda _: None).make_connection()
        connection.connection_made(SocketTransport(ours))
        connection.data_received(spop.encode_frame(spop.HAPROXY_HELLO, 0, 0, hello_payload()))
        connection.data_received(notify(1))
        assert seen[0] > 0
        connection.data_received(notify(2) + notify(3))
        assert seen[1:] == [0, 2 * seen[0]]
        connection.connection_lost(None)


def test_answers_that_the_socket_does_not_take_follow_in_their_order() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        rig = Rig()
        transport = SocketTransport(ours)
        rig.connection.connection_made(transport)
        rig.greet()
        transport.sent.clear()
        rig.connection.data_received(b"".join(notify(number) for number in range(400)))
        wanted = b""
        for number, (call, _, _) in enumerate(rig.calls):
            transport.unsent = len(transport.sent)
            actions = spop.encode_actions({b"server": b"%d" % number * 1000})
            wanted += spop.encode_ack(number, 1, actions)
            call.answer(actions)
        assert transport.sent, "the socket's buffer is full"
        assert received(theirs) + transport.sent == wanted
