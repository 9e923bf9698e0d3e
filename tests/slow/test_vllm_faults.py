"""Starts of vLLM that fail, said in its words; and interrupted starts, which leave nothing behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest
from tests.slow.vllm_rig import (
    START_LIMIT_S,
    is_gone,
    processes_below,
    spec_of,
    start_engine,
    wait_until,
    write_model,
)

from headrace.api.messages import EngineEvent, EngineFailed, EngineReady, EngineSpec, EngineStarting

pytest.importorskip("vllm", reason="needs the environment of `make test-slow`, which holds vLLM")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
END_LIMIT_S = 120.0
"""Python, torch and vLLM take their leave in a second; on a machine with much else to do, in many."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "smollm2")


def failure_of(spec: EngineSpec) -> EngineFailed:
    def is_it(event: EngineEvent) -> bool:
        assert not isinstance(event, EngineReady)
        return isinstance(event, EngineFailed)

    with start_engine(spec) as engine:
        event = engine.until(is_it)
        assert isinstance(event, EngineFailed)
        assert engine.process.wait(END_LIMIT_S) == 1
    return event


def test_an_argument_that_does_not_exist_is_refused_in_vllms_words(model: Path) -> None:
    failed = failure_of(spec_of(model, no_such_argument=1))
    assert not failed.retryable
    assert "vLLM refuses its arguments" in failed.error
    assert "no_such_argument" in failed.error


def test_a_value_that_vllm_does_not_take_is_refused_in_its_words(model: Path) -> None:
    failed = failure_of(spec_of(model, max_model_len=1_000_000))
    assert not failed.retryable
    assert "max_model_len" in failed.error


def test_a_model_that_vllm_does_not_know_is_refused_in_its_words(model: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    for path in model.iterdir():
        (unknown / path.name).symlink_to(path)
    (unknown / "config.json").unlink()
    config = {**json.loads((model / "config.json").read_text()), "architectures": ["HeadwaterForCausalLM"]}
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "headwater"}))
    failed = failure_of(spec_of(unknown))
    assert not failed.retryable
    assert "headwater" in failed.error.lower()


def test_a_start_that_fails_in_vllms_processes_says_why_and_may_be_tried_again(model: Path) -> None:
    failed = failure_of(spec_of(model, kv_cache_memory_bytes=1024))
    assert failed.retryable
    assert "vLLM did not start: " in failed.error
    assert "Engine core initialization failed" not in failed.error, "that is no reason"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_start_that_is_interrupted_leaves_nothing_behind(model: Path, number: signal.Signals) -> None:
    """The leader alone is told, as when the kernel runs out of memory."""
    with start_engine(spec_of(model)) as engine:
        engine.until(lambda event: isinstance(event, EngineStarting) and "core" in event.phase)
        below: list[psutil.Process] = []

        def has_core() -> bool:
            below[:] = processes_below(engine.process.pid)
            return any("spawn_main" in " ".join(process.cmdline()) for process in below)

        wait_until(has_core, START_LIMIT_S, "vLLM's engine core is being started")
        engine.process.send_signal(number)
        engine.process.wait(END_LIMIT_S)
        wait_until(lambda: all(map(is_gone, below)), END_LIMIT_S, "what it started is gone")
