"""HAProxy's files, rendered: haproxy.cfg, spoe.conf, the map from model to backend, and the static answers.

Pure: GatewaySpec and the current servers in, file contents out. Owns every path and limit HAProxy is given.
The rendered text always holds the current servers, so that a restart or a reload of HAProxy loses none.
Must not know who writes the files (`headrace.gateway.process`) or the runtime API (`haproxy_runtime`).
"""

from __future__ import annotations

from collections.abc import Iterable

import headrace
from headrace.api.messages import GatewaySpec
from headrace.errors import ConfigError
from headrace.gateway import haproxy_answers as answers
from headrace.gateway.haproxy_admin import admin_sections
from headrace.gateway.haproxy_backends import (
    alive_section,
    endpoint_backend,
    identity_backend,
    metrics_sections,
    relay_backend,
    router_backend,
    status_backend,
)
from headrace.gateway.haproxy_frontend import (
    ROUTER_BACKEND,
    ROUTER_HEAD_BYTES,
    frontend_section,
    internal_frontend,
)
from headrace.gateway.haproxy_identity import identity_files
from headrace.gateway.haproxy_words import milliseconds, quote
from headrace.gateway.paths import GatewayPaths, check_run_dir
from headrace.gateway.server import Server
from headrace.gateway.spoe import MAX_FRAMES_IN_FLIGHT

BUFFER_BYTES = 131_072
"""tune.bufsize. A longer head makes every open request dearer; the rest of a body streams through."""
H2_STREAMS = 256
"""Streams of one connection to a front: each connection costs a front one write per engine step."""
_FDS_RESERVED = 512
"""Listeners, health checks, SPOE connections (MAX_ROUTER_CONNECTIONS), the runtime API, logs, pipes between
master and worker. They must be left when every client and its server have theirs, or the router could add no
server at the very moment when it is needed."""
_FDS_PER_CONNECTION = 2
"""Client and server. A held request has no server yet, and shares its SPOE connection with many."""
_CLIENTS_PER_WAITING = 16
"""One in so many clients may wait in the relay, which needs a second connection for each."""
_ROUTER_CONNECTIONS_PER_S = 20
_MAX_CONNECTIONS = 65_536
"""Bound when the descriptor limit is practically infinite: HAProxy allocates tables in proportion."""


def size_max_connections(spec: GatewaySpec, fd_limit: int) -> int:
    """Return the most client connections. fd_limit: the hard limit, to which HAProxy raises itself.

    HAProxy refuses to start when they need more. Raises ConfigError if the spec asks for more.
    """
    possible = (
        (fd_limit - _FDS_RESERVED) // _FDS_PER_CONNECTION * _CLIENTS_PER_WAITING // (_CLIENTS_PER_WAITING + 1)
    )
    wanted = spec.max_connections
    if possible < 16 or wanted > possible:
        raise ConfigError(
            f"gateway.max_connections is {wanted or 'automatic'}; the file-descriptor limit of {fd_limit} "
            f"allows {max(possible, 0)}. Raise it (`ulimit -Hn`), or ask for fewer connections."
        )
    return wanted or min(possible, _MAX_CONNECTIONS)


