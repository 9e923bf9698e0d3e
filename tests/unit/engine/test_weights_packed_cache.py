"""The packed cache: packs once for all, and serves without itself wherever it cannot."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from headrace.engine.weights import packed_cache
from headrace.engine.weights.packed_cache import MAX_FILES, PackedCache, packed_name, read_ahead_all
from headrace.engine.weights.packed_file import RawTensor
from headrace.engine.weights.packed_tensors import from_raw, to_raw

NAME = packed_name("/models/tiny.gguf", "int8")


class Rig:
    """A cache that counts how often weights were packed, and keeps what it said."""

    def __init__(self, directory: Path, wait_limit_s: float = 10.0) -> None:
        self.directory = directory
        self.lines: list[str] = []
        self.phases: list[str] = []
        self.num_packed = 0
        self._cache = PackedCache(directory, self.lines.append, wait_limit_s)

    @property
    def path(self) -> Path:
        return self.directory / NAME

    def load(self, version: str = "1", name: str = NAME) -> torch.Tensor:
        return from_raw(self._cache.load(name, {"version": version}, self._pack, self.phases.append))["a"]

    def _pack(self) -> dict[str, RawTensor]:
        self.num_packed += 1
        return to_raw({"a": torch.arange(1000)})


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "state" / "packed")


def test_what_was_packed_once_is_mapped_from_then_on(rig: Rig) -> None:
    assert torch.equal(rig.load(), torch.arange(1000))
    assert rig.phases == ["mapping packed weights", "packing weights", "writing packed weights"]
    assert torch.equal(rig.load(), torch.arange(1000))
    assert rig.num_packed == 1
    assert rig.lines == []
    assert oct(rig.path.stat().st_mode) == "0o100600"
    # The parent is the state directory, which must be private for other reasons.
    assert {oct(path.stat().st_mode) for path in (rig.directory, rig.directory.parent)} == {"0o40700"}


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign", "directory"])
def test_a_damaged_file_is_replaced_and_one_line_says_why(rig: Rig, damage: str) -> None:
    rig.load()
    data = rig.path.read_bytes()
    if damage == "directory":
        rig.path.unlink()
        rig.path.mkdir()
    else:
        flipped = data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
        changed = {"cut": data[:-1], "flip": flipped, "empty": b"", "foreign": b"GGUF" * 2000}[damage]
        rig.path.write_bytes(changed)
    assert torch.equal(rig.load(), torch.arange(1000))
    assert rig.num_packed == 2
    assert len(rig.lines) == (2 if damage == "directory" else 1)
    assert "are not used" in rig.lines[0]
    if damage != "directory":  # which is not ours to remove
        assert rig.path.read_bytes() == data


def test_another_version_replaces_the_file(rig: Rig) -> None:
    first = rig.load("1")
    rig.load("2")
    rig.load("2")
    assert rig.num_packed == 2
    assert [path.name for path in rig.directory.iterdir() if not path.name.startswith(".")] == [NAME]
    assert torch.equal(first, torch.arange(1000))  # who has the old one mapped keeps it


def test_a_directory_that_cannot_be_used_is_said_once_and_weights_are_served(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        rig = Rig(directory)
        assert torch.equal(rig.load(), torch.arange(1000))
        assert len(rig.lines) == 1
        assert "are not kept in" in rig.lines[0]
    (tmp_path / "open").mkdir(mode=0o700)
    (tmp_path / "open").chmod(0o777)
    rig = Rig(tmp_path / "open")
    assert torch.equal(rig.load(), torch.arange(1000))
    assert "others may write there" in rig.lines[0]
    assert list((tmp_path / "open").iterdir()) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(rig: Rig, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((Path, call) if call == "replace" else (os, call)), full)
    assert torch.equal(rig.load(), torch.arange(1000))
    assert rig.lines == [f"packed weights are not kept in {rig.path}: No space left on device"]
    assert [path.name for path in rig.directory.iterdir()] == [f".{NAME}.lock"]


def test_a_disk_is_not_filled_to_the_brim(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "_SPARE_BYTES", 1 << 60)
    assert torch.equal(rig.load(), torch.arange(1000))
    assert "MiB would be left free" in rig.lines[0]


def test_the_directory_keeps_what_was_used_last(rig: Rig) -> None:
    names = [packed_name(f"/models/{index}.gguf", "int8") for index in range(MAX_FILES + 3)]
    for age, name in enumerate(names[:MAX_FILES]):
        rig.load(name=name)
        os.utime(rig.directory / name, (1e9 + age, 1e9 + age))
    rig.load(name=names[0])  # used again
    for name in names[MAX_FILES:]:
        rig.load(name=name)
    kept = {path.name for path in rig.directory.iterdir() if not path.name.startswith(".")}
    assert kept == {names[0], *names[4:]}
    assert len(list(rig.directory.glob(".*.lock"))) == MAX_FILES


def test_an_engine_that_comes_second_waits_and_shares(rig: Rig) -> None:
    rig.directory.mkdir(parents=True)
    with (rig.directory / f".{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = Rig(rig.directory)
        waiting = threading.Event()
        second.phases = Phases(waiting)
        thread = threading.Thread(target=second.load)
        thread.start()
        assert waiting.wait(10)
        rig._cache._write(rig.path, {"version": "1"}, rig._pack())
    thread.join(10)
    assert not thread.is_alive()
    assert (rig.num_packed, second.num_packed) == (1, 0)


class Phases(list[str]):
    """Phases that tell when the wait for the lock begins."""

    def __init__(self, waiting: threading.Event) -> None:
        super().__init__()
        self._waiting = waiting

    def append(self, phase: str) -> None:
        super().append(phase)
        if phase.startswith("waiting"):
            self._waiting.set()


def test_a_lock_that_does_not_come_free_costs_a_limited_wait(tmp_path: Path) -> None:
    rig = Rig(tmp_path, wait_limit_s=0.05)
    with (tmp_path / f".{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert torch.equal(rig.load(), torch.arange(1000))
    assert rig.num_packed == 1
    assert "another engine has held its lock for 0.05 s" in rig.lines[0]
    assert not rig.path.exists()


@pytest.mark.slow
def test_a_writer_that_dies_leaves_nothing_that_is_trusted(rig: Rig) -> None:
    program = """
