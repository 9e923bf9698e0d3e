"""The run directory: private, one owner at a time, cleaned up after the dead, gone at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.fabric.run_directory import (
    MAX_RUN_DIRECTORY_BYTES,
    RunDirectory,
    RunDirectoryError,
    default_run_directory,
)


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("p")


def test_it_is_private_and_leaves_neither_itself_nor_its_parent(place: Path) -> None:
    run_directory = RunDirectory.create(place / "headrace" / "a")
    assert run_directory.path.stat().st_mode & 0o777 == 0o700
    assert run_directory.path.parent.stat().st_mode & 0o777 == 0o700
    (run_directory.path / "admin.sock").touch()
    run_directory.remove()
    assert list(place.iterdir()) == []


def test_a_second_owner_is_refused_and_the_first_keeps_its_files(place: Path) -> None:
    first = RunDirectory.create(place / "h" / "a")
    (first.path / "file").touch()
    with pytest.raises(RunDirectoryError, match="already runs"):
        RunDirectory.create(place / "h" / "a")
    assert (first.path / "file").exists()
    other = RunDirectory.create(place / "h" / "b")
    first.remove()
    assert other.path.is_dir()
    other.remove()


def test_what_a_dead_owner_left_is_removed(place: Path) -> None:
    stale = place / "h" / "a"
    stale.mkdir(parents=True)
    for directory in (stale.parent, stale):
        directory.chmod(0o700)
    (stale / "old.sock").touch()
    (stale / "logs").mkdir()
    (stale / "logs" / "old.log").touch()
    run_directory = RunDirectory.create(stale)
    assert [path.name for path in stale.rglob("*")] == ["logs"]
    run_directory.remove()


def test_a_directory_that_others_can_enter_or_a_link_is_refused(place: Path) -> None:
    (place / "open").mkdir()
    (place / "open").chmod(0o755)
    with pytest.raises(RunDirectoryError, match="0700"):
        RunDirectory.create(place / "open" / "a")
    (place / "real").mkdir(mode=0o700)
    (place / "link").symlink_to(place / "real")
    with pytest.raises(RunDirectoryError):
        RunDirectory.create(place / "link" / "a")


def test_a_path_too_long_for_sockets_is_refused_with_what_to_do(place: Path) -> None:
    with pytest.raises(RunDirectoryError, match="--name"):
        RunDirectory.create(place / ("x" * MAX_RUN_DIRECTORY_BYTES))


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 42, "-a"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(RunDirectoryError, match="letters"):
        default_run_directory(name)


def test_the_place_is_the_runtime_directory_unless_it_is_missing_or_too_long(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    assert default_run_directory("a") == place / "headrace" / "a"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place / "missing"))
    assert default_run_directory("a").parent.name == f"headrace-{os.getuid()}"
    long = place / ("x" * 60)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    assert len(os.fsencode(default_run_directory("a"))) <= MAX_RUN_DIRECTORY_BYTES
