"""A real engine process (simulated engine) seen through its socket, as a front sees it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import psutil
import pytest

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import (
    Abort,
    Drain,
    EngineCommand,
    EngineEvent,
    EngineFailed,
    EngineReady,
    EngineSpec,
    EngineStarting,
    GenerationRequest,
    SamplingParams,
    StepBatch,
    StepOutput,
    Submit,
)

pytestmark = pytest.mark.slow  # each starts a Python process
DEADLINE_S = 30.0


class EngineUnderTest:
    """The front's end of the socket, with a deadline on every wait."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.connection = connection
        self.process = process
        self._decoder: FrameDecoder[EngineEvent] = FrameDecoder(EngineEvent)
        self._events: list[EngineEvent] = []

    def send(self, *commands: EngineCommand) -> None:
        for command in commands:
            self.connection.sendall(encode_frame(command))

    def next_event(self) -> EngineEvent:
        deadline_s = time.monotonic() + DEADLINE_S
        while not self._events:
            assert select.select([self.connection], [], [], deadline_s - time.monotonic())[0], "no event"
            data = self.connection.recv(1 << 20)
            if not data:
                raise EOFError("the engine closed its end")
            self._events.extend(self._decoder.feed(data))
        return self._events.pop(0)

    def wait_ready(self) -> EngineReady:
        while not isinstance(event := self.next_event(), EngineReady):
            assert isinstance(event, EngineStarting), event
        return event

    def outputs_until(self, is_enough: Callable[[list[StepOutput]], bool]) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        while not is_enough(outputs):
            event = self.next_event()
            assert isinstance(event, StepBatch), event
            outputs.extend(event.outputs)
        return outputs

    def rest(self) -> list[EngineEvent]:
        events = []
        while True:
            try:
                events.append(self.next_event())
            except (EOFError, ConnectionResetError):
                return events


@contextmanager
def start_engine(
    spec: EngineSpec | str, *arguments: str, pass_fds: Sequence[int] = ()
) -> Iterator[EngineUnderTest]:
    ours, theirs = socket.socketpair()
    text = spec if isinstance(spec, str) else msgspec.json.encode(spec).decode()
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace.engine", "--fd", str(theirs.fileno()), "--spec", text, *arguments],
        pass_fds=[theirs.fileno(), *pass_fds],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stderr=subprocess.PIPE,
    )
    theirs.close()
    try:
        with ours:
            yield EngineUnderTest(ours, process)
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def simulated(**settings: object) -> EngineSpec:
    return EngineSpec(**{"kind": "simulated", "model": "simulated", "simulated_step_s": 0.002, **settings})  # type: ignore[arg-type]


def request(request_id: str, max_tokens: int, prompt: list[int] | None = None) -> Submit:
    return Submit(GenerationRequest(request_id, prompt or [104, 105], SamplingParams(max_tokens=max_tokens)))


def has_finished(*request_ids: str) -> Callable[[list[StepOutput]], bool]:
    return lambda outputs: set(request_ids) <= {o.request_id for o in outputs if o.finish_reason}


def test_an_engine_reports_its_phases_then_streams_each_request_to_its_end() -> None:
    with start_engine(simulated(), "--title", "headrace: engine test-1") as engine:
        assert isinstance(engine.next_event(), EngineStarting)
        ready = engine.wait_ready()
        assert (ready.kind, ready.vocab_size, ready.max_context_tokens) == ("simulated", 257, 32768)
        assert set(ready.phases) == {"starting python", "waiting for simulated_start_s"}
        assert psutil.Process(engine.process.pid).cmdline()[0] == "headrace: engine test-1"
        engine.send(request("a", 30), request("b", 12))
        outputs = engine.outputs_until(has_finished("a", "b"))
        for request_id, length in (("a", 30), ("b", 12)):
            tokens = [t for o in outputs if o.request_id == request_id for t in o.token_ids]
            assert len(tokens) == length
            assert bytes(tokens).startswith(b"[simulated] ")


