"""LoRA adapters on disk, as PEFT writes them: what must be known of one before an engine is started with it.

Format: PEFT's adapter_config.json (JSON) beside adapter_model.safetensors. Must not know how engines load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from headrace.errors import ConfigError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's max_lora_rank may be."""
_MAX_CONFIG_BYTES = 1 << 20
MAX_LORAS = 4
"""Adapters in one batch unless the user's `max_loras` says otherwise: each takes its place in memory."""


class _AdapterConfig(msgspec.Struct):
    r: int
    peft_type: str = "LORA"


def rank_of(name: str, directory: Path) -> int:
    """Return the rank of the adapter in `directory`. Raises ConfigError if there is none."""
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / file).is_file()]
    if missing:
        raise ConfigError(
            f"vllm.lora.{name}: {directory} is no LoRA adapter: {' and '.join(missing)} not found; it must "
            "be a directory as PEFT saves one"
        )
    try:
        with open(directory / CONFIG_FILE, "rb") as file:
            config = msgspec.json.decode(file.read(_MAX_CONFIG_BYTES), type=_AdapterConfig)
    except (OSError, msgspec.DecodeError) as error:  # ValidationError is one
        raise ConfigError(f"vllm.lora.{name}: {directory / CONFIG_FILE} cannot be read: {error}") from error
    if config.peft_type != "LORA" or config.r < 1:
        raise ConfigError(
            f"vllm.lora.{name}: {directory} is of type {config.peft_type}, rank {config.r}; it must be LORA, "
            "with a rank of at least 1"
        )
    return config.r


def adapter_arguments(adapters: Mapping[str, str]) -> dict[str, Any]:
    """Return what vLLM is told of LoRA: room for all adapters in one batch, up to MAX_LORAS, and for their
    highest rank. Raises ConfigError with all that are no adapters."""
    if not adapters:
        return {}
    ranks = [rank_of(name, Path(path)) for name, path in adapters.items()]
    return {
        "enable_lora": True,
        "max_loras": min(len(adapters), MAX_LORAS),
        "max_cpu_loras": len(adapters),
        "max_lora_rank": next((known for known in LORA_RANKS if known >= max(ranks)), max(ranks)),
    }
