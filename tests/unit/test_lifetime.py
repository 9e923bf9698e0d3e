"""How processes end, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

BEGIN = """
import atexit, sys, threading, weakref
from headrace.lifetime import exit_whole

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()  # until the interpreter clears its modules
held = {"ranks"}
"""


def ended(body: str) -> tuple[int, list[str], str]:
    """Status, output and errors of a program whose `run` has this body."""
    program = f"{BEGIN}\ndef run():\n    {body}\nexit_whole(run)\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("status", [0, 1, 3])
def test_a_process_that_exits_whole_keeps_its_status_and_takes_nothing_apart(status: int) -> None:
    assert ended(f"print('runs'); return {status}") == (status, ["runs"], "")


def test_the_same_program_with_sys_exit_takes_itself_apart() -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}\nsys.exit(3)"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.split()) == (3, ["taken", "apart"])


def test_what_was_registered_runs_before_and_threads_that_are_no_daemons_end() -> None:
    body = (
        "atexit.register(print, 'registered'); run.finalizer = weakref.finalize(kept, print, 'finalized'); "
        "threading.Timer(0.2, print, ['thread']).start(); return 0"
    )
    assert ended(body) == (0, ["thread", "finalized", "registered"], "")


def test_an_error_is_printed_and_an_asked_exit_keeps_its_status() -> None:
    status, output, errors = ended("raise ValueError('why')")
    assert (status, output) == (1, [])
    assert "ValueError: why" in errors
    assert ended("sys.exit(2)") == (2, [], "")
    assert ended("sys.exit('a text')") == (1, [], "a text\n")