def test_an_idle_engine_sends_a_heartbeat_each_second() -> None:
    with start_engine(simulated()) as engine:
        engine.wait_ready()
        begin_s = time.monotonic()
        beats = [engine.next_event() for _ in range(3)]
        assert all(isinstance(beat, StepBatch) and not beat.outputs for beat in beats)
        assert 1.5 <= time.monotonic() - begin_s < 4


def test_an_aborted_request_gives_no_more_output_and_the_others_go_on() -> None:
    with start_engine(simulated()) as engine:
        engine.wait_ready()
        engine.send(request("gone", 30_000), request("stays", 30_000))
        engine.outputs_until(lambda outputs: {o.request_id for o in outputs} == {"gone", "stays"})
        engine.send(Abort("gone"), request("mark", 2))
        engine.outputs_until(has_finished("mark"))
        later = engine.outputs_until(lambda outputs: len(outputs) >= 20)
        assert {output.request_id for output in later} == {"stays"}
        event = engine.next_event()
        assert isinstance(event, StepBatch)
        assert event.load.num_running == 1


def test_a_drain_finishes_what_runs_refuses_new_requests_and_exits() -> None:
    with start_engine(simulated()) as engine:
        engine.wait_ready()
        engine.send(request("a", 40))
        engine.outputs_until(lambda outputs: len(outputs) > 0)
        engine.send(Drain(), request("late", 5))
        outputs = engine.outputs_until(has_finished("a", "late"))
        late = [output for output in outputs if output.request_id == "late"]
        assert [o.finish_reason for o in late] == ["error"]
        assert "draining" in late[0].error
        assert engine.rest() == []
        assert engine.process.wait(DEADLINE_S) == 0


def test_sigterm_drains_and_sigint_does_nothing() -> None:
    with start_engine(simulated()) as engine:
        engine.wait_ready()
        engine.send(request("a", 100))
        engine.outputs_until(lambda outputs: len(outputs) > 0)
        engine.process.send_signal(signal.SIGINT)
        engine.process.send_signal(signal.SIGTERM)
        outputs = engine.outputs_until(has_finished("a"))
        assert outputs[-1].finish_reason == "length"
        assert engine.process.wait(DEADLINE_S) == 0


def test_sigterm_ends_an_idle_engine_and_a_starting_one_at_once() -> None:
    with start_engine(simulated()) as engine:
        engine.wait_ready()
        engine.process.send_signal(signal.SIGTERM)
        assert engine.process.wait(DEADLINE_S) == 0
    with start_engine(simulated(simulated_start_s=600.0)) as engine:
        assert isinstance(engine.next_event(), EngineStarting)
        engine.process.send_signal(signal.SIGTERM)
        assert engine.process.wait(DEADLINE_S) == 0


def test_the_engine_exits_when_the_front_closes_its_end() -> None:
    with start_engine(simulated()) as engine:
        engine.wait_ready()
        engine.send(request("a", 30_000))
        engine.outputs_until(lambda outputs: len(outputs) > 0)
        engine.connection.close()
        assert engine.process.wait(DEADLINE_S) == 0


def test_the_engine_dies_with_a_front_that_is_killed() -> None:
    # The front here is a process that starts an engine, keeps its socket in a third process, and hangs:
    # so only the parent's death, not the end of the stream, can end the engine.
    ours, theirs = socket.socketpair()
    front = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'headrace.engine', '--fd', '{theirs.fileno()}',"
        f" '--spec', sys.argv[1]], pass_fds=[{theirs.fileno()}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", front, msgspec.json.encode(simulated()).decode()],
        pass_fds=[theirs.fileno()],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    theirs.close()
    assert process.stdout is not None
    try:
        engine = psutil.Process(int(process.stdout.readline()))
        EngineUnderTest(ours, process).wait_ready()
        process.kill()
        engine.wait(DEADLINE_S)
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)
        ours.close()