def max_waiting(max_connections: int) -> int:
    """Return how many requests may wait in the relay, of so many client connections."""
    return -(-max_connections // _CLIENTS_PER_WAITING)


def render_files(spec: GatewaySpec, servers: Iterable[Server], fd_limit: int) -> dict[str, str]:
    """Return {path: content} of every file that HAProxy reads, but for keys.map. Raises ConfigError."""
    paths = GatewayPaths(spec.run_dir, spec.gateway_id)
    check_run_dir(spec.run_dir)
    return {
        paths.config: render_config(spec, servers, fd_limit),
        paths.spoe_config: render_spoe(spec),
        **identity_files(spec, paths),
    }


def render_config(spec: GatewaySpec, servers: Iterable[Server], fd_limit: int) -> str:
    """Return haproxy.cfg. Servers of endpoints that the spec does not have are left out."""
    paths = GatewayPaths(spec.run_dir, spec.gateway_id)
    kinds = (False, True) if spec.replica_protocol == "h2" else (False,)
    members: dict[tuple[str, bool], list[Server]] = {
        (rule.name, is_shared): [] for rule in spec.endpoints for is_shared in kinds
    }
    durable = {rule.name for rule in spec.endpoints if rule.is_durable}
    for server in sorted(servers):
        if (server.endpoint, server.is_shared) in members:
            members[server.endpoint, server.is_shared].append(server)
    sections = [
        _global_section(spec, paths, size_max_connections(spec, fd_limit)),
        _defaults_section(spec),
        frontend_section(spec, paths, size_max_connections(spec, fd_limit)),
        alive_section(paths),
        status_backend(spec, paths),
        *(
            endpoint_backend(name, of, is_shared=is_shared, is_durable=name in durable)
            for (name, is_shared), of in members.items()
        ),
        router_backend(paths),
    ]
    relay_timeout_s = relay_answer_timeout_s(spec) + 30
    sections += [internal_frontend(spec, paths), relay_backend(paths, relay_timeout_s)]
    if spec.identity:
        sections.append(identity_backend(spec.identity))
    if spec.admin_bind:
        sections.append(admin_sections(spec, paths))
    if spec.metrics_bind:
        sections.append(metrics_sections(spec, paths))
    return "\n".join(sections)


def render_spoe(spec: GatewaySpec) -> str:
    """Return spoe.conf: what the router is asked, and for how long HAProxy waits for its answer.

    The answer may take as long as a request may be held; the router's own limit comes first. Whenever more
    frames wait than are answered in a second, HAProxy opens another connection: without limits, one per held
    request. Frames that find no place on a connection would not be sent at all, so each takes as many as can
    be; some connections, because HAProxy looks an answered frame up in its connection's list.
    """
    return f"""[route]
spoe-agent route
  groups decide
  option var-prefix route
  option set-on-error error
  option pipelining
  max-waiting-frames {MAX_FRAMES_IN_FLIGHT}
  maxconnrate {_ROUTER_CONNECTIONS_PER_S}
  timeout hello 1s
  timeout idle 2m
  timeout processing {milliseconds(_longest_hold_s(spec) + 15)}
  max-frame-size 65532
  use-backend {ROUTER_BACKEND}
spoe-group decide
  messages decide
spoe-message decide
  args id=unique-id endpoint=var(txn.backend) tenant=var(txn.tenant) client=src client_port=src_port \
path=path size=req.body_size session=req.hdr(x-session-id) explain=var(txn.explain) \
relays=var(txn.relays) pass=var(txn.pass){_model_argument(spec)} head=req.body,bytes(0,{ROUTER_HEAD_BYTES})
"""


def _model_argument(spec: GatewaySpec) -> str:
    """The router knows the endpoint; the model's name says more only where there are adapters."""
    return " model=var(txn.model)" if any(rule.adapters for rule in spec.endpoints) else ""


def _global_section(spec: GatewaySpec, paths: GatewayPaths, max_connections: int) -> str:
    return f"""# Written by headrace {headrace.__version__}; it is replaced whenever replicas come or go.
global
  master-worker
  nbthread {spec.num_threads}
  maxconn {max_connections + max_waiting(max_connections)}
  ulimit-n {_FDS_PER_CONNECTION * (max_connections + max_waiting(max_connections)) + _FDS_RESERVED}
  stats socket {paths.runtime_socket} mode 600 level admin expose-fd listeners
  stats timeout 60s
  hard-stop-after {milliseconds(spec.request_timeout_s + 60)}
  tune.bufsize {BUFFER_BYTES}
  tune.maxrewrite 4096
  tune.h2.be.max-concurrent-streams {H2_STREAMS}
  tune.h2.be.initial-window-size {2 * BUFFER_BYTES}
  log ring@completions format raw local0 info

# Completions reach the router over a stream socket through this buffer. A datagram socket drops all but 10
# unread messages on Linux (net.unix.max_dgram_qlen); the ring also keeps events while the router restarts.
ring completions
  format raw
  maxlen 2048
  size 4194304
  timeout connect 1s
  timeout server 10s
  server router unix@{paths.completions_socket}
"""


def _defaults_section(spec: GatewaySpec) -> str:
    timeout = milliseconds(spec.request_timeout_s)
    client_timeout = milliseconds(max(spec.request_timeout_s, _longest_hold_s(spec) + 30))
    errors = "\n".join(
        f"  http-error status {status} content-type application/json string {quote(body)}"
        + ("" if status != 503 else " hdr retry-after 1")
        for status, body in answers.HAPROXY_ERRORS.items()
    )
    # From a host without power nothing comes, not even an end: its connections are over after 25 s of
    # silence. One that is cut off for a moment keeps them.
    probes = ("option srvtcpka", "srvtcpka-idle 10s", "srvtcpka-intvl 5s", "srvtcpka-cnt 3")
    keep_alive = "".join(f"  {line}\n" for line in probes if spec.identity)
    return f"""defaults
  mode http
  log global
  timeout client {client_timeout}
  timeout server {timeout}
  timeout connect 1s
  timeout queue {timeout}
  timeout http-request 10s
  timeout http-keep-alive 60s
  http-reuse always
  option http-no-delay
  option abortonclose
{keep_alive}{errors}
"""


def relay_answer_timeout_s(spec: GatewaySpec) -> float:
    """Longest silence that the relay bears: held, and then served, at the limits of both."""
    return spec.request_timeout_s + _longest_hold_s(spec) + 30


def _longest_hold_s(spec: GatewaySpec) -> float:
    return max((rule.max_wait_s for rule in spec.endpoints), default=0.0)
