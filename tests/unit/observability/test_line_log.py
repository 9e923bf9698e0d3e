"""Lines in the background: bounded, rotated, and never in the way of a request."""

from __future__ import annotations

import json
import stat
import threading
import time
from pathlib import Path

from headrace.observability import line_log
from headrace.observability.line_log import BackgroundLog, RotatingFile


def read(path: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_in_the_file_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    log = BackgroundLog(RotatingFile(path, 1 << 20), "test")
    for number in range(100):
        log.write({"n": number})
    log.close()
    assert [line["n"] for line in read(path)] == list(range(100))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_grows_too_long_makes_room_and_at_most_two_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    file = RotatingFile(path, 100)
    for number in range(50):
        file.write(b'{"n":%d}\n' % number)
    assert {entry.name for entry in tmp_path.iterdir()} == {"x.jsonl", "x.jsonl.1"}
    assert path.stat().st_size <= 100
    kept = [line["n"] for name in ("x.jsonl.1", "x.jsonl") for line in read(tmp_path / name)]
    assert kept == list(range(kept[0], 50))


def test_a_new_process_appends(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for number in range(2):
        RotatingFile(path, 100).write(b'{"n":%d}\n' % number)
    assert [line["n"] for line in read(path)] == [0, 1]


class StuckSink:
    """A disk that hangs until it is let go, and refuses the first write."""

    def __init__(self) -> None:
        self.is_entered = threading.Event()
        self.is_free = threading.Event()
        self.data = b""
        self.num_writes = 0

    def write(self, data: bytes, /) -> None:
        self.is_entered.set()
        self.is_free.wait(10)
        self.num_writes += 1
        if self.num_writes == 1:
            raise OSError("no space left on device")
        self.data += data

    def flush(self) -> None:
        pass


def test_a_hanging_or_full_disk_costs_lines_but_no_time_and_no_memory() -> None:
    sink = StuckSink()
    log = BackgroundLog(sink, "test", stops_at_end=False)
    log.write({"n": -1})
    assert sink.is_entered.wait(5), "the line is not on its way"
    began_s = time.monotonic()
    for number in range(line_log.MAX_WAITING_LINES + 500):
        log.write({"n": number})
    assert time.monotonic() - began_s < 1.0
    assert log.num_dropped >= 500
    sink.is_free.set()
    deadline_s = time.monotonic() + 5
    while log._lines.qsize() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    log.write({"n": 7})
    log.close()
    lines = [json.loads(line) for line in sink.data.splitlines()]
    assert lines[-1]["n"] == 7
    assert lines[-1]["dropped_lines"] == log.num_dropped
