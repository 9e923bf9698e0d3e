"""How many KV blocks an engine takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.api.messages import EngineSpec
from headrace.engine import kv_memory
from headrace.engine.kv_memory import choose_num_blocks, free_memory_bytes
from headrace.errors import ConfigError
from headrace.units import GIB, MIB

BYTES_PER_TOKEN = 1024


def choose(free_bytes: int = 100 * GIB, context_length: int = 8192, **fields: Any) -> int:
    return choose_num_blocks(EngineSpec("native", "m", **fields), context_length, BYTES_PER_TOKEN, free_bytes)


def test_by_default_every_running_request_gets_1024_tokens() -> None:
    assert choose(max_running=32, block_size=16) == 32 * 1024 // 16


def test_one_request_can_always_use_the_whole_context() -> None:
    assert choose(max_running=2, block_size=16) == 8192 // 16
    assert choose(max_running=2, max_context_tokens=4096, block_size=16) == 4096 // 16


def test_a_short_context_needs_less() -> None:
    assert choose(max_running=32, context_length=256, block_size=16) == 32 * 256 // 16


def test_little_free_memory_gives_half_of_it() -> None:
    assert choose(free_bytes=8 * MIB, block_size=16) == 4 * MIB // (16 * BYTES_PER_TOKEN)


def test_a_setting_is_taken_as_it_is() -> None:
    assert choose(kv_cache_bytes=10 * MIB, block_size=16) == 10 * MIB // (16 * BYTES_PER_TOKEN)


def test_a_setting_beyond_free_memory_is_refused_with_one_that_works() -> None:
    with pytest.raises(ConfigError, match=r"takes 4\.0 GiB and 1\.0 GiB.*at most 512"):
        choose(kv_cache_bytes=4 * GIB, free_bytes=GIB)
    assert choose(kv_cache_bytes=512 * MIB, free_bytes=GIB) > 0


def test_memory_for_less_than_two_blocks_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        choose(kv_cache_bytes=1000)
    assert choose(kv_cache_bytes=MIB) > 1


def test_where_nothing_fits_no_setting_is_promised() -> None:
    with pytest.raises(
        ConfigError, match=r"1\.0 MiB of memory are free, too little for 2 blocks of 1\.0 MiB"
    ) as raised:
        choose(free_bytes=MIB, block_size=1024)
    assert "kv_cache_mb" not in str(raised.value)


@settings(max_examples=200, derandomize=True)
@given(
    asked=st.integers(0, 64 * GIB),
    free=st.integers(0, 64 * GIB),
    block_size=st.sampled_from([8, 16, 128]),
)
def test_a_setting_that_an_error_names_works(asked: int, free: int, block_size: int) -> None:
    try:
        num_blocks = choose(kv_cache_bytes=asked, free_bytes=free, block_size=block_size)
        assert 2 * BYTES_PER_TOKEN * block_size <= num_blocks * BYTES_PER_TOKEN * block_size <= free
    except ConfigError as error:
        named = re.search(r"set kv_cache_mb to at (?:most|least) (\d+)", str(error))
        if named and "at most" in str(error):
            assert choose(kv_cache_bytes=int(named[1]) * MIB, free_bytes=free, block_size=block_size) >= 2
        elif named:
            assert choose(kv_cache_bytes=int(named[1]) * MIB, block_size=block_size) >= 2


@pytest.mark.parametrize(("limit", "is_limited"), [("max", False), (str(10 * MIB), True), ("garbage", False)])
@pytest.mark.parametrize(
    ("membership", "group", "limit_name", "used_name"),
    [
        ("", "", "memory.max", "memory.current"),
        ("0::/a/b", "a", "memory.max", "memory.current"),
        ("9:name=systemd:/x\n4:memory:/a/b", "memory/a/b", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_a_control_group_limits_free_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    membership: str,
    group: str,
    limit_name: str,
    used_name: str,
    limit: str,
    is_limited: bool,
) -> None:
    directory = tmp_path / group
    directory.mkdir(parents=True, exist_ok=True)
    (tmp_path / "membership").write_text(membership)
    (directory / limit_name).write_text(limit + "\n")
    (directory / used_name).write_text(f"{5 * MIB}\n")
    (directory / "memory.stat").write_text(f"cache 0\ninactive_file {MIB}\n")
    monkeypatch.setattr(kv_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(kv_memory, "_MEMBERSHIP", tmp_path / "membership")
    assert (free_memory_bytes() == 6 * MIB) is is_limited
