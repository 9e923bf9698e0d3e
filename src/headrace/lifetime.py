"""How a process ends: with its parent (Linux only), and without taking threads that still work along.

Must not know which processes there are.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def die_with_parent(death_signal: signal.Signals = signal.SIGKILL) -> bool:
    """Have the kernel send `death_signal` to this process when its parent ends (prctl(2), PR_SET_PDEATHSIG).

    False: the parent ended during the call. One that ended before goes unnoticed: look at what it holds open.
    Raises OSError.
    """
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    return os.getppid() == parent


def exit_whole(run: Callable[[], int]) -> NoReturn:
    """Call `run`, and end this process with the status that it returns, as sys.exit does: after threads that
    are no daemons, and whatever was registered with atexit meanwhile. But the interpreter is left whole.

    A daemon thread that returns from a library while the interpreter is taken apart is ended where it stands;
    where that library is not written in C, the whole process dies of it, by a signal (seen with llguidance).
    """
    status = 1  # of an error, which Python prints

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a full disk; closed
                stream.flush()
        os._exit(status)

    atexit.register(leave)  # first of all, so that it is called last
    try:
        status = run()
    except SystemExit as asked:
        status = asked.code if isinstance(asked.code, int) else 1
        raise
    sys.exit(status)
