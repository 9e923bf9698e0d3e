"""What a controller asks of its launcher, and what comes back."""

from __future__ import annotations

from typing import Literal

from headrace.api.messages.base import Message, Record


class NodeNeeds(Record, frozen=True):
    """What a node must have free to get a process."""

    resources: dict[str, float]
    """Amount of each resource, in Ray's words: CPU, GPU, memory (bytes), or a name of the cluster's own."""
    labels: dict[str, str] = {}
    """Labels of the node, each with its value."""
    accelerator_type: str = ""
    wait_s: float = 0.0
    """After so long without such a node the next choice is tried; 0: waited for without a limit."""
    other_than: list[str] = []
    """Ids of nodes that it must not be."""
    num_parts: int = 1
    """Equal parts that it may be divided into, each for a node of its own; 1: all is on one node."""


class Place(Record, frozen=True):
    """Where a process may run: choices in the order of preference, the first that can be had."""

    choices: list[NodeNeeds]
    strategy: Literal["spread", "pack", "apart"] = "spread"
    """Among nodes that would do: the one with fewest processes of the same family, or with most; apart: one
    that has none, or it waits. Of one family are the groups whose names differ in the number at the end only,
    as an endpoint's replicas do, and all gateways."""
    avoided: dict[str, float] = {}
    """Nodes that go away by notices, by their ids, and for how many more seconds nothing is put there."""


class ProcessSpec(Record, frozen=True):
    """One process. It dies with what holds it: the supervisor, or its host on a cluster."""

    name: str
    """Unique among live processes: `router`, `haproxy`, `chat-1`."""
    argv: list[str]
    environment: dict[str, str] = {}
    log_path: str = ""
    """Where stdout and stderr go; empty: inherited."""
    stop_signal: int = 15
    place: Place | None = None
    """None: beside the controller. The local launcher has one place only, and does not look at it."""
    group: str = ""
    """Processes of one group are always on one node and share what holds them there; empty: alone."""
    files: dict[str, str] = {}
    """Files of the run directory that are written before the start unless they are there: name -> text."""
    companions: list[ProcessSpec] = []
    """Processes with hosts of their own in the same place, which is divided evenly among all of these hosts.
    They are started with this one, end with it, and the loss of one's host is the end of all. Places only."""
    is_restarted: bool = False
    """What holds it starts it again, after a growing pause, when it ends with another code than 0."""
    heartbeat_file: str = ""
    """One of `files` that it touches while it is well: what holds it kills one that does not. Empty: none."""


class ProcessState(Record, frozen=True):
    """A process that the supervisor holds, or one that ended."""

    name: str
    pid: int
    is_alive: bool
    exit_code: int | None = None
    """Negative: the signal that ended it."""
    last_output: str = ""
    """The last lines of its log, after its end."""
    node: str = ""
    """Id of the node that it is on; empty: this machine."""
    node_address: str = ""
    """Of that node, by which the cluster knows it: pids of two nodes may coincide."""


class StartProcess(Message, frozen=True):
    spec: ProcessSpec


class StopProcess(Message, frozen=True):
    """Send the stop signal; after grace_s kill the whole process group."""

    name: str
    grace_s: float


class ListProcesses(Message, frozen=True):
    pass


LauncherCommand = StartProcess | StopProcess | ListProcesses


class Processes(Message, frozen=True):
    """All live processes: the answer to ListProcesses."""

    processes: list[ProcessState]


class ProcessStarted(Message, frozen=True):
    process: ProcessState


class ProcessEnded(Message, frozen=True):
    process: ProcessState


class LauncherError(Message, frozen=True):
    name: str
    error: str


class ProcessWaiting(Message, frozen=True):
    """A process that is to be started waits for a place; repeated while it does."""

    name: str
    reason: str
    """What it waits for, and what would fit."""


class NodeState(Record, frozen=True):
    """A node of the cluster."""

    node_id: str
    address: str
    is_alive: bool = True
    total: dict[str, float] = {}
    available: dict[str, float] = {}
    labels: dict[str, str] = {}
    is_draining: bool = False
    """The cluster wants it empty, because it goes away."""
    drain_deadline_s: float = 0.0
    """When it goes, in seconds since 1970; 0: nobody said."""


class Nodes(Message, frozen=True):
    """All nodes; sent when something about them changed."""

    nodes: list[NodeState]
    own_node_id: str = ""
    """The controller's."""


LauncherEvent = Processes | ProcessStarted | ProcessEnded | LauncherError | ProcessWaiting | Nodes
