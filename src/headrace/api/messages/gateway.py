"""What a router is started with, and the demand that it reports."""

from __future__ import annotations

from headrace.api.messages.base import Message, Record


class EndpointRule(Record, frozen=True):
    """What the router must know of an endpoint."""

    name: str
    model: str
    max_queue: int
    max_wait_s: float


class GatewaySpec(Message, frozen=True):
    """What to start a router with (`python -m headrace.gateway JSON`); sent again when the config changes."""

    run_dir: str
    bind: str
    endpoints: list[EndpointRule]
    metrics_bind: str = ""
    max_connections: int = 0
    """0: as many as the file-descriptor limit allows."""
    max_body_bytes: int = 32 * 1024 * 1024
    request_timeout_s: float = 600.0
    num_threads: int = 1


class EndpointDemand(Record, frozen=True):
    """One endpoint as one router sees it. Totals count since the router's start."""

    endpoint: str
    num_held: int
    oldest_held_s: float
    num_in_flight: int
    arrived: int
    finished: int
    aborted: int
    refused: int
    failed: int


class ReplicaView(Record, frozen=True):
    """One replica as one router sees it."""

    replica_id: str
    num_in_flight: int
    is_serving: bool
    """It is a server in HAProxy and may be chosen."""


class Demand(Message, frozen=True):
    """Router -> controller, every 200 ms and at once when a request finds no replica."""

    router_id: str
    pid: int
    endpoints: list[EndpointDemand]
    replicas: list[ReplicaView]
