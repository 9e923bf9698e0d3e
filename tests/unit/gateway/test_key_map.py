"""Keys: the pure diff, and the loop that runs it against a HAProxy that fails."""

from __future__ import annotations

import asyncio
import contextlib
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gateway.haproxy_identity import parse_key_map, render_key_map
from headrace.gateway.haproxy_runtime import (
    HaproxyRefused,
    HaproxyRuntime,
    HaproxyUnavailable,
    parse_map,
    parse_old_workers,
)
from headrace.gateway.key_map import KeyMap, plan_key_changes

A, B, C = "a" * 64, "b" * 64, "c" * 64
KEYS = st.dictionaries(st.sampled_from([A, B, C]), st.sampled_from(["acme", "small"]))


class FakeHaproxy(HaproxyRuntime):
    """HAProxy's map in memory. `failures` come first."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        self.entries = dict(entries)
        self.old: dict[int, dict[str, str] | None] = {}
        """Of workers from before a reload; None: it has no such map."""
        self.failures: list[Exception] = []

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    async def old_workers(self) -> list[int]:
        self._fail()
        return list(self.old)

    async def show_map(self, path: str, worker: int = 0) -> dict[str, str]:
        self._fail()
        entries = self.old[worker] if worker else self.entries
        if entries is None:
            raise HaproxyRefused("Unknown map identifier")
        return dict(entries)

    async def add_to_map(self, path: str, entries: Mapping[str, str]) -> None:
        self._fail()
        assert not entries.keys() & self.entries.keys(), "HAProxy would have the key twice"
        self.entries.update(entries)

    async def delete_from_map(self, path: str, keys: Sequence[str], worker: int = 0) -> None:
        self._fail()
        entries = self.old[worker] if worker else self.entries
        assert entries is not None
        for key in keys:
            del entries[key]


@given(KEYS, KEYS)
def test_the_changes_lead_from_any_keys_to_any_others(wanted: dict[str, str], actual: dict[str, str]) -> None:
    changes = plan_key_changes(wanted, actual)
    after = {key: tenant for key, tenant in actual.items() if key not in changes.removed}
    assert not after.keys() & changes.added.keys()
    assert {**after, **changes.added} == wanted
    assert plan_key_changes(wanted, wanted) == ([], {})


@given(KEYS)
def test_the_file_gives_back_what_was_written(keys: dict[str, str]) -> None:
    assert parse_key_map(render_key_map(keys)) == keys


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.map"
    path.write_text(render_key_map({A: "acme"}))
    return path


def content_of(path: Path) -> dict[str, str]:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return parse_key_map(path.read_text())


async def test_the_file_is_written_at_once_and_haproxy_is_told_until_it_has_the_keys(path: Path) -> None:
    haproxy = FakeHaproxy({A: "acme"})
    keys = KeyMap(str(path), haproxy)
    keys.want({A: "small", B: "acme"}, has_map=True)
    assert content_of(path) == {A: "small", B: "acme"}
    haproxy.failures = [HaproxyUnavailable("away"), HaproxyRefused("no")]
    rounds = [await keys.run_round() for _ in range(3)]
    assert rounds == [False, False, True]
    assert haproxy.entries == {A: "small", B: "acme"}
    assert (keys.num_failures, keys.last_error) == (2, "")


async def test_processes_from_before_a_reload_lose_revoked_keys_and_get_no_new_ones(path: Path) -> None:
    haproxy = FakeHaproxy({A: "acme", B: "small"})
    haproxy.old = {7: {A: "acme", B: "small"}, 8: None, 9: {B: "acme"}}
    keys = KeyMap(str(path), haproxy)
    keys.want({B: "small", C: "acme"}, has_map=True)
    assert await keys.run_round()
    assert haproxy.entries == {B: "small", C: "acme"}
    assert haproxy.old == {7: {B: "small"}, 8: None, 9: {}}


def test_old_workers_are_read_from_the_masters_list() -> None:
    text = """#<PID>          <type>          <reloads>       <uptime>        <version>
1001            master          1               0d00h00m05s     2.8.12
# workers
1003            worker          0               0d00h00m01s     2.8.12
# old workers
1002            worker          1               0d00h00m05s     2.8.12
# programs

"""
    assert parse_old_workers(text) == [1002]
    assert parse_old_workers("") == []


async def test_until_the_controller_speaks_the_files_keys_count(path: Path) -> None:
    haproxy = FakeHaproxy({B: "acme"})
    keys = KeyMap(str(path), haproxy)
    keys.want(None, has_map=True)
    assert await keys.run_round()
    assert haproxy.entries == {A: "acme"}


async def test_a_router_without_a_readable_file_leaves_haproxys_keys_alone(tmp_path: Path) -> None:
    haproxy = FakeHaproxy({B: "acme"})
    keys = KeyMap(str(tmp_path / "keys.map"), haproxy)
    keys.want(None, has_map=True)
    assert await keys.run_round()
    assert haproxy.entries == {B: "acme"}
    keys.want({}, has_map=True)
    assert await keys.run_round()
    assert haproxy.entries == {}


async def test_without_tenants_haproxy_has_no_map_and_is_not_asked(path: Path) -> None:
    haproxy = FakeHaproxy({})
    haproxy.failures = [HaproxyRefused("Unknown map identifier")]
    keys = KeyMap(str(path), haproxy)
    keys.want({}, has_map=False)
    assert await keys.run_round()
    assert haproxy.failures


async def test_a_file_that_cannot_be_written_is_tried_again(tmp_path: Path) -> None:
    keys = KeyMap(str(tmp_path / "gone" / "missing" / "keys.map"), FakeHaproxy({}))
    keys.want({A: "acme"}, has_map=True)
    assert not await keys.run_round()
    (tmp_path / "gone").mkdir()
    assert await keys.run_round()
    assert content_of(tmp_path / "gone" / "missing" / "keys.map") == {A: "acme"}


async def test_the_loop_wakes_for_new_keys_and_tries_again_by_itself(path: Path) -> None:
    haproxy = FakeHaproxy({A: "acme"})
    keys = KeyMap(str(path), haproxy)
    loop = asyncio.create_task(keys.run())
    try:
        await asyncio.sleep(0)
        haproxy.failures = [HaproxyUnavailable("away")]
        keys.want({B: "acme"}, has_map=True)
        async with asyncio.timeout(5):
            while haproxy.entries != {B: "acme"}:  # noqa: ASYNC110, a fake has no event
                await asyncio.sleep(0.01)
    finally:
        loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loop


def test_what_haproxy_shows_of_a_map_is_read_and_anything_else_refused() -> None:
    assert parse_map(f"0x7f01 {A} acme\n0x7f02 {B} small\n\n") == {A: "acme", B: "small"}
    assert parse_map("\n") == {}
    with pytest.raises(HaproxyRefused, match="Unknown map"):
        parse_map("Unknown map identifier. Please use #<id> or <file>.\n")
