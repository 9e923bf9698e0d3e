"""How much KV memory an engine takes: from the setting, or from the machine's free memory.

Must not know torch. Reads /proc and the control group; the decision itself (`choose_num_blocks`) is pure.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from headrace.api.messages import EngineSpec
from headrace.engine.model_files.metadata import Hyperparameters
from headrace.errors import ConfigError
from headrace.units import MIB, format_bytes

_DEFAULT_TOKENS_PER_REQUEST = 1024
_FREE_SHARE = 0.5
_CGROUP = Path("/sys/fs/cgroup")


def kv_bytes_per_token(h: Hyperparameters, bytes_per_number: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * h.num_layers * h.num_kv_heads * h.head_dim * bytes_per_number


def plan_kv_blocks(spec: EngineSpec, h: Hyperparameters, bytes_per_token: int) -> int:
    """Decide the number of KV blocks for `spec` on this machine. Raises ConfigError when it cannot fit.

    On standby, what was asked for need not be free yet: it is taken, and looked for, when the engine wakes.
    """
    free_bytes = free_memory_bytes()
    if spec.is_standby:
        free_bytes = max(free_bytes, spec.kv_cache_bytes)
    return choose_num_blocks(spec, h.context_length, bytes_per_token, free_bytes)


def choose_num_blocks(spec: EngineSpec, context_length: int, bytes_per_token: int, free_bytes: int) -> int:
    """Pure part of `plan_kv_blocks`.

    Asked for: all of it must be free. Not asked: max_running requests of 1,024 tokens (or of the context,
    where that is shorter) within half of the free memory: another engine may be starting beside this one.
    """
    block_bytes = bytes_per_token * spec.block_size
    longest = min(spec.max_context_tokens or context_length, context_length)
    if spec.kv_cache_bytes:
        if spec.kv_cache_bytes > free_bytes:
            raise ConfigError(
                f"kv_cache_mb asks for {format_bytes(spec.kv_cache_bytes)} and {format_bytes(free_bytes)} "
                f"of memory are free; set kv_cache_mb to at most {int(free_bytes * _FREE_SHARE) // MIB}"
            )
        num_blocks = spec.kv_cache_bytes // block_bytes
    else:
        tokens = spec.max_running * min(_DEFAULT_TOKENS_PER_REQUEST, longest)
        wanted_bytes = max(tokens, longest) * bytes_per_token
        num_blocks = min(-(-wanted_bytes // block_bytes), int(free_bytes * _FREE_SHARE) // block_bytes)
    if num_blocks < 2:
        raise ConfigError(
            f"{format_bytes(spec.kv_cache_bytes or free_bytes * _FREE_SHARE)} of KV memory hold fewer than "
            f"2 blocks of {format_bytes(block_bytes)}; "
            f"set kv_cache_mb to at least {-(-2 * block_bytes // MIB)}"
        )
    return num_blocks


def free_memory_bytes() -> int:
    """Memory that this process may still take: the machine's available, within its control group's limit."""
    available = int(psutil.virtual_memory().available)
    limit, used = _read_number(_CGROUP / "memory.max"), _read_number(_CGROUP / "memory.current")
    if limit is None or used is None:
        return available
    return min(available, max(limit - used, 0))


def _read_number(path: Path) -> int | None:
    """The number in a control group's file; None for `max`, or where there is no such file."""
    try:
        text = path.read_text("ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
