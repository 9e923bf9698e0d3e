"""The compiled kernels as Python sees them: loading, why they are absent, and their team of threads."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from headrace.engine.operations import kernels
from headrace.engine.operations.kernels import KernelsMissing, Library, Team, load_kernels, sources_digest

SOURCES = Path(kernels.__file__).parent.parent / "kernels"


@pytest.fixture
def library() -> Library:
    try:
        return load_kernels()
    except KernelsMissing as missing:
        pytest.skip(str(missing))


def counter(library: Library, team: Team) -> Callable[[int, int], np.ndarray]:
    """A function (count, rounds) that returns what the team did to `count` zeros."""
    function = library.function(
        "headrace_team_count", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    )

    def count(pieces: int, rounds: int) -> np.ndarray:
        numbers = np.zeros(max(pieces, 1), np.int32)
        function(team.handle, numbers.ctypes.data, pieces, rounds)
        return numbers[:pieces]

    return count


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler on this machine")
def test_where_there_is_a_compiler_the_kernels_are_there_and_name_their_instructions() -> None:
    assert load_kernels().isa in ("avx512-vnni", "avx2", "portable")


def test_without_kernels_the_reason_is_given(tmp_path: Path) -> None:
    with pytest.raises(KernelsMissing, match="installed without a C\\+\\+ compiler"):
        load_kernels(tmp_path)


def test_a_file_that_is_no_library_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "libheadrace.so").write_bytes(b"\x7fELF and then nothing")
    with pytest.raises(KernelsMissing, match="cannot be loaded"):
        load_kernels(tmp_path)


def test_kernels_older_than_their_sources_are_not_used(tmp_path: Path) -> None:
    for path in SOURCES.iterdir():
        shutil.copy(path, tmp_path)
    with (tmp_path / "team.h").open("a") as header:
        header.write("// changed\n")
    with pytest.raises(KernelsMissing, match="run `make kernels`"):
        load_kernels(tmp_path)


def test_an_installed_library_without_sources_is_believed(tmp_path: Path) -> None:
    shutil.copy(SOURCES / "libheadrace.so", tmp_path)
    assert sources_digest(tmp_path) == ""
    assert load_kernels(tmp_path).isa


def test_a_function_that_the_library_lacks_is_named(library: Library) -> None:
    with pytest.raises(KernelsMissing, match="no headrace_of_tomorrow"):
        library.function("headrace_of_tomorrow", [])


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_piece_is_computed_exactly_once(library: Library, num_threads: int) -> None:
    team = library.start_team(num_threads)
    count = counter(library, team)
    for pieces in (0, 1, 2, 7, 1000):
        assert (count(pieces, 50) == 50).all()
    team.stop()


@pytest.mark.slow
def test_more_threads_than_cores_lose_no_piece_and_come_to_an_end(library: Library) -> None:
    team = library.start_team(16)
    assert (counter(library, team)(100, 3000) == 3000).all()
    team.stop()


def test_a_forked_child_computes_alone(library: Library) -> None:
    team = library.start_team(3)
    count = counter(library, team)
    count(10, 10)
    child = os.fork()
    if child == 0:
        is_right = bool((count(100, 10) == 10).all())
        team.stop()
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (count(10, 10) == 10).all()
    team.stop()


def test_a_stopped_team_stops_once(library: Library) -> None:
    team = library.start_team(2)
    team.stop()
    team.stop()
    assert team.handle is None


@pytest.mark.slow
def test_a_build_without_a_compiler_goes_on_without_the_kernels(tmp_path: Path) -> None:
    root = SOURCES.parents[3]
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(SOURCES, tmp_path / SOURCES.relative_to(root), ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "src/headrace/__init__.py").write_text('__version__ = "0"\n')
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    built = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert built.returncode == 0, built.stderr
    with pytest.raises(KernelsMissing):
        load_kernels(tmp_path / SOURCES.relative_to(root))
