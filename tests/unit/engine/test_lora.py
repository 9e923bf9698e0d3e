"""Adapters on disk: what vLLM is told of them, and what is said of directories that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.engine.lora import adapter_arguments, rank_of
from headrace.errors import ConfigError


def write_adapter(directory: Path, config: object) -> str:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (directory / "adapter_model.safetensors").touch()
    return str(directory)


def test_vllm_gets_room_for_all_adapters_and_the_highest_rank(tmp_path: Path) -> None:
    assert adapter_arguments({}) == {}
    adapters = {
        f"a{rank}": write_adapter(tmp_path / str(rank), {"r": rank, "peft_type": "LORA"})
        for rank in (1, 4, 12, 16, 20)
    }
    assert adapter_arguments(adapters) == {
        "enable_lora": True,
        "max_loras": 4,
        "max_cpu_loras": 5,
        "max_lora_rank": 32,
    }


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "cannot be read"),
        ({"peft_type": "LORA"}, "cannot be read: .*`r`"),
        ({"r": 0}, "rank of at least 1"),
        ({"r": 4, "peft_type": "IA3"}, "is of type IA3"),
    ],
)
def test_an_adapter_that_is_none_is_told(tmp_path: Path, config: object, words: str) -> None:
    directory = write_adapter(tmp_path / "x", config)
    with pytest.raises(ConfigError, match=rf"vllm\.lora\.poet: .*{words}"):
        rank_of("poet", Path(directory))


def test_a_directory_without_weights_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no LoRA adapter: .* and adapter_model\.safetensors not found"):
        rank_of("poet", tmp_path)
