"""A runner's sleep: memory goes back to the system, is taken again, and is not taken where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.engine.tiny_models import gguf_file

from headrace.api.messages import EngineSpec
from headrace.engine import kv_memory
from headrace.engine.protocol import StepInput
from headrace.engine.runner import DecoderRunner, load_runner
from headrace.engine.weights import loading
from headrace.errors import ConfigError, ModelChanged, OutOfMemory
from headrace.units import MIB

KV_BYTES = 96 * MIB


def runner(tmp_path: Path, **settings: object) -> DecoderRunner:
    fields = {"block_size": 8, "kv_cache_bytes": KV_BYTES, "num_threads": 1, "dtype": "float32"}
    spec = EngineSpec("native", "m", **{**fields, **settings})  # type: ignore[arg-type]
    return load_runner(spec, gguf_file(tmp_path / "m.gguf"), lambda _phase: None)


def logits(found: DecoderRunner) -> torch.Tensor:
    places = np.arange(5, dtype=np.int32)
    ends = np.array([0, 5], np.int32)
    return found.execute(StepInput(places + 7, places, places, ends, ends[1:], [[0]], places[-1:])).clone()


@torch.inference_mode()
def fill(found: DecoderRunner) -> None:
    """Write to all keys and values, so that their pages are there."""
    for cache in found._caches:
        cache.fill_(1)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("is_packed", [False, True])
def test_sleep_gives_memory_back_and_wake_computes_the_same(
    tmp_path: Path, level: int, is_packed: bool
) -> None:
    found = runner(tmp_path, packed_dir=str(tmp_path / "packed") if is_packed else "")
    before = logits(found)
    fill(found)
    awake_bytes = resident_bytes()
    found.sleep(1 if level == 1 else 2)
    assert resident_bytes() < awake_bytes - 0.9 * KV_BYTES
    found.wake()
    assert resident_bytes() < awake_bytes - 0.9 * KV_BYTES, "pages come when they are written"
    assert torch.equal(logits(found), before)


@pytest.mark.slow
def test_without_memory_it_sleeps_on_and_wakes_when_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = runner(tmp_path)
    before = logits(found)
    found.sleep(2)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "free_memory_bytes", lambda: KV_BYTES - 1)
        with pytest.raises(OutOfMemory, match=r"no memory for keys and values \(96.0 MiB\): .* are free"):
            found.wake()
    found.wake()
    assert torch.equal(logits(found), before)


def test_on_standby_memory_that_is_not_free_yet_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_memory, "free_memory_bytes", lambda: KV_BYTES // 2)
    with pytest.raises(ConfigError, match=r"the KV cache takes 96\.0 MiB"):
        runner(tmp_path)
    assert runner(tmp_path, is_standby=True).num_blocks > 1000


def test_an_engine_does_not_wake_as_another_model(tmp_path: Path) -> None:
    found = runner(tmp_path)
    found.sleep(2)
    gguf_file(tmp_path / "other.gguf", seed=1)
    (tmp_path / "other.gguf").rename(tmp_path / "m.gguf")
    with pytest.raises(ModelChanged, match="Start the replica again"):
        found.wake()
