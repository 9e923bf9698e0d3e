"""Loads the compiled kernels (`engine/kernels`, C++), or says why they are not there.

Owns the library's handle and its team of threads. Must not know what the kernels compute: whoever calls one
declares its arguments (`Library.function`).
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_DIRECTORY = Path(__file__).parent.parent / "kernels"
_FILE_NAME = "libheadrace.so"


class KernelsMissing(Exception):
    """The kernels cannot be used; the message says why and what to do."""


class Library:
    """The compiled kernels."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.built_from: str = self.function("headrace_sources", [], ctypes.c_char_p)().decode()
        """Names the sources it was compiled from."""

    def function(self, name: str, arguments: Sequence[Any], result: Any = None) -> Callable[..., Any]:
        """Return the C function `name`. Raises KernelsMissing where the library has none of that name."""
        try:
            # A handle of its own per declaration: two declarations do not change each other's arguments.
            function = self._library[name]
        except AttributeError as error:
            raise KernelsMissing(f"the compiled kernels have no {name}; build them again") from error
        function.argtypes = list(arguments)
        function.restype = result
        return function

    @property
    def isa(self) -> str:
        """The instructions in use: `avx512-vnni`, `avx2` or `portable`."""
        name: bytes = self.function("headrace_isa", [], ctypes.c_char_p)()
        return name.decode()

    def limit_isa(self, level: int) -> None:
        """Use no more than 0 portable, 1 AVX2, 2 AVX-512 VNNI from now on, in this process (for tests)."""
        self.function("headrace_limit_isa", [ctypes.c_int])(level)

    def start_team(self, num_threads: int) -> Team:
        """Start the threads of an engine's steps, the caller included. Raises OSError."""
        return Team(self, num_threads)


class Team:
    """The threads of one engine's steps (`kernels/team.h`). One caller at a time."""

    def __init__(self, library: Library, num_threads: int) -> None:
        start = library.function("headrace_team_start", [ctypes.c_int], ctypes.c_void_p)
        self._stop = library.function("headrace_team_stop", [ctypes.c_void_p])
        self.num_threads = num_threads
        self.handle: int | None = start(num_threads)
        """The C++ object, for calls of the library."""
        if self.handle is None:
            raise OSError(f"cannot start {num_threads} threads; set num_threads to fewer")

    def stop(self) -> None:
        """End the threads. The handle is invalid afterwards."""
        handle, self.handle = self.handle, None
        if handle is not None:
            self._stop(handle)

    def __del__(self) -> None:
        if getattr(self, "handle", None) is not None:
            self.stop()


def load_kernels(directory: Path = _DIRECTORY) -> Library:
    """Load the compiled kernels. Raises KernelsMissing."""
    path = directory / _FILE_NAME
    if not path.exists():
        raise KernelsMissing("no compiled kernels: headrace was installed without a C++ compiler")
    try:
        library = Library(ctypes.CDLL(str(path)))
    except OSError as error:
        raise KernelsMissing(f"the compiled kernels cannot be loaded: {error}") from error
    expected = sources_digest(directory)
    if expected not in ("", library.built_from):
        raise KernelsMissing("the compiled kernels are older than their sources: run `make kernels`")
    return library


def sources_digest(directory: Path) -> str:
    """Names the sources in `directory` as setup.py does; empty where there are none (an installed wheel)."""
    paths = [path for path in directory.iterdir() if path.suffix in (".cpp", ".h")]
    if not paths:
        return ""
    hashed = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        hashed.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return hashed.hexdigest()[:16]
