"""One JSON line per request, written by a thread. Never a prompt, never an answer, never a key.

Owns that thread, so that a full pipe or a slow disk delays no stream; bounded: beyond the bound lines are
dropped, and the next line that fits says how many. Must not know what the lines mean.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from pathlib import Path
from typing import Any, Protocol

import msgspec

MAX_WAITING_LINES = 8192
GATHER_S = 0.05
"""The thread writes what gathered in this time, so that a line costs its request no thread switch."""


class LineLog(Protocol):
    """Takes one line of named fields: a mapping, or a Struct."""

    def write(self, fields: dict[str, Any]) -> None: ...


class LineSink(Protocol):
    """Where whole lines go. Raises OSError or ValueError when they cannot."""

    def write(self, data: bytes, /) -> object: ...

    def flush(self) -> object: ...


class RotatingFile:
    """A file of mode 0600 that is renamed to `PATH.1`, in place of the last such one, before it grows beyond
    `max_bytes`: at most twice that is kept. Opened for each write, so that others may move it away, too."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes

    def write(self, data: bytes, /) -> None:
        """Append. Raises OSError."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size and size + len(data) > self._max_bytes:
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write(data)

    def flush(self) -> None:
        """Nothing is kept back."""


class BackgroundLog:
    """Writes lines to `sink` in the background, until closed. What cannot be written (a full disk) is counted
    as dropped, and later lines are tried. `stops_at_end`: not once the sink is closed, or nobody reads it."""

    def __init__(self, sink: LineSink, name: str, *, stops_at_end: bool = True) -> None:
        self._sink = sink
        self._stops_at_end = stops_at_end
        self._encode = msgspec.json.Encoder().encode
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self.num_dropped = 0
        self._num_told = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def write(self, fields: dict[str, Any] | msgspec.Struct) -> None:
        """Queue one line. Never blocks."""
        if self._lines.qsize() >= MAX_WAITING_LINES:
            self.num_dropped += 1
            return
        line = self._encode(fields)
        if self.num_dropped != self._num_told:
            line = b'%b,"dropped_lines":%d}' % (line[:-1], self.num_dropped - self._num_told)
            self._num_told = self.num_dropped
        self._lines.put(line + b"\n")

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what is queued, for at most `timeout_s`."""
        self._closing.set()
        self._lines.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        is_open = True
        while is_open:
            lines = [self._lines.get()]
            self._closing.wait(GATHER_S)
            with contextlib.suppress(queue.Empty):
                while len(lines) <= MAX_WAITING_LINES:
                    lines.append(self._lines.get_nowait())
            is_open = None not in lines
            whole = [line for line in lines if line is not None]
            try:
                self._sink.write(b"".join(whole))
                self._sink.flush()
            except (OSError, ValueError) as error:
                self.num_dropped += len(whole)
                is_over = not isinstance(error, OSError) or isinstance(error, BrokenPipeError)
                if self._stops_at_end and is_over:
                    return  # nobody reads any more; the bound keeps the queue small
