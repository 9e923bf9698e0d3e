"""The config tree: one frozen, typed tree that says everything a user can decide. Defaults live here only.

Owns meaning, unit and default of every setting. Must not know files, the environment or processes
(`headrace.api.config_loader` reads those).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from headrace.api.endpoint_config import Endpoint
from headrace.api.node_config import GatewayPlacement, Ray
from headrace.api.notation import TENANT_NAME, split_bind
from headrace.api.notice_address import checked_notice_headers, checked_notice_url
from headrace.api.run_paths import NODE_HOST
from headrace.api.section import Section

ENDPOINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}")
WILDCARDS = ("0.0.0.0", "::")  # noqa: S104, compared only
KEY_HASH = re.compile(r"sha256:[0-9a-f]{64}")


class Limits(Section):
    """What one tenant may take. 0 everywhere: no limit of its own."""

    requests_per_minute: Annotated[int, Field(ge=0, le=100_000_000)] = 0
    """Requests accepted per minute; further ones get 429 with Retry-After."""
    tokens_per_minute: Annotated[int, Field(ge=0, le=10_000_000_000)] = 0
    """Prompt and output tokens per minute: estimated at arrival, corrected at the end; beyond it 429."""
    max_concurrent: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Most requests bound to replicas at a time; further ones wait in the queue."""
    max_queued: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Most requests held per endpoint; further ones get 429 with Retry-After. 0: the endpoint's limit."""
    max_wait_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """Longest time that a request is held before it gets 503. 0: the endpoint's limit."""


class Tenant(Section):
    """Who pays: its keys, its share, its limits."""

    keys: list[str] = []
    """Hashes of API keys, `sha256:` and 64 hex digits. `headrace keys create` adds keys at run time."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Share of the work when tenants compete: twice the weight, twice the work."""
    priority: Literal["high", "normal", "low"] = "normal"
    """Band: while a request of a higher band waits, none of a lower one is bound. A lower band gets what is
    left, under a lasting backlog nothing: its requests are refused after the longest wait (503). Who must
    always get something belongs into the same band, with a smaller weight."""
    endpoints: list[str] = []
    """Endpoints that it may use. Empty: all."""
    limits: Limits = Limits()

    @field_validator("keys")
    @classmethod
    def _check_keys(cls, value: list[str]) -> list[str]:
        for position, key in enumerate(value):
            if not KEY_HASH.fullmatch(key):  # not shown: somebody may have pasted the key itself
                raise ValueError(
                    f"key {position} is not `sha256:` and 64 lower-case hex digits; `headrace keys create` "
                    "makes a key, and `printf %s KEY | sha256sum` hashes one"
                )
        return value


class Tls(Section):
    """The public address's certificate. Files are read again when they change, without a restart."""

    certificate: Annotated[str, Field(min_length=1)]
    """PEM file of the certificate and its chain. A relative path counts from the command's directory."""
    key: Annotated[str, Field(min_length=1)]
    """PEM file of the private key."""


class Gateway(Section):
    """The public address."""

    bind: str = "127.0.0.1:8000"
    """host:port. Other than loopback needs tenants: without keys, anyone who reaches it could use it. With
    placement, node:8000 is each gateway's own node, 0.0.0.0:8000 all its addresses, and 127.0.0.1:8000 serves
    programs on that node alone."""
    count: Annotated[int, Field(ge=1, le=16)] = 1
    """Gateways (HAProxy and router) side by side on one port; one that dies costs its own connections. With
    placement: each on a node of its own."""
    placement: GatewayPlacement | None = None
    """With launcher ray: the nodes that hold gateways. Without it all stand beside the controller."""
    tls: Tls | None = None
    """Certificate of the public address; HTTP/2 is then offered, too. Without it: plain HTTP."""
    max_connections_per_address: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Most connections from one client address. 0: no limit of its own."""
    replica_protocol: Literal["h2", "http1"] = "h2"
    """What HAProxy speaks with fronts. h2: streams of at most 512 tokens share connections, at less CPU per
    token; all else, and everything with http1, goes over HTTP/1.1."""
    admin_bind: str = ""
    """host:port of the admin API, which needs the admin key. Empty: only the UNIX socket, for its owner."""
    metrics_bind: str = ""
    """host:port for Prometheus metrics; of several gateways each takes the next port. Empty: none."""
    max_connections: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Most client connections of each gateway. 0: as many as the file-descriptor limit allows."""
    max_body_mb: Annotated[int, Field(ge=1, le=1024)] = 32
    """Longest request body in MiB; a longer one gets 413."""
    request_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """Longest silence towards a client while it waits for its answer."""
    num_threads: Annotated[int, Field(ge=1, le=64)] = 1
    """HAProxy threads. One relays about 80,000 tokens/s."""

    @field_validator("bind", "metrics_bind", "admin_bind")
    @classmethod
    def _check_bind(cls, value: str) -> str:
        if value:
            split_bind(value)
        return value


