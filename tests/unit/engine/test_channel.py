"""The engine's end of the socket: whole messages, and every way in which the front can fail it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import Abort, EngineEvent, EngineFailed
from headrace.engine.channel import FrontChannel, FrontGone
from headrace.errors import ProtocolError


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    front, engine = socket.socketpair()
    with front, engine:
        yield front, engine


def test_commands_arrive_whole_however_they_are_cut(pair: tuple[socket.socket, socket.socket]) -> None:
    front, engine = pair
    channel = FrontChannel(engine)
    assert channel.receive(0.0) == []
    stream = encode_frame(Abort("a")) + encode_frame(Abort("b"))
    received = []
    for index in range(len(stream)):
        front.sendall(stream[index : index + 1])
        received += channel.receive(1.0)
    assert received == [Abort("a"), Abort("b")]
    front.sendall(stream * 3)
    assert len(channel.receive(1.0)) == 6


def test_an_event_larger_than_the_socket_buffer_is_sent_whole(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    front, engine = pair
    event = EngineFailed("x" * 2_000_000)
    received: list[EngineEvent] = []

    def read() -> None:
        decoder: FrameDecoder[EngineEvent] = FrameDecoder(EngineEvent)
        while not received:
            received.extend(decoder.feed(front.recv(65536)))

    reader = threading.Thread(target=read)
    reader.start()
    FrontChannel(engine).send(event)
    reader.join(timeout=10)
    assert received == [event]


def test_a_front_that_does_not_read_is_given_up_after_the_limit(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    _, engine = pair
    channel = FrontChannel(engine, send_timeout_s=0.05)
    with pytest.raises(FrontGone, match=r"has not read for 0\.05 s"):
        channel.send(EngineFailed("x" * 2_000_000))


def test_a_front_that_left_is_noticed_by_reading_and_by_sending(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    front, engine = pair
    channel = FrontChannel(engine)
    assert not channel.is_front_gone()
    front.close()
    assert channel.is_front_gone()
    with pytest.raises(FrontGone):
        channel.receive(1.0)
    with pytest.raises(FrontGone):
        channel.send(EngineFailed("late"))


def test_bytes_that_are_no_command_are_a_protocol_error(pair: tuple[socket.socket, socket.socket]) -> None:
    front, engine = pair
    front.sendall(encode_frame({"type": "Nonsense"}))
    with pytest.raises(ProtocolError):
        FrontChannel(engine).receive(1.0)
