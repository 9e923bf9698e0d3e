"""What a user asks of a controller, and the status that it answers with."""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace.api.messages.base import Message
from headrace.api.messages.engine import StepModel


class GetStatus(Message, frozen=True):
    pass


class ScaleEndpoint(Message, frozen=True):
    endpoint: str
    replicas: int


class ApplyConfig(Message, frozen=True):
    """The whole new config, as JSON text of the resolved tree."""

    config_json: str


class Shutdown(Message, frozen=True):
    """Drain everything and end."""


class SleepReplica(Message, frozen=True):
    """Let a replica's engine give memory back: 1: KV, 2: KV and weights; 0: wake it. The reply does not
    wait."""

    replica_id: str
    level: Literal[0, 1, 2]


class CreateKey(Message, frozen=True):
    """Make an API key for a tenant. The reply's `key` shows it, this once."""

    tenant: str
    name: str = ""


class ListKeys(Message, frozen=True):
    tenant: str = ""
    """Empty: of all tenants."""


class RevokeKey(Message, frozen=True):
    key_id: str


class ChangeRollout(Message, frozen=True):
    """Steer an endpoint's rollout. undo: back to the version before, whether or not it was promoted."""

    endpoint: str
    action: Literal["pause", "resume", "promote", "undo"]


class ExplainEndpoint(Message, frozen=True):
    """Ask for every number behind an endpoint's last scaling decision."""

    endpoint: str


AdminCommand = (
    GetStatus
    | ScaleEndpoint
    | ApplyConfig
    | Shutdown
    | SleepReplica
    | CreateKey
    | ListKeys
    | RevokeKey
    | ChangeRollout
    | ExplainEndpoint
)


class RolloutStatus(msgspec.Struct, frozen=True):
    """Where an endpoint's last change of version stands."""

    endpoint: str
    state: Literal["running", "paused", "promoted", "rolled_back"]
    old: str
    """Generations."""
    new: str
    traffic: float
    """Part of the requests that the new version gets, 0 to 1."""
    reason: str
    """What is waited for, or why it ended as it did."""
    since_s: float
    """Seconds in this state."""
    old_replicas: int = 0
    new_replicas: int = 0


class ExplainedNumber(msgspec.Struct, frozen=True):
    """One number that a decision used."""

    name: str
    value: float
    unit: str
    note: str = ""
    """Where it comes from."""


class Explanation(msgspec.Struct, frozen=True):
    """A decision with all that it was made from."""

    decision: str
    reason: str
    numbers: list[ExplainedNumber]
    history: list[str] = []
    """The last changes of the decision, newest first, one line each."""


class KeyInfo(msgspec.Struct, frozen=True):
    """An API key as it may be shown: never the key itself."""

    key_id: str
    tenant: str
    name: str
    hash_start: str
    """The first 12 hex digits of its SHA-256."""
    created_s: float
    """Wall-clock time; 0 for keys of the config."""
    source: Literal["config", "created"]


class TenantStatus(msgspec.Struct, frozen=True):
    """One tenant at one endpoint, over all gateways."""

    endpoint: str
    tenant: str
    weight: float
    priority: str
    num_held: int
    oldest_held_s: float
    num_in_flight: int
    arrived: int
    finished: int
    refused: int
    prompt_tokens: int
    output_tokens: int
    share: float
    """Its part of the endpoint's work lately, 0 to 1."""
    work_s: float = 0.0
    """Work charged to it, in engine-seconds by the engines' measured costs."""


