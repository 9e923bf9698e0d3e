"""The SPOE decoder under bytes that HAProxy would never send: an error or a value, and never a hang."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import strategies as st
from tests.fuzz.fuzzing import CUTS, fuzz, mutations, pieces
from tests.unit.gateway.test_spoe import Rig, notify
from tests.unit.gateway.test_spop import ARGUMENTS, hello_payload, notify_payload

from headrace.errors import ProtocolError
from headrace.gateway import spop
from headrace.gateway.spoe import MAX_FRAMES_IN_FLIGHT

pytestmark = pytest.mark.slow
IDS = st.integers(0, 2**64 - 1)
HELLOS = st.builds(
    lambda version, size: spop.encode_frame(spop.HAPROXY_HELLO, 0, 0, hello_payload(version, size)),
    st.sampled_from([b"2.0", b"1.0, 2.0", b"3.0", b""]),
    st.integers(0, 2**32),
)
NOTIFIES = st.builds(
    lambda stream_id, frame_id, name, arguments: spop.encode_frame(
        spop.NOTIFY, stream_id, frame_id, notify_payload(name, arguments)
    ),
    IDS,
    IDS,
    st.binary(max_size=10),
    ARGUMENTS,
)
GOODBYES = st.just(spop.encode_frame(spop.HAPROXY_DISCONNECT, 0, 0, b""))
FRAMES = st.one_of(HELLOS, NOTIFIES, GOODBYES)
EVERY_KIND = [
    spop.encode_frame(spop.HAPROXY_HELLO, 0, 0, hello_payload()),
    notify(7),
    spop.encode_frame(spop.HAPROXY_DISCONNECT, 0, 0, b""),
    spop.encode_ack(2**40, 300, spop.encode_actions({b"server": b"x" * 300})),
]


def decode(frame: bytes) -> int:
    """Read a frame in every way; return how many bytes of values came out of it."""
    num_bytes = 0
    with contextlib.suppress(ProtocolError):
        decoded = spop.decode_frame(frame)
        with contextlib.suppress(ProtocolError):
            spop.decode_hello(decoded.payload)
        for name, arguments in spop.decode_messages(decoded.payload):
            num_bytes += len(name) + sum(len(key) for key in arguments)
            num_bytes += sum(len(value) for value in arguments.values() if isinstance(value, bytes))
    return num_bytes


def test_no_frame_gives_more_than_it_holds() -> None:
    def target(frame: bytes) -> None:
        assert decode(frame) <= len(frame)
        assert decode(frame[4:]) <= len(frame)

    fuzz(target, mutations(FRAMES))


def test_every_frame_cut_at_every_byte_is_an_error_a_value_or_not_there_yet() -> None:
    for frame in EVERY_KIND:
        for end in range(len(frame)):
            decode(frame[4:end])
            waiting = Rig()
            waiting.connection.data_received(frame[:end])
            assert not waiting.transport.is_closed
            assert not waiting.transport.sent
            lying = Rig()
            lying.greet()
            cut = frame[4:end]
            lying.connection.data_received(len(cut).to_bytes(4, "big") + cut)
            # Half a frame that calls itself whole ends the connection, unless it is a shorter good HELLO.
            assert lying.transport.is_closed or lying.transport.sent
            assert lying.calls == []


def test_a_connection_survives_any_bytes_in_any_pieces() -> None:
    def target(frames: list[bytes], cuts: list[int], is_greeted: bool, answers: list[int]) -> None:
        rig = Rig()
        if is_greeted:
            rig.greet()
        data = b"".join(frames)
        for piece in pieces(data, cuts):
            rig.connection.data_received(piece)
            assert len(rig.connection._rest) < spop.MAX_FRAME_BYTES + 4
            for number in answers:
                if number < len(rig.calls):
                    rig.calls[number][0].answer(spop.encode_actions({b"server": b"x"}))
        assert len(rig.connection._open_frames) <= min(len(rig.calls), MAX_FRAMES_IN_FLIGHT)
        answered = [frame for frame in rig.transport.frames() if frame.kind == spop.ACK]
        assert len(answered) <= len(rig.calls), "one answer per call"
        was_open = not rig.transport.is_closed
        rig.connection.connection_lost(None)
        assert rig.lost == [rig.connection]
        for call, _, _ in rig.calls:
            call.answer(spop.encode_actions({b"server": b"late"}))
        if was_open:
            assert rig.agent.num_protocol_errors == 0

    mutated = st.one_of(FRAMES, mutations(FRAMES), st.binary(max_size=40))
    fuzz(target, st.lists(mutated, max_size=6), CUTS, st.booleans(), st.lists(st.integers(0, 5), max_size=3))
