"""What all tests rely on."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.engine.operations.kernels import KernelsMissing, Library, load_kernels

# Children inherit an ignored SIGINT, as a shell gives it to what it runs in the background; then Ctrl-C,
# which several tests press, would do nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def state_home() -> Iterator[None]:
    """State (keys, packed weights) of systems that tests start is theirs alone, and gone after the run."""
    with tempfile.TemporaryDirectory(prefix="headrace-tests-") as path:
        before = os.environ.get("XDG_STATE_HOME")
        os.environ["XDG_STATE_HOME"] = path
        yield
        if before is None:
            del os.environ["XDG_STATE_HOME"]
        else:
            os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(scope="session")
def library() -> Library:
    """The compiled kernels. Skips where the install made none."""
    try:
        return load_kernels()
    except KernelsMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def short_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run directories are made where paths are short enough for UNIX sockets. tmp_path is asked for so that
    pytest's own directory is where it always is: it is made once, at the first use."""
    with tempfile.TemporaryDirectory(prefix="hr-", dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield
