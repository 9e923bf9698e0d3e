"""What passes between the controller's launcher, host actors and keepers, beside what every launcher says.
As msgpack; inside Ray's own messages as bytes, never pickled.

Must not know: Ray.
"""

from __future__ import annotations

from headrace.api.messages import LauncherCommand, LauncherEvent, ProcessState
from headrace.api.messages.base import Message, Record

CONTROLLER_GROUP = "controller"


class Membership(Record, frozen=True):
    """What makes a host one of a system's. Whoever has it is a host: it is in no environment and no argv."""

    identity: bytes
    """PEM of the key and certificate that all its hosts share."""
    home: str
    """Address of the controller's host, which has the gateways."""

    def __repr__(self) -> str:
        return f"Membership(identity=..., home={self.home!r})"  # whatever it gets into, logs included


class JoinSystem(Message, frozen=True):
    """Host actor to keeper, first of all: where it is, and whose."""

    membership: Membership
    address: str
    """Of the node in the cluster."""


class SetTunnels(Message, frozen=True):
    """Launcher to hosts, whenever it changes: what the tunnels of their machine are to offer and to reach.
    Names are those of `fabric.host_routes`."""

    offered: list[str]
    reached: dict[str, str]
    """Name -> address of the tunnels of the host that offers it."""


class TunnelsOpened(Message, frozen=True):
    """The tunnels of this host's machine are at `address`, and its keeper holds them; without one they cannot
    be opened. error: why, or which of them cannot be had; either is tried again."""

    address: str
    error: str = ""


HostCommand = LauncherCommand | JoinSystem | SetTunnels
HostEvent = LauncherEvent | TunnelsOpened


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
    tunnels: str = ""
    """Address of its machine's tunnels, if its keeper holds them."""


class HostEvents(Record, frozen=True):
    """What happened after the event whose number was given; empty: nothing within the time."""

    sequence: int
    """Number of the last one of `events`."""
    events: list[HostEvent]