def test_a_request_that_cannot_run_ends_in_an_error_and_harms_no_other() -> None:
    with start_engine(simulated(max_context_tokens=64)) as engine:
        engine.wait_ready()
        engine.send(
            request("ok", 20),
            request("long", 5, [1] * 64),
            request("zero", 0),
            request("unknown id", 5, [999]),
        )
        outputs = engine.outputs_until(has_finished("ok", "long", "zero", "unknown id"))
        errors = {o.request_id: o.error for o in outputs if o.finish_reason == "error"}
        assert set(errors) == {"long", "zero", "unknown id"}
        assert "64 tokens" in errors["long"]
        assert "max_tokens is 0" in errors["zero"]
        assert "999" in errors["unknown id"]
        assert sum(len(o.token_ids) for o in outputs if o.request_id == "ok") == 20


@pytest.mark.parametrize(
    "garbage",
    [b"\x00\x00\x00\x03abc", b"\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n"],
    ids=["no message", "too long", "HTTP"],
)
def test_garbage_from_the_front_ends_the_engine_with_an_explanation(garbage: bytes) -> None:
    with start_engine(simulated()) as engine:
        engine.wait_ready()
        engine.connection.sendall(garbage)
        failed = engine.rest()[-1]
        assert isinstance(failed, EngineFailed)
        assert "frame" in failed.error
        assert engine.process.wait(DEADLINE_S) == 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (EngineSpec(kind="native", model="no-such-model"), "'no-such-model' is not known"),
        (EngineSpec(kind="native", model="/no/such/file.gguf"), "no such file"),
        (simulated(block_size=20), "block_size is 20; it must be a power of two"),
        ("{not json", "malformed"),
        ('{"kind": "quantum", "model": "x"}', "Invalid enum value 'quantum'"),
    ],
    ids=["unknown model", "missing file", "block size", "not JSON", "unknown kind"],
)
def test_an_engine_that_can_never_start_says_why_and_that_trying_again_is_useless(
    spec: EngineSpec | str, words: str
) -> None:
    with start_engine(spec) as engine:
        failed = engine.rest()[-1]
        assert isinstance(failed, EngineFailed)
        assert words in failed.error
        assert not failed.retryable
        assert engine.process.wait(DEADLINE_S) == 1


def test_a_native_engine_serves_a_real_model_and_finds_its_prompt_cached() -> None:
    spec = EngineSpec(kind="native", model="smollm2-135m-instruct", max_running=2, num_threads=1)
    prompt = list(range(100, 140))
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, num_logprobs=2)
    with start_engine(spec) as engine:
        ready = engine.wait_ready()
        assert (ready.kind, ready.architecture, ready.vocab_size) == ("native", "llama", 49152)
        assert list(ready.phases)[-1] == "computing the first step"
        answers = []
        for request_id in ("first", "second"):
            engine.send(Submit(GenerationRequest(request_id, prompt, sampling)))
            outputs = engine.outputs_until(has_finished(request_id))
            answers.append([token for output in outputs for token in output.token_ids])
            assert outputs[0].num_cached_tokens == (0 if request_id == "first" else 32)
            for output in outputs:
                assert output.logprobs is not None
                assert output.logprobs[0].top[0] == (output.token_ids[0], output.logprobs[0].logprob)
        assert [len(answer) for answer in answers] == [4, 4]
        engine.send(Drain())
        assert engine.process.wait(DEADLINE_S) == 0


def test_a_descriptor_that_is_no_socket_is_refused() -> None:
    with open(os.devnull) as null:
        done = subprocess.run(
            [sys.executable, "-m", "headrace.engine", "--fd", str(null.fileno()), "--spec", "{}"],
            pass_fds=[null.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            capture_output=True,
            timeout=DEADLINE_S,
        )
    assert done.returncode == 2
    assert b"is not a socket" in done.stderr


def test_the_process_module_and_the_simulated_engine_do_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, headrace.engine.process; sys.exit('torch' in sys.modules)"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0
