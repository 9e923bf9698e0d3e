"""What all tests rely on."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator

import pytest

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
