"""The directory of packed weights: one file per model and arithmetic, shared by all engines of the machine.

Owns names, locks, replacement and the bound on files. Weights are served without it wherever it fails.
Must not know the format of a file (`packed_file`), models or arithmetic. No torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from headrace.engine.weights.packed_file import (
    PackedFileError,
    RawTensor,
    map_packed,
    packed_bytes,
    read_ahead,
    write_packed,
)

MAX_FILES = 8
"""Least recently used ones go first."""
WAIT_LIMIT_S = 60.0
"""Longest wait for another engine that packs the same weights; after it, an engine packs for itself."""
_POLL_S = 0.02
_SPARE_BYTES = 512 << 20
"""Left free on the disk: filling it would harm others more than packing again costs."""
_ABANDONED_S = 3600.0
_SUFFIX = ".packed"

RawTensors = dict[str, RawTensor]
Say = Callable[[str], None]


def packed_name(model: str, arithmetic: str) -> str:
    """File name for the model at path `model` in `arithmetic`; newer versions of either replace the file."""
    digest = xxhash.xxh3_64_hexdigest(f"{model}\0{arithmetic}".encode("utf-8", "surrogateescape"))
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).stem)[:60].lstrip(".")
    return f"{stem}-{digest}{_SUFFIX}"


def read_ahead_all(directory: Path, model: str) -> None:
    """Bring what may be wanted of `model` into the page cache meanwhile: every arithmetic's file of its
    name."""
    stem = packed_name(model, "").rpartition("-")[0]
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if path.name.endswith(_SUFFIX) and path.name.rpartition("-")[0] == stem:
                read_ahead(path)


class PackedCache:
    """Gives packed weights: mapped from the file where it is good, else packed now and written for the
    next."""

    def __init__(self, directory: Path, say: Say, wait_limit_s: float = WAIT_LIMIT_S) -> None:
        """`say` takes a line for the log: why a file was not used or could not be written."""
        self._directory = directory
        self._say = say
        self._wait_limit_s = wait_limit_s

    def __repr__(self) -> str:
        return f"PackedCache({self._directory})"

    def load(
        self,
        name: str,
        identity: dict[str, Any],
        pack: Callable[[], RawTensors],
        on_phase: Callable[[str], None],
    ) -> RawTensors:
        """Return the tensors of the file `name`, if it is whole and of `identity`; else what `pack` gives,
        which is written there. Raises what `pack` raises; trouble with the directory is said and costs only
        time.
        """
        path = self._directory / name
        on_phase("mapping packed weights")
        try:
            make_private_directory(self._directory)
        except OSError as error:
            self._say(f"packed weights are not kept in {self._directory}: {error.strerror or error}")
            return self._pack(pack, on_phase)
        mapped = self._map(path, identity)
        if mapped is not None:
            return mapped
        try:
            with self._locked(path, on_phase):
                return self._pack_and_keep(path, identity, pack, on_phase)
        except _NotLocked as error:
            self._say(f"packed weights are not kept in {path}: {error}")
            return self._pack(pack, on_phase)

    def _pack_and_keep(
        self,
        path: Path,
        identity: dict[str, Any],
        pack: Callable[[], RawTensors],
        on_phase: Callable[[str], None],
    ) -> RawTensors:
        """With the lock: look once more, else pack, write, and map what was written, so that all share it."""
        if path.exists() and (mapped := self._map(path, identity, is_quiet=True)) is not None:
            return mapped
        tensors = self._pack(pack, on_phase)
        on_phase("writing packed weights")
        try:
            self._write(path, identity, tensors)
            self._remove_old(path)
        except OSError as error:
            self._say(f"packed weights are not kept in {path}: {error.strerror or error}")
            return tensors
        return self._map(path, identity) or tensors

    def _pack(self, pack: Callable[[], RawTensors], on_phase: Callable[[str], None]) -> RawTensors:
        on_phase("packing weights")
        return pack()

    def _map(self, path: Path, identity: dict[str, Any], is_quiet: bool = False) -> RawTensors | None:
        try:
            tensors = map_packed(path, identity)
            os.utime(path, follow_symlinks=False)  # what is used is kept longest
        except FileNotFoundError:
            return None
        except (PackedFileError, OSError) as error:
            if not is_quiet:
                reason = getattr(error, "strerror", None) or error
                self._say(f"packed weights {path} are not used: {reason}; they are packed again")
            return None
        return tensors

    def _write(self, path: Path, identity: dict[str, Any], tensors: RawTensors) -> None:
        """Replace `path` as a whole. With the lock, so any other part file of this name is a dead
        writer's."""
        for dead in self._directory.glob(f".{path.name}.*.part"):
            dead.unlink(missing_ok=True)
        free = os.statvfs(self._directory)
        if free.f_bavail * free.f_frsize < packed_bytes(tensors) + _SPARE_BYTES:
            raise OSError(0, f"less than {_SPARE_BYTES >> 20} MiB would be left free on its disk")
        part = self._directory / f".{path.name}.{os.getpid()}.part"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with open(os.open(part, flags, 0o600), "wb") as file:
                write_packed(file, identity, tensors)
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _remove_old(self, kept: Path) -> None:
        """Keep the MAX_FILES that were used last. Who has a removed file mapped keeps it until it ends."""
        used: list[tuple[float, Path]] = []
        now_s = time.time()
        for path in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                changed_s = path.lstat().st_mtime
                if path.name.endswith(_SUFFIX) and path != kept:
                    used.append((changed_s, path))
                elif path.name.endswith(".part") and now_s - changed_s > _ABANDONED_S:
                    path.unlink()
        for _, path in sorted(used, reverse=True)[MAX_FILES - 1 :]:
            path.unlink(missing_ok=True)
            _lock_path(path).unlink(missing_ok=True)

    @contextmanager
    def _locked(self, path: Path, on_phase: Callable[[str], None]) -> Iterator[None]:
        """Hold the file's lock: it ends with this process, however that ends. Raises _NotLocked.

        A lock file that was removed meanwhile lets two engines write at once: each its own part file, and
        the last to finish replaces the other's.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(_lock_path(path), flags, 0o600)
        except OSError as error:
            raise _NotLocked(error.strerror or str(error)) from None
        try:
            self._lock(descriptor, on_phase)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int, on_phase: Callable[[str], None]) -> None:
        deadline_s = time.monotonic() + self._wait_limit_s
        is_told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise _NotLocked(
                        f"another engine has held its lock for {self._wait_limit_s:g} s"
                    ) from None
            except OSError as error:
                raise _NotLocked(error.strerror or str(error)) from None
            else:
                return
            if not is_told:
                is_told = True
                on_phase("waiting for another engine that packs the same weights")
            time.sleep(_POLL_S)


class _NotLocked(Exception):
    """The lock could not be had; the message says why."""


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def make_private_directory(directory: Path) -> None:
    """Make `directory` with mode 0700 if it is missing. Raises OSError if it is not this user's alone: who
    may write there decides what the model answers."""
    directory.parent.mkdir(
        mode=0o700, parents=True, exist_ok=True
    )  # perhaps the state directory, which is private
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise PermissionError(0, "others may write there; chmod 700, or another directory")
