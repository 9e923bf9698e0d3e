"""What a host says to the controller's launcher, as msgpack inside Ray's own messages, never pickled.

Must not know: Ray.
"""

from __future__ import annotations

from headrace.api.messages import LauncherEvent, ProcessState
from headrace.api.messages.base import Record


class HostReport(Record, frozen=True):
    """What a host is, and what it holds."""

    version: str
    """Of headrace."""
    node_id: str
    address: str
    """The node's address in the cluster."""
    run_dir: str
    sequence: int
    """Number of the last event that `processes` contains."""
    processes: list[ProcessState]
    error: str = ""
    """Why it cannot hold anything."""
    last_output: str = ""
    """Of the process that ended last."""
    num_failures: int = 0
    """Processes that ended with another code than 0."""


class HostEvents(Record, frozen=True):
    """What happened after the event whose number was given; empty: nothing within the time."""

    sequence: int
    """Number of the last one of `events`."""
    events: list[LauncherEvent]
