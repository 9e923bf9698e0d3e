"""HAProxy's backends, rendered: its own answers, the endpoints' servers, the router, the metrics. Pure.

Must not know the rules of the frontend.
"""

from __future__ import annotations

from collections.abc import Sequence

import headrace
from headrace.api.messages import GatewaySpec
from headrace.gateway import haproxy_answers as answers
from headrace.gateway.haproxy_frontend import MODEL_IN_REQUEST, RELAY_BACKEND, ROUTER_BACKEND
from headrace.gateway.haproxy_identity import lookup
from headrace.gateway.haproxy_words import bind_address, milliseconds, return_format, return_text
from headrace.gateway.names import backend_name
from headrace.gateway.paths import GatewayPaths
from headrace.gateway.server import Server, identity_options

MAX_ROUTER_CONNECTIONS = 128
"""SPOE connections to the router. HAProxy wants more while many requests are held; it can do without."""


def alive_section(paths: GatewayPaths) -> str:
    """Answers the controller's probes, for this one process: the kernel spreads the connections to the public
    port over all gateways. HAProxy does not start without that port, so an answer here means both."""
    return f"""frontend headrace-alive
  bind unix@{paths.alive_socket} mode 600
  no log
  http-request return status 200
"""


def status_backend(spec: GatewaySpec, paths: GatewayPaths) -> str:
    version = answers.to_json({"version": headrace.__version__})
    if spec.tenants:
        models = f"""http-request set-var(txn.models) var(txn.endpoints),map_str({paths.model_map}) \
if {{ path /v1/models }}
  http-request return status 200 content-type application/json lf-string %[var(txn.models)] \
if {{ path /v1/models }}"""
    else:
        models = (
            f"http-request return status 200 content-type application/json file {paths.models} "
            "if { path /v1/models }"
        )
    return f"""backend headrace-status
  {return_text(405, answers.method_not_allowed("GET"), "unless METH_GET", ("allow", "GET"))}
  {models}
  {return_text(200, version, "if { path /version }")}
  {return_text(200, answers.to_json({"status": "ok"}), "unless { path_beg /v1/models/ }")}
  http-request set-var(txn.model) path,url_dec,regsub(^/v1/models/,)
  http-request set-var(txn.card) {lookup(spec, "txn.model")},map_str({paths.model_map})
  http-request return status 200 content-type application/json lf-string %[var(txn.card)] \
if {{ var(txn.card) -m found }}
  {return_format(404, answers.unknown_model([], MODEL_IN_REQUEST), "")}
"""


def endpoint_backend(
    endpoint: str, servers: Sequence[Server], *, is_shared: bool = False, is_durable: bool = False
) -> str:
    """An endpoint's servers on HTTP/1.1: with the router dead HAProxy balances over them by itself. Or
    (is_shared) those on HTTP/2, to which only the router sends.

    A failed request is sent again elsewhere until its first byte came; the request id makes that harmless.
    503 is what a front answers that drains beside ready siblings, or whose engine starts for the first time.
    Of a durable endpoint the replicas' own fronts are backups: all of them, but only when there is no durable
    front.
    """
    backups = "  option allbackups\n" if is_durable else ""
    lines = "".join(f"  server {server.name} {server.address} {server.options}\n" for server in servers)
    return f"""backend {backend_name(endpoint, is_shared=is_shared)}
  balance leastconn
  retries 3
  option redispatch 1
  retry-on conn-failure empty-response 503
{backups}  option httpchk GET /health
  timeout check 2s
  use-server %[var(txn.route.server)] if {{ var(txn.route.server) -m found }}
{lines}"""


def identity_backend(identity: str) -> str:
    """Nobody is sent here: HAProxy takes a server at run time only with files that it read at its start."""
    return f"""backend headrace-identity
  server none 127.0.0.1:1 disabled {identity_options(identity)}
"""


def relay_backend(paths: GatewayPaths, timeout_s: float) -> str:
    """The relay. timeout_s: longest silence, beyond all limits of the second pass, whose word comes first.

    A dead relay's requests get 503 with Retry-After until the controller has restarted it. One that hangs is
    noticed by its checks within 4 s; the requests that it has are then cut.
    """
    return f"""backend {RELAY_BACKEND}
  timeout server {milliseconds(timeout_s)}
  http-reuse never
  option httpchk GET /health
  timeout check 1s
  server relay unix@{paths.relay_socket} check inter 1s fastinter 500ms downinter 200ms fall 3 rise 1 \
on-marked-down shutdown-sessions
"""


def router_backend(paths: GatewayPaths) -> str:
    """The agent. A dead one must not hang requests: the check notices a stopped process within 1.5 s, and
    the connections that wait for its answers are then shut, so that those requests go on without it."""
    return f"""backend {ROUTER_BACKEND}
  mode tcp
  no option http-no-delay
  no option abortonclose
  no log
  timeout server 1h
  option spop-check
  timeout check 500ms
  timeout queue 2s
  retries 0
  server router unix@{paths.spoe_socket} maxconn {MAX_ROUTER_CONNECTIONS} \
check inter 300ms fastinter 100ms fall 2 rise 1 on-marked-down shutdown-sessions
"""


def metrics_sections(spec: GatewaySpec, paths: GatewayPaths) -> str:
    return f"""frontend headrace-metrics
  bind {bind_address(spec.metrics_bind)}
  no log
  http-request use-service prometheus-exporter if {{ path /metrics/haproxy }}
  {return_text(404, answers.unknown_path(("/metrics", "/metrics/haproxy")), "unless { path /metrics }")}
  default_backend headrace-router-metrics

backend headrace-router-metrics
  timeout server 5s
  server router unix@{paths.metrics_socket}
"""
