"""Engines whose other rank is started by a holder, wherever a launcher put that: here, beside the test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tests.integration.test_engine_process import EngineUnderTest, has_finished, start_engine
from tests.integration.test_tensor_parallel import failure, is_gone, settle, tiny_spec
from tests.unit.engine.tiny_models import huggingface_directory

from headrace.api.messages import GenerationRequest, SamplingParams, Submit
from headrace.engine.model_files.resolve import ModelFiles

# Each rank imports torch.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("library")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return huggingface_directory(tmp_path_factory.mktemp("tiny"))


@contextmanager
def holder_at(path: Path, address: str = "") -> Iterator[psutil.Process]:
    """The holder of rank 1, as a host's keeper starts it. address: of its node, if there are several."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "headrace.engine.workers.holder",
            str(path),
            "1",
            *([address] * bool(address)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait(10)


def rank_of(holder: psutil.Process) -> psutil.Process:
    settle(lambda: bool(holder.children()), "no rank was started")
    (rank,) = holder.children()
    return rank


def tokens_of(engine: EngineUnderTest, max_tokens: int = 20) -> list[int]:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.9, seed=3)
    engine.send(Submit(GenerationRequest("r", [5, 6, 7], sampling)))
    outputs = engine.outputs_until(has_finished("r"))
    return [token for output in outputs for token in output.token_ids]


def test_a_placed_rank_gives_the_tokens_of_a_local_one_to_one_engine_after_another(
    tiny: ModelFiles, tmp_path: Path
) -> None:
    with start_engine(tiny_spec(tiny)) as engine:
        engine.wait_ready()
        expected = tokens_of(engine)
    path = tmp_path / "ranks.sock"
    ranks = set()
    with holder_at(path) as holder:
        for _ in range(2):
            with start_engine(tiny_spec(tiny, rank_socket=str(path))) as engine:
                engine.wait_ready()
                rank = rank_of(holder)
                assert not path.exists(), "nobody is let in once all are here"
                assert not psutil.Process(engine.process.pid).children()
                assert tokens_of(engine) == expected
                ranks.add(rank.pid)
                engine.process.terminate()
                assert engine.process.wait(30) == 0
                settle(lambda rank=rank: is_gone(rank), "the rank lives on")  # type: ignore[misc]
    assert len(ranks) == 2


def test_a_placed_rank_that_is_killed_ends_the_engine_at_once_and_the_next_one_gets_another(
    tiny: ModelFiles, tmp_path: Path
) -> None:
    spec = tiny_spec(tiny, rank_socket=str(tmp_path / "ranks.sock"))
    with holder_at(tmp_path / "ranks.sock") as holder:
        with start_engine(spec) as engine:
            engine.wait_ready()
            rank = rank_of(holder)
            sampling = SamplingParams(max_tokens=250, ignore_eos=True)
            engine.send(Submit(GenerationRequest("r", [5, 6], sampling)))
            engine.outputs_until(lambda outputs: len(outputs) > 5)
            rank.kill()
            failed = failure(engine)
        assert failed.retryable
        assert f"rank 1 was lost: pid {rank.pid} ended with signal 9" in failed.error
        with start_engine(spec) as engine:
            engine.wait_ready()
            assert len(tokens_of(engine)) == 20


def test_a_holder_that_is_killed_takes_its_rank_and_the_engine_along(
    tiny: ModelFiles, tmp_path: Path
) -> None:
    path = tmp_path / "ranks.sock"
    with holder_at(path) as holder, start_engine(tiny_spec(tiny, rank_socket=str(path))) as engine:
        engine.wait_ready()
        rank = rank_of(holder)
        holder.kill()
        failed = failure(engine)
        assert f"pid {rank.pid} ended, and its holder with it" in failed.error
        settle(lambda: is_gone(rank), "the rank lives on")


def test_an_engine_that_is_killed_takes_even_a_stopped_rank_along(tiny: ModelFiles, tmp_path: Path) -> None:
    path = tmp_path / "ranks.sock"
    with holder_at(path) as holder, start_engine(tiny_spec(tiny, rank_socket=str(path))) as engine:
        engine.wait_ready()
        rank = rank_of(holder)
        rank.suspend()
        engine.process.kill()
        settle(lambda: is_gone(rank), "the rank lives on")
        assert holder.is_running()
