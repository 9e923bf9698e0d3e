"""The run directory that the keepers of one host share."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.fabric.run_directory import RunDirectoryError, only_controller
from headrace.fabric.shared_run_directory import (
    SharedRunDirectory,
    find_host_run_directory,
    host_run_directory,
)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place that is short enough for UNIX sockets."""
    with tempfile.TemporaryDirectory(prefix="hr-", dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield host_run_directory("demo", "10.0.0.1")


def test_hosts_of_one_address_share_a_directory_and_others_have_their_own(place: Path) -> None:
    assert host_run_directory("demo", "10.0.0.1") == place
    assert host_run_directory("demo", "10.0.0.2") != place
    assert host_run_directory("other", "10.0.0.1") != place


def test_the_last_one_that_leaves_removes_it(place: Path) -> None:
    first, second = SharedRunDirectory.join(place), SharedRunDirectory.join(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    (place / "controller.sock").touch()
    first.leave()
    assert (place / "controller.sock").exists()
    second.leave()
    assert not place.exists()
    assert not place.parent.exists()


def test_one_that_comes_while_it_is_removed_waits_and_gets_a_new_one(place: Path) -> None:
    place.parent.mkdir(mode=0o700)
    place.mkdir(mode=0o700)
    removing = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(removing, fcntl.LOCK_EX)  # as the last one does while it removes what is there

    def remove() -> None:
        place.rmdir()
        os.close(removing)

    timer = threading.Timer(0.2, remove)
    timer.start()
    directory = SharedRunDirectory.join(place)
    timer.join()
    assert (place / "logs").is_dir()
    directory.leave()


def test_what_dead_keepers_left_is_removed_and_what_live_ones_have_is_kept(place: Path) -> None:
    place.parent.mkdir(mode=0o700)
    place.mkdir(mode=0o700)
    (place / "left.sock").touch()
    first = SharedRunDirectory.join(place)
    assert not (place / "left.sock").exists()
    (place / "used.sock").touch()
    second = SharedRunDirectory.join(place)
    assert (place / "used.sock").exists()
    first.leave()
    second.leave()


def test_a_system_of_this_machine_is_found_by_its_name(place: Path) -> None:
    assert find_host_run_directory("demo") is None
    joined = SharedRunDirectory.join(place)
    assert find_host_run_directory("demo") == place
    joined.leave()
    place.mkdir(parents=True)
    assert find_host_run_directory("demo") is None, "what killed keepers left is no system"


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 42])
def test_a_name_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(RunDirectoryError, match="1 to 41 letters"):
        host_run_directory(name, "10.0.0.1")


def test_a_directory_that_others_can_write_to_is_refused(place: Path) -> None:
    place.parent.mkdir(mode=0o700)
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(RunDirectoryError, match="yours alone"):
        SharedRunDirectory.join(place)


def test_a_second_controller_of_a_run_directory_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(RunDirectoryError, match="another controller")
    with only_controller(tmp_path), refused, only_controller(tmp_path):
        pass
    with only_controller(tmp_path):
        pass