import os, sys, signal
from pathlib import Path
from headrace.engine.weights.packed_cache import PackedCache
from headrace.engine.weights.packed_file import RawTensor
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
cache = PackedCache(Path(sys.argv[1]), print)
cache.load(sys.argv[2], {"version": "1"}, lambda: {"a": RawTensor("int8", (3,), memoryview(b"abc"))}, print)
"""
    source = str(Path(packed_cache.__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": source}
    command = [sys.executable, "-c", program, str(rig.directory), NAME]
    done = subprocess.run(command, env=environment, timeout=60, check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert len(list(rig.directory.glob(".*.part"))) == 1
    assert torch.equal(rig.load(), torch.arange(1000))
    assert (rig.num_packed, rig.lines) == (1, [])
    assert sorted(path.name for path in rig.directory.iterdir()) == [f".{NAME}.lock", NAME]


@pytest.mark.slow
def test_engines_that_map_the_same_file_share_one_copy_in_memory(tmp_path: Path) -> None:
    size = 32 << 20
    tensors = to_raw({"a": torch.full((size,), 7, dtype=torch.uint8)})
    PackedCache(tmp_path, print).load(NAME, {}, lambda: tensors, lambda _phase: None)
    program = """
import sys
from pathlib import Path
from headrace.engine.weights.packed_file import map_packed
tensors = map_packed(Path(sys.argv[1]), {})
print("mapped", flush=True)
sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(packed_cache.__file__).parents[3])}
    command = [sys.executable, "-c", program, str(tmp_path / NAME)]
    with ExitStack() as stack:
        engines = []
        for _ in range(2):
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe)
            engines.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in engines:
            assert process.stdout is not None
            assert process.stdout.readline() == b"mapped\n"
        for process in engines:
            memory = mapping_bytes(process.pid, NAME)
            assert memory["Rss"] >= size
            assert memory["Pss"] < 0.6 * size, "each pays for half"
            assert memory["Private_Dirty"] == 0


def mapping_bytes(pid: int, name: str) -> dict[str, int]:
    """What a process's mappings of a file take, by kind."""
    kinds: dict[str, int] = {}
    is_wanted = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_wanted = line.endswith(name)
        elif is_wanted and words[-1] == "kB":
            kinds[words[0][:-1]] = kinds.get(words[0][:-1], 0) + int(words[1]) * 1024
    return kinds


def test_reading_ahead_needs_no_directory_and_touches_only_the_models_files(tmp_path: Path) -> None:
    read_ahead_all(tmp_path / "none", "/models/tiny.gguf")
    (tmp_path / NAME).mkdir()
    (tmp_path / packed_name("/models/tiny.gguf", "float32")).symlink_to("/dev/zero")
    read_ahead_all(tmp_path, "/models/tiny.gguf")


def test_a_files_name_tells_model_and_arithmetic_apart_and_stays_in_its_directory() -> None:
    names = {packed_name(path, kind) for path in ("/a/m.gguf", "/b/m.gguf") for kind in ("int8", "bfloat16")}
    assert len(names) == 4
    for path in ("/a/../../x", "/a/..", "/", "/a/\udcff\n", "/a/" + "x" * 300):
        name = packed_name(path, "int8")
        assert Path(name).name == name
        assert not name.startswith(".")
        assert len(name) < 100
