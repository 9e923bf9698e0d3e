"""The run directory: where one running system keeps its sockets, files and logs. Mode 0700, gone at the end.

Owns its place, its lock (one system per name) and its removal.
Must not know: who puts what into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from headrace.errors import HeadraceError

SYSTEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}")
CONTROLLER_LOCK = "controller.lock"
MAX_RUN_DIRECTORY_BYTES = 70
"""A UNIX socket's path has at most 107 bytes; our longest file name, with HAProxy's suffix, takes 37."""
_CREATE_ATTEMPTS = 20


class RunDirectoryError(HeadraceError):
    """The run directory cannot be used: another system has it, or its place is not safe."""


def default_run_directory(name: str) -> Path:
    """Return where the system called `name` keeps its run directory: below XDG_RUNTIME_DIR, or below the
    directory for temporary files if that is not set or too long for UNIX sockets. Creates nothing."""
    if not SYSTEM_NAME.fullmatch(name):
        raise RunDirectoryError(
            f"name {name!r}: use 1 to 41 letters, digits, _ or -, and begin with a letter or digit"
        )
    parents = [Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}", Path(f"/tmp/headrace-{os.getuid()}")]  # noqa: S108, made 0700
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.path.isdir(runtime):
        parents.insert(0, Path(runtime) / "headrace")
    candidates = [parent / name for parent in parents]
    return next((path for path in candidates if is_short_enough(path)), candidates[0])


@contextlib.contextmanager
def only_controller(run_directory: Path) -> Iterator[None]:
    """Hold what only one controller of a run directory may hold. Raises RunDirectoryError if one has it."""
    path = run_directory / CONTROLLER_LOCK
    lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirectoryError(f"another controller of {run_directory} runs; there can be one") from None
        yield
    finally:
        os.close(lock_fd)


def is_short_enough(path: Path) -> bool:
    """Whether UNIX sockets in `path` can have their names."""
    return len(os.fsencode(path)) <= MAX_RUN_DIRECTORY_BYTES


class RunDirectory:
    """A locked run directory. The lock is on the directory itself, so that no lock file outlives it."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    def __repr__(self) -> str:
        return f"RunDirectory({self.path})"

    @classmethod
    def create(cls, path: Path) -> RunDirectory:
        """Make and lock `path`; what a dead system left in it is removed.

        Raises RunDirectoryError if a live system has it, or if others could write to it.
        """
        check_length(path)
        for _ in range(_CREATE_ATTEMPTS):
            # A system that ends between our steps removes what we just made: then simply begin again.
            with contextlib.suppress(FileNotFoundError):
                make_private_directory(path.parent)
                make_private_directory(path)
                lock_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
                if _lock(lock_fd, path):
                    empty_directory(path)
                    (path / "logs").mkdir(mode=0o700)
                    return cls(path, lock_fd)
        raise RunDirectoryError(f"{path}: other systems keep removing it; try again")

    def remove(self) -> None:
        """Remove the directory with everything in it, and its parent if nothing else is there."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()
        os.close(self._lock_fd)


def check_length(path: Path) -> None:
    """Raise RunDirectoryError if `path` is too long for UNIX sockets in it."""
    if not is_short_enough(path):
        raise RunDirectoryError(
            f"run directory {path} has {len(os.fsencode(path))} bytes; UNIX sockets in it allow at most "
            f"{MAX_RUN_DIRECTORY_BYTES}. Use a shorter --name, or set XDG_RUNTIME_DIR or TMPDIR "
            "to a shorter directory."
        )


def make_private_directory(path: Path) -> None:
    """Make `path` with mode 0700, or check that it is ours alone. Raises RunDirectoryError."""
    if path.parent != path and not path.parent.exists():
        raise RunDirectoryError(f"{path.parent}: no such directory; set TMPDIR or XDG_RUNTIME_DIR to one")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except FileExistsError:
        raise RunDirectoryError(f"{path} is not a directory; remove it") from None
    except PermissionError as error:
        raise RunDirectoryError(f"{path} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RunDirectoryError(
            f"{path} must be a directory that is yours alone (mode 0700); it has mode "
            f"{stat.S_IMODE(status.st_mode):04o} and owner {status.st_uid}. Remove it or set TMPDIR."
        )


def _lock(lock_fd: int, path: Path) -> bool:
    """Whether we now hold `path`. False: it was removed meanwhile. Raises if a live system holds it."""
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.fstat(lock_fd).st_ino == path.stat().st_ino
    except BlockingIOError:
        os.close(lock_fd)
        raise RunDirectoryError(
            f"a system called {path.name!r} already runs (its run directory is {path}). "
            "Stop it, or give this one another --name."
        ) from None
    except FileNotFoundError:
        same = False
    if not same:
        os.close(lock_fd)
    return same


def empty_directory(path: Path) -> None:
    """Remove everything in `path`."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
