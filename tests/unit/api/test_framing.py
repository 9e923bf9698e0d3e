"""Frames survive any split of the byte stream, and nonsense is refused without a large allocation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import (
    Abort,
    Drain,
    EngineCommand,
    EngineLoad,
    GenerationRequest,
    LoadReport,
    ReportAck,
    SamplingParams,
    StepBatch,
    Submit,
)
from headrace.errors import ProtocolError

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=50)
COMMANDS = st.one_of(
    st.builds(
        Submit,
        st.builds(
            GenerationRequest,
            st.text(max_size=20),
            TOKENS,
            st.builds(
                SamplingParams,
                max_tokens=st.integers(1, 10**6),
                temperature=st.floats(0, 2),
                logit_bias=st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100), max_size=4),
                seed=st.integers(0, 2**63 - 1),
            ),
            resume_from=TOKENS,
        ),
    ),
    st.builds(Abort, st.text(max_size=20)),
    st.just(Drain()),
)


@given(st.lists(COMMANDS, max_size=8), st.data())
def test_messages_survive_any_split_of_the_stream(commands: list[EngineCommand], data: st.DataObject) -> None:
    stream = b"".join(encode_frame(command) for command in commands)
    decoder: FrameDecoder[EngineCommand] = FrameDecoder(EngineCommand)
    received: list[EngineCommand] = []
    start = 0
    while start < len(stream):
        size = data.draw(st.integers(1, len(stream) - start))
        received += decoder.feed(stream[start : start + size])
        start += size
    assert received == commands


def test_a_frame_that_announces_too_much_is_refused_before_it_is_read() -> None:
    decoder: FrameDecoder[EngineCommand] = FrameDecoder(EngineCommand, max_frame_bytes=1000)
    with pytest.raises(ProtocolError, match="announces 4294967295 bytes; at most 1000"):
        list(decoder.feed(b"\xff\xff\xff\xff"))


@given(st.binary(min_size=1, max_size=200))
def test_random_payloads_are_a_message_or_a_protocol_error(payload: bytes) -> None:
    decoder: FrameDecoder[EngineCommand] = FrameDecoder(EngineCommand)
    try:
        messages = list(decoder.feed(len(payload).to_bytes(4, "big") + payload))
    except ProtocolError:
        return
    assert all(isinstance(message, Submit | Abort | Drain) for message in messages)


def test_a_message_of_another_channel_is_refused() -> None:
    decoder: FrameDecoder[LoadReport] = FrameDecoder(LoadReport)
    with pytest.raises(ProtocolError, match="not a message"):
        list(decoder.feed(encode_frame(ReportAck(sequence=1))))


def test_messages_before_a_bad_frame_are_delivered() -> None:
    decoder: FrameDecoder[EngineCommand] = FrameDecoder(EngineCommand)
    stream = encode_frame(Abort("a")) + (3).to_bytes(4, "big") + b"abc"
    messages = decoder.feed(stream)
    assert next(messages) == Abort("a")
    with pytest.raises(ProtocolError):
        next(messages)


def test_a_step_of_64_requests_is_one_small_frame() -> None:
    from headrace.api.messages import StepOutput

    batch = StepBatch([StepOutput(f"r{index}", [index]) for index in range(64)], EngineLoad(num_running=64))
    assert len(encode_frame(batch)) < 64 * 20
