"""The SPOP codec: what was encoded is decoded, and no bytes whatsoever can hang or crash it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.errors import ProtocolError
from headrace.gateway import spop

VARINTS = st.integers(0, 2**64 - 1)
TYPED_VALUES = st.one_of(
    st.none().map(lambda value: (b"\x00", value)),
    st.booleans().map(lambda value: (b"\x11" if value else b"\x01", value)),
    VARINTS.map(lambda value: (b"\x05" + spop.write_varint(value), value)),
    st.integers(-(2**63), 2**63 - 1).map(lambda value: (b"\x04" + spop.write_varint(value % 2**64), value)),
    st.binary(min_size=4, max_size=4).map(lambda value: (b"\x06" + value, value)),
    st.binary(min_size=16, max_size=16).map(lambda value: (b"\x07" + value, value)),
    st.binary(max_size=300).map(lambda value: (b"\x08" + spop.write_string(value), value)),
)
ARGUMENTS = st.dictionaries(st.binary(min_size=1, max_size=20), TYPED_VALUES, max_size=8)


def notify_payload(name: bytes, arguments: dict[bytes, tuple[bytes, spop.SpopValue]]) -> bytes:
    encoded = b"".join(spop.write_string(key) + value[0] for key, value in arguments.items())
    return spop.write_string(name) + bytes((len(arguments),)) + encoded


def hello_payload(version: bytes = b"2.0", size: int = 65_532, *, is_healthcheck: bool = False) -> bytes:
    return (
        spop.write_string(b"supported-versions")
        + b"\x08"
        + spop.write_string(version)
        + spop.write_string(b"max-frame-size")
        + b"\x03"
        + spop.write_varint(size)
        + spop.write_string(b"healthcheck")
        + (b"\x11" if is_healthcheck else b"\x01")
    )


@given(VARINTS)
@example(239)
@example(240)
@example(2287)
@example(2288)
@example(2**64 - 1)
def test_an_integer_comes_back_and_each_of_its_truncations_is_refused(value: int) -> None:
    encoded = spop.write_varint(value)
    assert spop.read_varint(encoded + b"rest", 0) == (value, len(encoded))
    for end in range(len(encoded)):
        with pytest.raises(ProtocolError):
            spop.read_varint(encoded[:end], 0)


def test_integers_match_the_documents_examples() -> None:
    # SPOE.txt 3.1: 0..239 one byte, 240..2287 two, 2288..264431 three
    assert [len(spop.write_varint(value)) for value in (0, 239, 240, 2287, 2288, 264_431, 264_432)] == [
        1, 1, 2, 2, 3, 3, 4,
    ]  # fmt: skip


def test_an_endless_integer_is_refused() -> None:
    with pytest.raises(ProtocolError, match="64 bits"):
        spop.read_varint(b"\xff" * 1000, 0)


@given(VARINTS, VARINTS, st.binary(max_size=30), ARGUMENTS)
def test_a_notify_frame_comes_back_and_each_of_its_truncations_is_refused_or_shorter(
    stream_id: int, frame_id: int, name: bytes, arguments: dict[bytes, tuple[bytes, spop.SpopValue]]
) -> None:
    payload = notify_payload(name, arguments)
    encoded = spop.encode_frame(spop.NOTIFY, stream_id, frame_id, payload)
    assert int.from_bytes(encoded[:4], "big") == len(encoded) - 4
    frame = spop.decode_frame(encoded[4:])
    assert frame == (spop.NOTIFY, stream_id, frame_id, False, payload)
    wanted = {key: value[1] for key, value in arguments.items()}
    assert spop.decode_messages(frame.payload) == [(name, wanted)]
    for end in range(1, len(payload)):
        with pytest.raises(ProtocolError):
            spop.decode_messages(payload[:end])


@given(st.binary(max_size=400))
def test_arbitrary_bytes_give_a_message_or_a_protocol_error(data: bytes) -> None:
    for decode in (spop.decode_frame, spop.decode_messages, spop.decode_hello):
        try:
            decode(data)
        except ProtocolError:
            pass


def test_a_string_that_lies_about_its_length_is_refused_without_allocating_it() -> None:
    with pytest.raises(ProtocolError, match="are left"):
        spop.read_string(spop.write_varint(2**40) + b"short", 0)


def test_fragments_and_unknown_types_are_refused() -> None:
    frame = bytearray(spop.encode_frame(spop.NOTIFY, 1, 1, b"")[4:])
    frame[4] = 0
    with pytest.raises(ProtocolError, match="fragmented"):
        spop.decode_frame(bytes(frame))
    with pytest.raises(ProtocolError, match="not known"):
        spop.read_value(b"\x0a", 0)


def test_hello_is_answered_with_what_both_sides_can_do() -> None:
    assert spop.decode_hello(hello_payload(size=10_000)) == (10_000, False)
    assert spop.decode_hello(hello_payload(size=10_000_000)).max_frame_bytes == spop.MAX_FRAME_BYTES
    assert spop.decode_hello(hello_payload(is_healthcheck=True)).is_healthcheck
    with pytest.raises(ProtocolError, match=r"2\.0 is needed"):
        spop.decode_hello(hello_payload(version=b"1.0"))
    with pytest.raises(ProtocolError, match="max-frame-size"):
        spop.decode_hello(hello_payload(size=10))
    answer = spop.decode_frame(spop.encode_hello(10_000)[4:])
    assert answer.kind == spop.AGENT_HELLO
    assert b"2.0" in answer.payload


def test_an_ack_sets_each_variable_in_the_transaction() -> None:
    frame = spop.decode_frame(
        spop.encode_ack(7, 3, spop.encode_actions({b"server": b"chat-1", b"x": b""}))[4:]
    )
    assert (frame.kind, frame.stream_id, frame.frame_id) == (spop.ACK, 7, 3)
    assert frame.payload == b"\x01\x03\x02\x06server\x08\x06chat-1" + b"\x01\x03\x02\x01x\x08\x00"
