"""The run directory of one host of a cluster: all keepers of a system that are there share it.

Owns its place, the lock that each keeper shares, and its removal by the last one.
Must not know: who puts what into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from headrace.api.run_paths import LOG_DIRECTORY
from headrace.fabric.run_directory import (
    SYSTEM_NAME,
    RunDirectoryError,
    check_length,
    empty_directory,
    is_short_enough,
    make_private_directory,
)

JOIN_LIMIT_S = 5.0
_JOIN_PAUSE_S = 0.01


def host_run_directory(system: str, address: str) -> Path:
    """Return where the host at `address` keeps the files of `system`. A host is an address: nodes that share
    one share the directory. Creates nothing. Raises RunDirectoryError."""
    if not SYSTEM_NAME.fullmatch(system):
        raise RunDirectoryError(
            f"name {system!r}: use 1 to 41 letters, digits, _ or -, and begin with a letter or digit"
        )
    name = f"ray-{system}-{sha256(address.encode()).hexdigest()[:8]}"
    return next(path for path in (parent / name for parent in _parents()) if is_short_enough(path))


def find_host_run_directory(system: str) -> Path | None:
    """Return the directory of `system` on this machine, if it has one host here. What keepers left that were
    killed is none."""
    pattern = f"ray-{system}-????????"
    found = {path for parent in _parents() for path in parent.glob(pattern) if _is_held(path)}
    return found.pop() if len(found) == 1 else None


def _parents() -> list[Path]:
    """Where it may be: the first place whose path is short enough for UNIX sockets; the last is."""
    name = f"headrace-{os.getuid()}"
    return [Path(tempfile.gettempdir()) / name, Path("/tmp") / name]  # noqa: S108, made 0700


class SharedRunDirectory:
    """A run directory with our part of its lock. Made by `join`."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    def __repr__(self) -> str:
        return f"SharedRunDirectory({self.path})"

    @classmethod
    def join(cls, path: Path) -> SharedRunDirectory:
        """Make `path`, or share it with the keepers that have it; what dead ones left in it is removed.

        Waits for one that is just removing it. Raises RunDirectoryError.
        """
        check_length(path)
        end_s = time.monotonic() + JOIN_LIMIT_S
        while time.monotonic() < end_s:
            # Whoever leaves last removes what we just made: then simply begin again.
            with contextlib.suppress(FileNotFoundError):
                make_private_directory(path.parent)
                make_private_directory(path)
                lock_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
                if _try_lock(lock_fd, fcntl.LOCK_EX) and _is_still(path, lock_fd):
                    empty_directory(path)  # nobody alive has it
                    (path / LOG_DIRECTORY).mkdir(mode=0o700)
                # Between the two locks another keeper may empty what is empty, and no more.
                if _try_lock(lock_fd, fcntl.LOCK_SH) and _is_still(path, lock_fd):
                    (path / LOG_DIRECTORY).mkdir(mode=0o700, exist_ok=True)
                    return cls(path, lock_fd)
                os.close(lock_fd)
            time.sleep(_JOIN_PAUSE_S)
        raise RunDirectoryError(f"{path}: others keep removing it for {JOIN_LIMIT_S:g} s; try again")

    def leave(self) -> None:
        """Give our part of the lock back. The last one removes the directory, and its parent if empty."""
        if _try_lock(self._lock_fd, fcntl.LOCK_EX):
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()
        os.close(self._lock_fd)


def _is_held(path: Path) -> bool:
    """Whether a living keeper shares it. One that joins at this moment tries again."""
    try:
        lock_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not _try_lock(lock_fd, fcntl.LOCK_EX)
    finally:
        os.close(lock_fd)


def _try_lock(lock_fd: int, kind: int) -> bool:
    try:
        fcntl.flock(lock_fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(path: Path, lock_fd: int) -> bool:
    return os.fstat(lock_fd).st_ino == path.stat().st_ino
