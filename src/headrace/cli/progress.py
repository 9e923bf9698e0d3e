"""What `headrace up` shows: a live table in a terminal, plain lines elsewhere.

Owns the words and when they are printed. Must not know where statuses come from.
"""

from __future__ import annotations

import sys
import time
from typing import Protocol

from headrace.api.messages import ReplicaStatus, SystemStatus
from headrace.units import format_seconds


class Progress(Protocol):
    """Shows how a system gets ready."""

    def show(self, status: SystemStatus) -> None: ...

    def ready(self, status: SystemStatus) -> None: ...

    def notice(self, text: str) -> None: ...

    def close(self) -> None: ...


def make_progress(began_s: float, needs_key: bool = False) -> Progress:
    """Return what suits stderr. began_s: when the command began, on the monotonic clock. needs_key: requests
    need an API key."""
    kind = LiveProgress if sys.stderr.isatty() else PlainProgress
    return kind(began_s, needs_key)


def describe_replica(replica: ReplicaStatus) -> str:
    """Return a replica's state in words, without its duration."""
    if replica.state == "starting":
        return f"starting: {replica.phase}" if replica.phase else "starting"
    if replica.state in ("failed", "pending", "lost") and replica.last_error:
        return f"{replica.state}: {replica.last_error}"
    return replica.state


def greeting(status: SystemStatus, elapsed_s: float, needs_key: bool = False) -> str:
    """Return what is said once requests are served."""
    name = status.endpoints[0].name
    message = '{"role": "user", "content": "What is the capital of Italy?"}'
    body = f'{{"model": "{name}", "temperature": 0, "messages": [{message}]}}'
    key = '-H "authorization: Bearer $HEADRACE_API_KEY" ' if needs_key else ""
    others = [gateway.url for gateway in status.gateways if gateway.url not in ("", status.url)]
    also = "".join(f"also:  {url}\n" for url in others)
    return (
        f"ready: {status.url} after {format_seconds(elapsed_s)}\n{also}"
        f"try:   curl -s {status.url}/chat/completions {key}-H 'content-type: application/json' -d '{body}'\n"
        "look:  headrace status    stop: Ctrl-C"
    )


class PlainProgress:
    """A line for every change, for logs and pipes."""

    def __init__(self, began_s: float, needs_key: bool = False) -> None:
        self._began_s = began_s
        self._needs_key = needs_key
        self._said: dict[str, str] = {}

    def show(self, status: SystemStatus) -> None:
        for replica in status.replicas:
            words = describe_replica(replica)
            if self._said.get(replica.replica_id) != words:
                self._said[replica.replica_id] = words
                self.notice(f"{replica.replica_id} {words}")

    def ready(self, status: SystemStatus) -> None:
        print(greeting(status, time.monotonic() - self._began_s, self._needs_key), flush=True)

    def notice(self, text: str) -> None:
        elapsed_s = time.monotonic() - self._began_s
        print(f"{elapsed_s:6.1f} s  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class LiveProgress:
    """One line per replica, drawn over and over. Without rich's refresh thread: the process that holds
    children must have one thread only."""

    def __init__(self, began_s: float, needs_key: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live

        self._began_s = began_s
        self._needs_key = needs_key
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._is_live = False

    def show(self, status: SystemStatus) -> None:
        from rich.table import Table
        from rich.text import Text

        if not self._is_live:
            self._live.start()
            self._is_live = True
        colours = {"ready": "green", "failed": "red", "lost": "red"}
        table = Table.grid(padding=(0, 2))
        for replica in status.replicas:
            words = Text(describe_replica(replica), style=colours.get(replica.state, "yellow"))
            table.add_row(Text(replica.replica_id), words, Text(format_seconds(replica.since_s), style="dim"))
        self._live.update(table, refresh=True)

    def ready(self, status: SystemStatus) -> None:
        self.close()
        print(greeting(status, time.monotonic() - self._began_s, self._needs_key), flush=True)

    def notice(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._is_live:
            self._live.stop()
            self._is_live = False