class Config(Section):
    """Everything a user can decide."""

    endpoints: Annotated[dict[str, Endpoint], Field(min_length=1)]
    """Public model name -> endpoint."""
    gateway: Gateway = Gateway()
    tenants: dict[str, Tenant] = {}
    """Name -> tenant. Empty: no keys are asked for, and the gateway must stay on loopback."""
    state_dir: str = ""
    """Directory of what survives a restart: run-time keys. Empty: ~/.local/state/headrace."""
    notice_file: str = ""
    """A file that appears when this machine is about to go away; in it {"deadline_s": seconds since 1970}, or
    nothing, which means 30 s. Replicas then hand over their streams and leave. Empty: none is looked for."""
    notice_url: str = ""
    """An http or https address that each replica asks every second or two whether its machine is about to go
    away. TRUE, or JSON with `deadline_s` (as in the file) or `time` (ISO 8601): it leaves. FALSE, NONE or
    status 404: it stays; anything else is logged and ignored. No redirects. Empty: none is asked."""
    notice_headers: dict[str, str] = {}
    """HTTP headers of those questions, such as Metadata-Flavor: Google. No secrets: replicas are started with
    them in their arguments, which other users of the machine may see."""
    launcher: Literal["local", "ray"] = "local"
    """Where replicas run. local: child processes of `headrace up`. ray: on the nodes of a Ray cluster."""
    ray: Ray = Ray()
    """The Ray cluster."""

    @model_validator(mode="after")
    def _check_tenants(self) -> Config:
        problems = [
            *_tenant_problems(self.tenants, self.endpoints),
            *_bind_problems(self),
            *_place_problems(self),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @field_validator("notice_file")
    @classmethod
    def _check_notice_file(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError(f"notice_file is {value!r}; it must be an absolute path, or empty")
        return value

    @field_validator("notice_url")
    @classmethod
    def _check_notice_url(cls, value: str) -> str:
        return checked_notice_url(value)

    @field_validator("notice_headers")
    @classmethod
    def _check_notice_headers(cls, value: dict[str, str]) -> dict[str, str]:
        return checked_notice_headers(value)

    @field_validator("endpoints")
    @classmethod
    def _check_names(cls, value: dict[str, Endpoint]) -> dict[str, Endpoint]:
        adapters = [name for endpoint in value.values() for name in endpoint.vllm.lora]
        if twice := sorted({name for name in adapters if name in value or adapters.count(name) > 1}):
            raise ValueError(
                f"vllm.lora: {', '.join(twice)}: named twice; endpoints and adapters are all names of models"
            )
        for name in [*value, *adapters]:
            if not ENDPOINT_NAME.fullmatch(name):
                raise ValueError(
                    f"endpoint name {name!r}: use 1 to 128 letters, digits or . _ / : - "
                    "and begin with a letter or digit"
                )
        return value


def _tenant_problems(tenants: dict[str, Tenant], endpoints: dict[str, Endpoint]) -> list[str]:
    problems: list[str] = []
    owners: dict[str, str] = {}
    for name, tenant in tenants.items():
        if not TENANT_NAME.fullmatch(name):
            problems.append(
                f"tenants: name {name!r}: use 1 to 64 letters, digits or . _ - "
                "and begin with a letter or digit"
            )
        unknown = [endpoint for endpoint in tenant.endpoints if endpoint not in endpoints]
        if unknown:
            problems.append(
                f"tenants.{name}.endpoints: {', '.join(unknown)}: no such endpoint; there are: "
                f"{', '.join(endpoints)}"
            )
        for key in tenant.keys:
            owner = owners.setdefault(key, name)
            if owner != name:
                problems.append(
                    f"tenants.{name}.keys: {key[:19]}... is a key of tenant {owner}, too; a key says who "
                    "asks, so it belongs to one tenant"
                )
    return problems


def _bind_problems(config: Config) -> list[str]:
    gateway, problems = config.gateway, []
    for field, address in (("bind", gateway.bind), ("admin_bind", gateway.admin_bind)):
        if not address or is_loopback(address):
            continue
        if not config.tenants:
            problems.append(
                f"gateway.{field}: {address} can be reached from other machines, and without tenants nobody "
                "is asked for a key. Add a `tenants` section and make a key (headrace keys create), or bind "
                "to 127.0.0.1"
            )
        elif field == "admin_bind" and gateway.tls is None:
            problems.append(
                f"gateway.admin_bind: {address} can be reached from other machines, and without gateway.tls "
                "the admin key would cross the network in clear. Set gateway.tls, or bind to 127.0.0.1"
            )
    return problems


def _place_problems(config: Config) -> list[str]:
    """Addresses that cannot be had where the gateways are."""
    gateway, problems = config.gateway, []
    for field in ("bind", "admin_bind", "metrics_bind"):
        address: str = getattr(gateway, field)
        if not address or is_loopback(address):
            continue
        host, port = split_bind(address)
        if gateway.placement is None and host == NODE_HOST:
            problems.append(
                f"gateway.{field}: {address}: {NODE_HOST} is the node of a gateway with placement; set "
                "gateway.placement, or write an address of this machine"
            )
        if gateway.placement is not None and host not in (NODE_HOST, *WILDCARDS):
            problems.append(
                f"gateway.{field}: {address} is one machine's address, and with placement gateways are on "
                f"several; write {NODE_HOST}:{port}, which is each one's own"
            )
    return problems


def is_loopback(address: str) -> bool:
    """Whether `host:port` can be reached from its own machine only."""
    host, _ = split_bind(address)
    if host == NODE_HOST:
        return False
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
