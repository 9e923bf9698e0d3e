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
_LEAST_BLOCKS = 2
_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_LIMIT_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def kv_bytes_per_token(h: Hyperparameters, bytes_per_number: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * h.num_layers * h.num_kv_heads * h.head_dim * bytes_per_number


def longest_context(spec: EngineSpec, h: Hyperparameters) -> int:
    """Tokens that one request may have, if there is KV memory for them."""
    return min(spec.max_context_tokens or h.context_length, h.context_length)


def plan_kv_blocks(spec: EngineSpec, h: Hyperparameters, bytes_per_token: int, held_bytes: int = 0) -> int:
    """Decide the number of KV blocks for `spec` on this machine. Raises ConfigError when it cannot fit.

    On standby, what was asked for need not be free yet: it is taken, and looked for, when the engine wakes.
    held_bytes: what it has from the engine before it.
    """
    free_bytes = free_memory_bytes() + held_bytes
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
    if not spec.kv_cache_bytes:
        tokens = spec.max_running * min(_DEFAULT_TOKENS_PER_REQUEST, longest)
        wanted_bytes = max(tokens, longest) * bytes_per_token
        num_blocks = min(-(-wanted_bytes // block_bytes), int(free_bytes * _FREE_SHARE) // block_bytes)
        if num_blocks < _LEAST_BLOCKS:
            raise does_not_fit(wanted_bytes, free_bytes, block_bytes)
        return num_blocks
    if spec.kv_cache_bytes > free_bytes:
        raise does_not_fit(spec.kv_cache_bytes, free_bytes, block_bytes)
    if spec.kv_cache_bytes < _LEAST_BLOCKS * block_bytes:
        raise ConfigError(
            f"kv_cache_mb is {format_bytes(spec.kv_cache_bytes)}, less than {_LEAST_BLOCKS} blocks of "
            f"{format_bytes(block_bytes)}; set kv_cache_mb to at least {_least_mb(block_bytes)}"
        )
    return spec.kv_cache_bytes // block_bytes


def does_not_fit(wanted_bytes: int, free_bytes: int, block_bytes: int) -> ConfigError:
    """The error for KV memory that is not there: what was asked, what is there, and a setting that works."""
    what = (
        f"the KV cache takes {format_bytes(wanted_bytes)} and {format_bytes(free_bytes)} of memory are free"
    )
    at_most_mb = int(free_bytes * _FREE_SHARE) // MIB
    if at_most_mb < _least_mb(block_bytes):
        return ConfigError(
            f"{what}, too little for {_LEAST_BLOCKS} blocks of {format_bytes(block_bytes)}; stop other "
            "programs or replicas, serve a smaller model, or set block_size to fewer tokens"
        )
    return ConfigError(f"{what}; set kv_cache_mb to at most {at_most_mb}")


def _least_mb(block_bytes: int) -> int:
    return -(-_LEAST_BLOCKS * block_bytes // MIB)


def free_memory_bytes() -> int:
    """Memory that this process may still take without swapping: what the machine has available, within the
    limits of its control groups (version 1 or 2, and of all groups around its own)."""
    rooms = [_room(group) for group in _memory_groups()]
    return min([int(psutil.virtual_memory().available), *(room for room in rooms if room is not None)])


def _memory_groups() -> list[Path]:
    """Directories of this process's control group for memory and of those around it."""
    groups = [_CGROUP]  # inside a container its own group is mounted here
    try:
        lines = _MEMBERSHIP.read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return groups
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers in ("", "memory"):
            root = _CGROUP / controllers
            group = root / path.lstrip("/")
            groups += [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
    return list(dict.fromkeys(groups))


def _room(group: Path) -> int | None:
    """What a control group may still take; None: it has no limit, or is none of this machine's.

    Files that the kernel keeps only because there was room do not count as taken: it drops them first.
    """
    for limit_name, used_name in _LIMIT_FILES:
        limit, used = _read_number(group / limit_name), _read_number(group / used_name)
        if limit is not None and used is not None:
            return max(limit - max(used - _droppable(group), 0), 0)
    return None


def _droppable(group: Path) -> int:
    """Bytes of cached files that nobody used lately."""
    try:
        lines = (group / "memory.stat").read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return 0
    fields = dict(line.split(" ", 1) for line in lines if " " in line)
    text = fields.get("total_inactive_file", fields.get("inactive_file", "0")).strip()
    return int(text) if text.isdigit() else 0


def _read_number(path: Path) -> int | None:
    """The number in a control group's file; None for `max`, or where there is no such file."""
    try:
        text = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None