class ReplicaStatus(msgspec.Struct, frozen=True):
    replica_id: str
    endpoint: str
    state: Literal["pending", "starting", "ready", "draining", "failed", "lost", "standby"]
    phase: str
    address: str
    pid: int
    engine_pid: int
    num_open: int
    num_running: int
    num_waiting: int
    kv_used_ratio: float
    restarts: int
    engine_restarts: int
    since_s: float
    last_error: str
    start_phases: dict[str, float] = {}
    """Seconds per phase of the engine's last start (EngineReady.phases); empty until it was ready."""
    cached_ratio: float = 0.0
    """Part of the prompt tokens that its prefix cache spared since the engine's start, 0 to 1."""
    num_in_flight: int = 0
    """Requests that the gateways bound to it and that have not ended."""
    step_model: StepModel | None = None
    """What its engine found its steps to take; None: nothing measured yet."""
    busy_ratio: float = 0.0
    """Part of the time since the engine was ready in which it had requests, 0 to 1."""
    arithmetic: str = ""
    """What its engine computes with, and why if that is not the fastest (`EngineReady.path`)."""
    generation: str = ""
    num_guests: int = 0
    """Streams of siblings in its engine, and own streams that siblings' engines continue."""
    num_hosted: int = 0
    node: str = ""
    """Id of the node that it is on; empty: this machine."""


class EndpointStatus(msgspec.Struct, frozen=True):
    name: str
    model: str
    engine: str
    desired: int
    ready: int
    starting: int
    failed: int
    num_held: int
    oldest_held_s: float
    num_in_flight: int
    finished: int
    aborted: int
    refused: int
    failed_requests: int
    reason: str
    """Why `desired` is what it is."""
    arrived: int = 0
    """Requests that the gateway accepted: arrived = held + in flight + the four terminal states."""
    standby: int = 0
    """Replicas on standby, and how many are wanted."""
    desired_standby: int = 0
    eta_s: float = 0.0
    """When held requests can expect a replica; 0: now; negative: not known."""


class ProcessStatus(msgspec.Struct, frozen=True):
    name: str
    pid: int
    state: str
    restarts: int
    resident_bytes: int
    last_error: str = ""


class GatewayStatus(msgspec.Struct, frozen=True):
    """One gateway: the states of its processes, and what its router last said."""

    gateway_id: str
    router: str
    haproxy: str
    is_answering: bool
    num_held: int
    oldest_held_s: float
    num_in_flight: int
    num_serving: int
    """Replicas that it sends requests to."""
    url: str = ""
    """Where its clients reach it; empty: it has no node yet."""
    node: str = ""
    """Id of the node that it is on; empty: this machine, or none."""
    waiting_for: str = ""
    """Why it has no node, or is not heard on it."""


class NodeStatus(msgspec.Struct, frozen=True):
    """A node of the cluster, and what of this system is on it."""

    node_id: str
    address: str
    is_alive: bool
    total: dict[str, float]
    available: dict[str, float]
    labels: dict[str, str]
    replicas: list[str]
    gateways: list[str] = []
    leaving: str = ""
    """Why and when it goes away, if that is known."""


class SystemStatus(msgspec.Struct, frozen=True):
    version: str
    url: str
    """http://host:port/v1 of the gateway; of several on nodes of their own, of the first that answers."""
    uptime_s: float
    is_ready: bool
    """The gateway answers and every endpoint has the replicas it wants."""
    endpoints: list[EndpointStatus]
    replicas: list[ReplicaStatus]
    processes: list[ProcessStatus]
    run_dir: str = ""
    tenants: list[TenantStatus] = []
    warnings: list[str] = []
    """What somebody should look at, one line each."""
    gateways: list[GatewayStatus] = []
    rollouts: list[RolloutStatus] = []
    nodes: list[NodeStatus] = []
    """Of a cluster; empty: one machine."""
    durable_fronts: list[ReplicaStatus] = []
    """Fronts without engines, of durable endpoints. Their num_hosted: streams in replicas' engines."""


class AdminReply(Message, frozen=True):
    """`error` is empty when the command was carried out."""

    error: str = ""
    status: SystemStatus | None = None
    notes: list[str] = []
    """What was done, one line each."""
    key: str = ""
    """A new key in clear; it is stored nowhere."""
    keys: list[KeyInfo] = []
    explanation: Explanation | None = None
