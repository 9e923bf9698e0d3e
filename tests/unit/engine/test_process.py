"""The engine loop: its answers to an engine that refuses and one that breaks. Processes: integration."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import (
    Drain,
    EngineEvent,
    EngineSpec,
    GenerationRequest,
    SamplingParams,
    StepBatch,
    Submit,
)
from headrace.clock import VirtualClock
from headrace.engine import process
from headrace.engine.channel import FrontChannel, FrontGone
from headrace.engine.fake_runner import FakeRunner
from headrace.engine.native import NativeEngine
from headrace.engine.process import DrainSignal, EngineLoop, check_spec, is_retryable
from headrace.errors import ConfigError, ModelError


class Front:
    """The front's end, and a loop over a native engine with the fake runner at the other."""

    def __init__(self, front: socket.socket, engine: socket.socket) -> None:
        self.socket = front
        self.runner = FakeRunner(num_blocks=16)
        spec = EngineSpec("native", "fake", block_size=8)
        self.loop = EngineLoop(
            NativeEngine(spec, self.runner, VirtualClock()),
            FrontChannel(engine),
            DrainSignal(),
            VirtualClock(),
        )

    def send(self, *commands: Submit | Drain) -> None:
        for command in commands:
            self.socket.sendall(encode_frame(command))

    def endings(self) -> list[tuple[str, str | None]]:
        decoder: FrameDecoder[EngineEvent] = FrameDecoder(EngineEvent)
        events = list(decoder.feed(self.socket.recv(1 << 20)))
        batches = [event for event in events if isinstance(event, StepBatch)]
        return [
            (o.request_id, o.finish_reason) for batch in batches for o in batch.outputs if o.finish_reason
        ]


@pytest.fixture
def front() -> Iterator[Front]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Front(ours, theirs)


def submit(request_id: str, prompt: list[int], max_tokens: int = 3) -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Submit(GenerationRequest(request_id, prompt, sampling))


def test_every_request_ends_exactly_once_among_good_bad_and_poisoned_ones(front: Front) -> None:
    front.runner.poison_token = 60
    front.send(
        submit("good", [1, 2]),
        submit("too long", [1] * 128),
        submit("poisoned", [60]),
        submit("zero", [1], 0),
    )
    front.send(Drain(), submit("late", [1]))
    front.loop.run()
    assert sorted(front.endings()) == [
        ("good", "length"),
        ("late", "error"),
        ("poisoned", "error"),
        ("too long", "error"),
        ("zero", "error"),
    ]


def test_a_double_id_ends_both_requests_with_one_error(front: Front) -> None:
    front.send(submit("same", [1], 50), submit("same", [2], 50), submit("other", [3]), Drain())
    front.loop.run()
    assert sorted(front.endings()) == [("other", "length"), ("same", "error")]


def test_more_waiting_requests_than_the_limit_are_refused(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "MAX_WAITING", 2)
    front.send(*(submit(name, [1]) for name in "abcd"), Drain())
    front.loop.run()
    assert sorted(front.endings()) == [("a", "length"), ("b", "length"), ("c", "error"), ("d", "error")]


def test_a_step_that_breaks_is_not_swallowed(front: Front) -> None:
    def execute(_batch: object) -> None:
        raise RuntimeError("the device is gone")

    front.runner.execute = execute  # type: ignore[method-assign, assignment]
    front.send(submit("r", [1]))
    with pytest.raises(RuntimeError, match="the device is gone"):
        front.loop.run()


def test_the_loop_ends_when_the_front_leaves(front: Front) -> None:
    front.send(submit("r", [1], 50))
    front.socket.close()
    with pytest.raises(FrontGone):
        front.loop.run()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("block_size", 4),
        ("block_size", 12),
        ("max_running", 0),
        ("token_budget", 0),
        ("kv_cache_bytes", -1),
        ("max_draft_tokens", 0),
    ],
)
def test_settings_that_cannot_work_are_named(setting: str, value: int) -> None:
    spec = msgspec.structs.replace(EngineSpec("native", "m"), **{setting: value})
    with pytest.raises(ConfigError, match=f"{setting} is {value}; it must be"):
        check_spec(spec)
    check_spec(EngineSpec("native", "m"))


def test_only_what_can_change_by_itself_is_tried_again() -> None:
    assert [is_retryable(e) for e in (MemoryError(), OSError(), RuntimeError())] == [True] * 3
    assert [is_retryable(e) for e in (ModelError(), ConfigError("x"), ImportError())] == [False] * 3
