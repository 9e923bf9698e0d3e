"""What a router is started with, and the demand that it reports."""

from __future__ import annotations

import re
from typing import Literal

from headrace.api.messages.base import Message, Record

_GATEWAY_GROUP = re.compile(r"gateway-(g[0-9]+)")


class EndpointRule(Record, frozen=True):
    """What the router must know of an endpoint."""

    name: str
    model: str
    max_queue: int
    max_wait_s: float
    placement: Literal["prefix", "least_loaded", "round_robin"] = "prefix"
    traffic: dict[str, float] = {}
    """While a version is rolled out: generation -> its part of the requests, 0 to 1. Empty: no difference is
    made between replicas."""
    ttft_s: float = 0.0
    """The endpoint's SLO: time to first token and between tokens; 0: none."""
    itl_s: float = 0.0
    tell_after_s: float = 3.0
    """A stream that is held for longer is begun, with comment lines; 0: none is."""
    is_durable: bool = False
    """Requests go to the gateway's durable fronts; replicas' own fronts are for when there is none."""
    adapters: list[str] = []
    """Further names of models that its replicas serve."""


class EndpointOutlook(Record, frozen=True):
    """When held requests of an endpoint can expect a replica, as the controller sees it."""

    endpoint: str
    eta_s: float
    """Seconds until a replica is ready; 0: one is; negative: not known."""
    reason: str = ""
    """What is waited for, for people: `chat-1 starts (map weights)`."""


class Outlook(Message, frozen=True):
    """Controller -> router, when it changes, and every second while some eta_s is not 0."""

    endpoints: list[EndpointOutlook]


class TenantRule(Record, frozen=True):
    """What the router must know of a tenant. Limits: 0 is none."""

    name: str
    weight: float = 1.0
    priority: int = 1
    """Band: 0 high, 1 normal, 2 low."""
    endpoints: list[str] = []
    """Endpoints that it may use; empty: all."""
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_concurrent: int = 0
    max_queued: int = 0
    max_wait_s: float = 0.0


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
    gateway_id: str = "g1"
    """Tells the gateways of one system apart: begins each of their request ids (`hr-g1-...`)."""
    tenants: list[TenantRule] = []
    """Empty: keys are not asked for, every request is of the tenant ``."""
    keys: dict[str, str] = {}
    """SHA-256 of each valid key, 64 lower-case hex digits -> its tenant."""
    certificate: str = ""
    """PEM files of the public address; empty: plain HTTP."""
    certificate_key: str = ""
    max_connections_per_address: int = 0
    replica_protocol: Literal["h2", "http1"] = "h2"
    admin_bind: str = ""
    admin_key_hash: str = ""
    """SHA-256 of the admin API's key, 64 lower-case hex digits."""
    identity: str = ""
    """PEM file of the cluster's key and certificate: HAProxy shows it to replicas on other machines, and asks
    for theirs. Empty: there are no other machines, or TCP is plain."""
    node: str = ""
    """Address of its node, if that was chosen (`gateway.placed`); empty: it is beside the controller."""


def router_name(gateway_id: str) -> str:
    """Return the name of a gateway's router process, for the launcher and in status."""
    return f"router-{gateway_id}"


def haproxy_name(gateway_id: str) -> str:
    """Return the name of a gateway's HAProxy process."""
    return f"haproxy-{gateway_id}"


def relay_name(gateway_id: str) -> str:
    """Return the name of a gateway's relay process."""
    return f"relay-{gateway_id}"


class RelaySpec(Message, frozen=True):
    """What to start the relay with (`python -m headrace.replica.relay JSON`)."""

    socket: str
    """UNIX socket on which it takes requests whose model is not in the head of their body."""
    upstream_socket: str
    """HAProxy's internal listener, to which it sends them again."""
    max_body_bytes: int = 32 * 1024 * 1024
    max_total_bytes: int = 256 * 1024 * 1024
    """Bodies held at a time, all together; at least max_body_bytes. Beyond it: 503."""
    body_idle_timeout_s: float = 30.0
    """Longest silence inside a body."""
    body_timeout_s: float = 600.0
    """From the first byte of a request to its last."""
    answer_timeout_s: float = 900.0
    """Longest silence of HAProxy once the request was sent: longer than its own limits."""


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
    arrived_prompt_tokens: float = 0.0
    """Of all that arrived, estimated from their bytes: what is held counts, too. The other totals are of
    requests that finished, as their fronts measured them."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    engine_s: float = 0.0
    held_prompt_tokens: float = 0.0
    """Of the requests held now, estimated."""
    over_limits: int = 0
    """Of `refused`: their tenant's limits said no (429). They are nobody's reason for a replica, and no part
    of arrived_prompt_tokens."""
    measured: int = 0
    """Requests behind prompt_tokens, cached_tokens, output_tokens and engine_s."""


class VersionDemand(Record, frozen=True):
    """How one generation of an endpoint's replicas fares, as one router sees it. Totals since its start."""

    endpoint: str
    generation: str
    finished: int
    failed: int
    """Engine or front broke off an accepted request. Refusals of bad requests do not count."""
    slow_ttft: int = 0
    """Finished, but beyond the SLO: of the first token, and of the mean time between tokens."""
    slow_itl: int = 0
    ttft_s: float = 0.0
    """Sums over the finished ones."""
    itl_s: float = 0.0


class TenantDemand(Record, frozen=True):
    """One tenant at one endpoint, as one router sees it. Totals count since the router's start."""

    endpoint: str
    tenant: str
    num_held: int
    oldest_held_s: float
    num_in_flight: int
    arrived: int
    finished: int
    refused: int
    prompt_tokens: int
    output_tokens: int
    work_s: float
    """Measured work charged to it, in engine-seconds (tokens, where no cost was measured yet)."""
    share: float
    """Its part of the work that this endpoint did lately, 0 to 1."""


class ReplicaView(Record, frozen=True):
    """One replica as one router sees it."""

    replica_id: str
    num_in_flight: int
    is_serving: bool
    """It is a server in HAProxy and may be chosen."""


class Demand(Message, frozen=True):
    """Router -> controller, every 200 ms and at once when a request finds no replica."""

    router_id: str
    """The gateway's id: `g1`."""
    pid: int
    endpoints: list[EndpointDemand]
    replicas: list[ReplicaView]
    tenants: list[TenantDemand] = []
    certificate_problem: str = ""
    """Why the certificate's files cannot be used, or that it is about to expire; empty: all is well."""
    versions: list[VersionDemand] = []
    node_address: str = ""
    """Of the node that it is on, if that was chosen; empty: the controller's machine."""


def gateway_group(gateway_id: str) -> str:
    """Return what a gateway's processes are called together: they are always on one node."""
    return f"gateway-{gateway_id}"


def gateway_of_group(group: str) -> str:
    """Return the id of the gateway whose processes `group` are; empty: they are something else's, such as a
    replica of an endpoint that is called gateway."""
    found = _GATEWAY_GROUP.fullmatch(group)
    return found[1] if found else ""
