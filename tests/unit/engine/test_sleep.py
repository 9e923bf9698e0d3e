"""Sleeping and waking: memory and prefix cache go, requests are refused, what cannot be done is told once."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import (
    Drain,
    EngineCommand,
    EngineEvent,
    EngineSpec,
    GenerationRequest,
    SamplingParams,
    Sleep,
    StepBatch,
    Submit,
    Wake,
)
from headrace.clock import VirtualClock
from headrace.engine.channel import FrontChannel
from headrace.engine.fake_runner import FakeRunner
from headrace.engine.native import NativeEngine
from headrace.engine.process import DrainSignal, EngineLoop
from headrace.engine.protocol import Engine
from headrace.engine.simulated import SimulatedEngine
from headrace.errors import OutOfMemory, Overloaded

PROMPT = list(range(1, 30))


def native(runner: FakeRunner | None = None) -> NativeEngine:
    spec = EngineSpec("native", "fake", block_size=8)
    return NativeEngine(spec, runner or FakeRunner(num_blocks=16), VirtualClock())


def request(request_id: str = "r") -> GenerationRequest:
    return GenerationRequest(
        request_id, PROMPT, SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    )


def run(engine: Engine, request_id: str) -> tuple[list[int], int]:
    """Return a request's tokens and how many of its prompt came from the cache."""
    engine.submit(request(request_id))
    tokens, num_cached = [], 0
    while engine.has_work():
        for output in engine.step().outputs:
            tokens += output.token_ids
            num_cached += output.num_cached_tokens
    return tokens, num_cached


@pytest.mark.parametrize("level", [1, 2])
def test_after_sleep_and_wake_answers_are_the_same_and_nothing_is_cached(level: int) -> None:
    engine = native()
    first, _ = run(engine, "a")
    again, num_cached = run(engine, "b")
    assert (again, num_cached) == (first, 24)
    forgotten = engine.sleep(1 if level == 1 else 2)
    assert len(set(forgotten)) == len(forgotten) == 3
    assert engine.load().sleep_level == engine.describe().sleep_level == level
    engine.check_integrity()
    engine.wake()
    assert engine.load().sleep_level == 0
    assert run(engine, "c") == (first, 0)
    engine.check_integrity()


@pytest.mark.parametrize(
    "engine", [native(), SimulatedEngine(EngineSpec("simulated", "s"), VirtualClock(), lambda _: None)]
)
def test_an_engine_with_requests_does_not_sleep_and_a_sleeping_one_takes_none(engine: Engine) -> None:
    engine.submit(request())
    with pytest.raises(Overloaded, match="cannot sleep"):
        engine.sleep(1)
    engine.abort("r")
    engine.sleep(1)
    with pytest.raises(Overloaded, match="asleep"):
        engine.submit(request())
    assert engine.sleep(2) == []  # deeper
    engine.sleep(1)
    assert engine.load().sleep_level == 2
    engine.wake()
    engine.wake()
    assert len(run(engine, "r")[0]) == 3


class Rig:
    """An engine loop that works off what was sent before it drains."""

    def __init__(self, front: socket.socket, theirs: socket.socket) -> None:
        self.runner = FakeRunner(num_blocks=16)
        self._front = front
        self._loop = EngineLoop(native(self.runner), FrontChannel(theirs), DrainSignal(), VirtualClock())

    def run(self, *commands: EngineCommand) -> list[StepBatch]:
        for command in (*commands, Drain()):
            self._front.sendall(encode_frame(command))
        self._loop.run()
        decoder: FrameDecoder[EngineEvent] = FrameDecoder(EngineEvent)
        events = list(decoder.feed(self._front.recv(1 << 20)))
        return [event for event in events if isinstance(event, StepBatch)]


@pytest.fixture
def rig() -> Iterator[Rig]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Rig(ours, theirs)


def test_sleep_is_told_at_once_and_so_is_what_it_evicted(rig: Rig) -> None:
    run(rig._loop._engine, "a")
    batches = rig.run(Sleep(2))
    assert [(batch.load.sleep_level, batch.load.sleep_error, len(batch.evicted)) for batch in batches] == [
        (2, "", 3)
    ]
    assert rig.runner.sleep_level == 2


def test_a_refused_sleep_is_told_once_and_harms_no_request(rig: Rig) -> None:
    batches = rig.run(Submit(request()), Sleep(1))
    errors = [batch.load.sleep_error for batch in batches if batch.load.sleep_error]
    assert len(errors) == 1
    assert "it has 1 requests" in errors[0]
    assert [
        output.finish_reason for batch in batches for output in batch.outputs if output.finish_reason
    ] == ["length"]
    assert batches[-1].load.sleep_level == 0


def test_an_engine_that_cannot_wake_says_why_and_sleeps_on(rig: Rig) -> None:
    rig.runner.wake_error = OutOfMemory("there is no memory for keys and values (3.0 GiB): 1.0 GiB are free.")
    batches = rig.run(Sleep(1), Wake(), Submit(request()))
    assert batches[-1].load.sleep_level == 1
    assert "no memory for keys and values" in batches[0].load.sleep_error + batches[-1].load.sleep_error
    assert batches[-1].outputs[0].error.startswith("the engine is asleep")
