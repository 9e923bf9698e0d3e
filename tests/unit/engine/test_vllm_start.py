"""How vLLM is started, without vLLM: modules that record what they are given stand for its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from headrace.api.messages import EngineSpec
from headrace.engine.vllm_backend import start_vllm
from headrace.errors import EngineDead

Start = Callable[..., dict[str, Any]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    """Start it with arguments, as far as its processes; return what vLLM was given."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)
    given: dict[str, Any] = {}

    def fail_to_start(config: dict[str, Any], usage_context: str) -> None:
        given.update(config, started_as=usage_context, spins=os.environ.get("GOMP_SPINCOUNT"))
        raise RuntimeError("this is far enough")

    def engine_args(**arguments: Any) -> SimpleNamespace:
        return SimpleNamespace(create_engine_config=lambda usage: {**arguments, "configured_as": usage})

    def stand_in(name: str, **contents: Any) -> None:
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    def start_it(**arguments: Any) -> dict[str, Any]:
        for name in ("vllm", "vllm.engine", "vllm.usage", "vllm.v1", "vllm.v1.engine"):
            stand_in(name)
        stand_in("vllm.config", KVEventsConfig=dict, StructuredOutputsConfig=dict)
        stand_in("vllm.engine.arg_utils", AsyncEngineArgs=engine_args)
        stand_in("vllm.usage.usage_lib", UsageContext=SimpleNamespace(OPENAI_API_SERVER="server"))
        stand_in("vllm.v1.engine.async_llm", AsyncLLM=SimpleNamespace(from_vllm_config=fail_to_start))
        with pytest.raises(EngineDead, match="far enough"):
            start_vllm(EngineSpec("vllm", str(tmp_path), vllm_args=arguments), lambda phase: None)
        return given

    return start_it


def test_what_nobody_set_is_as_vllm_serve_sets_it(start: Start) -> None:
    """Its defaults (tokens of a step, requests at a time) depend on what it is started as."""
    given = start()
    assert given["configured_as"] == given["started_as"] == "server"


def test_its_threads_spin_briefly_while_they_wait_for_each_other(start: Start) -> None:
    assert start()["spins"] == "3000"
