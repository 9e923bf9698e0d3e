"""A process that must not outlive its parent. Linux only.

Owns the one system call for it. Must not know which processes there are.
"""

from __future__ import annotations

import ctypes
import os
import signal

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
