"""What a front reports to routers and controllers, and what it is started with."""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace.api.messages.base import Message, Record, TerminalState
from headrace.api.messages.engine import EngineLoad, EngineReady, EngineSpec, KvPlace

ReplicaState = Literal["starting", "ready", "draining", "failed", "standby"]
"""standby: everything is there, but the engine sleeps or is about to. It takes no requests until it is
woken."""


class FinishedRequest(Record, frozen=True):
    """One request's end, as its front measured it. Seconds count from the arrival at the front."""

    request_id: str
    state: TerminalState
    finish_reason: str
    tenant: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    ttft_s: float
    total_s: float
    engine_s: float = 0.0
    """Engine time measured for this request, all its choices together."""
    num_resumptions: int = 0
    """Times that one of its streams was continued in another engine, or in its own after a restart."""
    hosts: list[str] = []
    """The siblings that continued it, in order."""


class LoadReport(Message, frozen=True):
    """A replica is known because it reports, and gone when its lease ends. Sent at least every 50 ms while
    busy (to a controller every 200 ms), at once on a finish or a change of state, and every lease_s / 3 while
    idle."""

    replica_id: str
    endpoint: str
    model: str
    address: str
    """host:port of the front's HTTP server; empty until it listens."""
    pid: int
    """Two processes on different nodes may have the same: see `is_same_process`."""
    sequence: int
    """Grows by one per report of one front process."""
    lease_s: float
    state: ReplicaState
    phase: str = ""
    """While starting: what it is doing. Standby: how deep it sleeps, or why it could not wake. Ready: why it
    could not sleep, if that was asked last."""
    num_open: int = 0
    max_open: int = 0
    engine: EngineLoad | None = None
    engine_info: EngineReady | None = None
    engine_pid: int = 0
    engine_restarts: int = 0
    last_error: str = ""
    is_retryable: bool = True
    """With state failed: false when starting again cannot help (a missing model, a wrong setting)."""
    finished: list[FinishedRequest] = []
    generation: str = ""
    """Hash of the spec it was started with: the controller replaces replicas whose spec changed."""
    socket_path: str = ""
    """UNIX socket on which the front serves gateways of its own machine; empty: only `address`."""
    open_by_gateway: dict[str, int] = {}
    """Open requests by the gateway that sent them (`gateway_of` their ids); "": others. Sums to num_open."""
    open_by_tenant: dict[str, int] = {}
    """Open requests by tenant. Sums to num_open."""
    prefix_epoch: int = 0
    """Which prefix cache the next two lists change: another number means that it began anew, empty."""
    prefixes_added: list[int] = []
    """Prompt-head hashes (`policy.prompt`) that became cached since the last report on this connection; the
    first report on a connection lists all, most recently used last."""
    prefixes_removed: list[int] = []
    """Prompt-head hashes whose blocks were evicted since then."""
    speaks_h2: bool = False
    """Its listeners take HTTP/2 with prior knowledge, too."""
    peer_socket: str = ""
    """UNIX socket on which its engine takes streams that siblings cannot continue themselves; empty: none."""
    stream_class: str = ""
    """What decides an answer's tokens: replicas of one class continue each other's streams bit for bit."""
    num_guests: int = 0
    """Streams of siblings in its engine. They are part of its load, and not of num_open."""
    num_hosted: int = 0
    """Own streams that siblings' engines continue."""
    leave_by_s: float = -1.0
    """Seconds until this replica's machine goes away, by a notice; negative: no notice."""
    gateway_id: str = ""
    """Of a durable front: the gateway whose requests it takes. It has no engine, and is no replica."""
    text_class: str = ""
    """What turns texts into its token ids: a durable front's streams go to replicas of its own."""
    moved: dict[str, str] = {}
    """Of a durable front: open requests whose place changed lately, and the replica that has them now."""
    node_address: str = ""
    """Of the node that it is on, by which the cluster knows it; empty: there is this machine only."""
    kv_place: KvPlace | None = None
    """Of its engines' keys and values; None: they end with each engine."""

    @property
    def num_streams(self) -> int:
        """Its own open requests and its guests. Numbers that cannot be count as none."""
        return max(0, self.num_open) + max(0, self.num_guests)


