"""A socket for its owner alone, also where somebody died before."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from headrace.private_socket import bind_private_socket


def test_only_the_owner_may_connect_and_the_process_masks_as_before(tmp_path: Path) -> None:
    path = str(tmp_path / "x.sock")
    before = os.umask(0o022)
    try:
        with bind_private_socket(path) as listener:
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            assert not listener.getblocking()
            assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_a_dead_listeners_socket_is_replaced_and_a_missing_directory_is_said(tmp_path: Path) -> None:
    path = str(tmp_path / "x.sock")
    bind_private_socket(path).close()
    with bind_private_socket(path) as listener:
        assert listener.getsockname() == path
    with pytest.raises(FileNotFoundError):
        bind_private_socket(str(tmp_path / "none" / "x.sock"))
