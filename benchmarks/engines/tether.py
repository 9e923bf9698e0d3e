"""Runs one program, and ends it with all that it started when this process's standard input ends.

Whoever starts it holds the other end of that pipe: however the holder dies, nothing is left running.
`python tether.py COMMAND …`. Must not know what the program is.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

LOOK_S = 0.1
GRACE_S = 10.0
"""From the request to end to the end by force."""


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: os.close(0))
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    known: set[psutil.Process] = set()
    while child.poll() is None and _is_held():
        known |= _below()  # again and again: an orphan leaves the tree, and is found by identity
    _end(child.pid, known | _below())
    return child.wait()


def _is_held() -> bool:
    """Whether standard input is still open, after a short wait."""
    try:
        ready, _, _ = select.select([0], [], [], LOOK_S)
        return not ready or bool(os.read(0, 1024))
    except OSError:
        return False


def _below() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(group: int, left: set[psutil.Process]) -> None:
    """Ask the group to end, then end by force what is left of it and of what left it."""
    for process in left:
        with suppress(psutil.Error):
            process.resume()  # a stopped process would not hear that it shall end
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
    until_s = time.monotonic() + GRACE_S
    while any(map(_is_alive, left)) and time.monotonic() < until_s:
        time.sleep(LOOK_S / 2)
    for process in left:
        with suppress(psutil.Error):
            process.kill()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


if __name__ == "__main__":
    raise SystemExit(main())