class ReportAck(Message, frozen=True):
    """Answers the reports of a draining or standby replica; others may go unanswered.
    `is_released`: this router will send it no more requests."""

    sequence: int
    is_released: bool = False


class SetSleep(Message, frozen=True):
    """Controller to front, on the connection of its reports: how deep its engine is to sleep; 0: wake.
    Carried out as soon as routers send it nothing; refused while requests are open. The reports tell what
    came of it."""

    level: Literal[0, 1, 2]


class LeaveBy(Message, frozen=True):
    """Controller to front, on the connection of its reports: its machine goes away in so many seconds, by a
    notice that the controller has. It leaves as by one that it found itself."""

    left_s: float


class Sibling(Record, frozen=True):
    """A replica of the same endpoint, as a front must know it to continue a stream there."""

    replica_id: str
    peer_socket: str
    """As its own host has it; another finds it in its own run directory (`peer_socket_path`). Empty: it takes
    no streams."""
    stream_class: str
    state: ReplicaState
    num_open: int = 0
    """Requests and guests in its engine by its last report, and how many it takes."""
    max_open: int = 0
    leave_by_s: float = -1.0
    text_class: str = ""
    vocab_size: int = 0
    """Of its engine, as far as it is known; what a durable front checks requests against."""
    max_context_tokens: int = 0
    kv_place: KvPlace | None = None


class Siblings(Message, frozen=True):
    """Controller to front, on the connection of its reports, whenever it changes: all other replicas of its
    endpoint. A front that hears no more keeps the last list."""

    siblings: list[Sibling]


def gateway_of(request_id: str) -> str:
    """Return the id of the gateway that made a request id (`hr-GATEWAY-...`); empty for others'."""
    parts = request_id.split("-", 2)
    return parts[1] if len(parts) == 3 and parts[0] == "hr" else ""


class ReplicaSpec(msgspec.Struct, frozen=True):
    """What to start a replica with (`python -m headrace.replica JSON`)."""

    replica_id: str
    endpoint: str
    engine: EngineSpec
    run_dir: str
    report_sockets: list[str]
    """Paths of the UNIX sockets that want its load reports: routers and controllers."""
    host: str = "127.0.0.1"
    port: int = 0
    max_open: int = 64
    """Most requests open in the front: running and waiting in the engine."""
    max_surplus: int = 0
    """So many more are taken: several gateways may fill a replica in one moment, each by what it knows. They
    wait in the engine, and no gateway sends more until they fit."""
    max_body_bytes: int = 32 * 1024 * 1024
    drain_grace_s: float = 30.0
    lease_s: float = 3.0
    generation: str = ""
    needs_gateway: bool = False
    """There are tenants: generation is refused to whoever did not come through a gateway, and x-headrace-*
    headers are believed on the UNIX socket only, which only its owner may open."""
    node_address: str = ""
    """As in LoadReport."""
    shared_prefix: str = ""
    """System prompt whose KV blocks all tenants may share."""
    stream_class: str = ""
    """As in LoadReport, as far as the config decides it."""
    handover_after_s: float = 2.0
    """A draining replica hands what is then still open to siblings, and stops its engine."""
    resume_attempts: int = 6
    """Most engines that one stream may be continued on after its first; 0: a lost engine ends its streams."""
    resume_limit_s: float = 60.0
    """Longest time without an engine before a stream is given up."""
    notice_file: str = ""
    """A file that appears when this machine is about to go away; empty: none is looked for."""
    notice_url: str = ""
    """An http(s) address that says whether this machine is about to go away; empty: none is asked."""
    notice_headers: dict[str, str] = {}
    """Sent with each question to it."""
    identity: str = ""
    """PEM file of the cluster's key and certificate: the TCP address asks whoever connects for them, and
    believes who has them as it believes the UNIX socket. Empty: plain TCP, which is not believed."""
    gateway_id: str = ""
    """A durable front of this gateway: it starts no engine, and its streams go to replicas' engines, which
    its `engine` describes. Empty: a replica."""
