"""Why another process failed, read back from the log that it shared with us."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.engine.last_words import LogMark

TRACEBACK = b"""(Worker-0 pid=7) ERROR 11-22 11:48:54 [executor.py:953] Traceback (most recent call last):
(Worker-0 pid=7) ERROR 11-22 11:48:54 [executor.py:953]   File "a.py", line 1, in f
(Worker-0 pid=7) ERROR 11-22 11:48:54 [executor.py:953] ValueError: too little memory (1 GiB)
(Core pid=6) ERROR 11-22 11:48:59 [core.py:1510] Exception: a worker failed
RuntimeError: Engine core initialization failed
"""


def test_the_first_error_since_the_mark_is_the_cause(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, b"KeyError: of an earlier start\n")
        mark = LogMark(fd)
        assert mark.first_error() == ""
        os.write(fd, b"INFO: no error here\n" + TRACEBACK)
        assert mark.first_error() == "ValueError: too little memory (1 GiB)"
    finally:
        os.close(fd)


def test_a_plain_traceback_is_understood_and_a_log_that_is_no_file_says_nothing(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    mark = LogMark(fd)
    os.write(fd, b"Traceback (most recent call last):\ntorch.OutOfMemoryError: tried 2 GiB\n")
    assert mark.first_error() == "torch.OutOfMemoryError: tried 2 GiB"
    os.close(fd)
    assert mark.first_error() == ""
    reader, writer = os.pipe()
    try:
        pipe = LogMark(writer)
        os.write(writer, b"ValueError: x\n")
        assert pipe.first_error() == ""
    finally:
        os.close(reader)
        os.close(writer)
