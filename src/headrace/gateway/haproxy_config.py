"""HAProxy's files, rendered: haproxy.cfg, spoe.conf, the map from model to backend, and the static answers.

Pure: GatewaySpec and the current servers in, file contents out. Owns every path and limit HAProxy is given.
The rendered text always holds the current servers, so that a restart or a reload of HAProxy loses none.
Must not know who writes the files (`headrace.gateway.process`) or the runtime API (`haproxy_runtime`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import headrace
from headrace.api.config import split_address
from headrace.api.messages import GatewaySpec
from headrace.errors import ConfigError
from headrace.gateway import haproxy_answers as answers
from headrace.gateway.names import backend_name, encode_name
from headrace.gateway.paths import GatewayPaths, check_run_dir
from headrace.gateway.server import Server

BUFFER_BYTES = 131_072
"""tune.bufsize. A longer head makes every open request dearer; the rest of a body streams through."""
HEAD_BYTES = 98_304
"""The part of the body in which `model` is looked for (the buffer also holds the headers)."""
MAX_HEADER_BYTES = 32_768
ROUTER_BACKEND = "headrace-router"
MODEL_IN_REQUEST = "%[var(txn.model),bytes(0,128),json(utf8ps)]"
"""HAProxy's expression for the model that was asked for, safe inside a JSON string."""
_CLIENT_ID_PATTERN = "^[A-Za-z0-9._:@/+=-]{1,128}$"
"""What a client's x-request-id may look like; others are dropped, since it comes back in our answers."""
_RETURN = "http-request return status"
_FDS_RESERVED = 256
"""Listeners, health checks, SPOE connections, logs, pipes between master and worker."""
_FDS_PER_CONNECTION = 3
"""Client, server, and while it is held its share of SPOE connections (at worst one)."""
_MAX_CONNECTIONS = 65_536
"""Bound when the descriptor limit is practically infinite: HAProxy allocates tables in proportion."""


def size_max_connections(spec: GatewaySpec, fd_limit: int) -> int:
    """Return HAProxy's maxconn. fd_limit: the hard limit, to which HAProxy raises itself.

    HAProxy refuses to start when maxconn needs more. Raises ConfigError if the spec asks for more.
    """
    possible = (fd_limit - _FDS_RESERVED) // _FDS_PER_CONNECTION
    wanted = spec.max_connections
    if possible < 16 or wanted > possible:
        raise ConfigError(
            f"gateway.max_connections is {wanted or 'automatic'}; the file-descriptor limit of {fd_limit} "
            f"allows {max(possible, 0)}. Raise it (`ulimit -Hn`), or ask for fewer connections."
        )
    return wanted or min(possible, _MAX_CONNECTIONS)


def render_files(spec: GatewaySpec, servers: Iterable[Server], fd_limit: int) -> dict[str, str]:
    """Return {path: content} of every file that HAProxy reads. Raises ConfigError."""
    paths = GatewayPaths(spec.run_dir)
    check_run_dir(spec.run_dir)
    names = [rule.name for rule in spec.endpoints]
    models = answers.models_list(names)
    if len(models) > BUFFER_BYTES // 2:
        raise ConfigError(
            f"{len(names)} endpoints make a /v1/models answer of {len(models)} bytes; "
            f"at most {BUFFER_BYTES // 2} fit. Use fewer endpoints or shorter names."
        )
    return {
        paths.config: render_config(spec, servers, fd_limit),
        paths.spoe_config: render_spoe(spec),
        paths.endpoint_map: "".join(f"{name} {backend_name(name)}\n" for name in names),
        paths.models: models,
        paths.model_map: "".join(f"{name} {answers.model_card(name)}\n" for name in names),
    }


def render_config(spec: GatewaySpec, servers: Iterable[Server], fd_limit: int) -> str:
    """Return haproxy.cfg. Servers of endpoints that the spec does not have are left out."""
    paths = GatewayPaths(spec.run_dir)
    by_endpoint: dict[str, list[Server]] = {rule.name: [] for rule in spec.endpoints}
    for server in sorted(servers):
        if server.endpoint in by_endpoint:
            by_endpoint[server.endpoint].append(server)
    sections = [
        _global_section(spec, paths, size_max_connections(spec, fd_limit)),
        _defaults_section(spec),
        _frontend_section(spec, paths),
        _status_backend(paths),
        *(_endpoint_backend(name, members) for name, members in by_endpoint.items()),
        _router_backend(paths),
    ]
    if spec.metrics_bind:
        sections.append(_metrics_sections(spec, paths))
    return "\n".join(sections)


def render_spoe(spec: GatewaySpec) -> str:
    """Return spoe.conf: what the router is asked, and for how long HAProxy waits for its answer.

    The answer may take as long as a request may be held; the router's own limit comes first.
    """
    return f"""[route]
spoe-agent route
  groups decide
  option var-prefix route
  option set-on-error error
  option pipelining
  timeout hello 1s
  timeout idle 1h
  timeout processing {_milliseconds(_longest_hold_s(spec) + 15)}
  max-frame-size 65532
  use-backend {ROUTER_BACKEND}
spoe-group decide
  messages decide
spoe-message decide
  args id=unique-id endpoint=var(txn.backend) client=src client_port=src_port
"""


def _global_section(spec: GatewaySpec, paths: GatewayPaths, max_connections: int) -> str:
    return f"""# Written by headrace {headrace.__version__}; it is replaced whenever replicas come or go.
global
  master-worker
  nbthread {spec.num_threads}
  maxconn {max_connections}
  stats socket {paths.runtime_socket} mode 600 level admin expose-fd listeners
  stats timeout 60s
  hard-stop-after {_milliseconds(spec.request_timeout_s + 60)}
  tune.bufsize {BUFFER_BYTES}
  tune.maxrewrite 4096
  log ring@completions format raw local0 info

# Completions reach the router over a stream socket through this buffer. A datagram socket drops all but 10
# unread messages on Linux (net.unix.max_dgram_qlen); the ring also keeps events while the router restarts.
ring completions
  format raw
  maxlen 1024
  size 4194304
  timeout connect 1s
  timeout server 10s
  server router unix@{paths.completions_socket}
"""


def _defaults_section(spec: GatewaySpec) -> str:
    timeout = _milliseconds(spec.request_timeout_s)
    client_timeout = _milliseconds(max(spec.request_timeout_s, _longest_hold_s(spec) + 30))
    errors = "\n".join(
        f"  http-error status {status} content-type application/json string {_quote(body)}"
        + ("" if status != 503 else " hdr retry-after 1")
        for status, body in answers.HAPROXY_ERRORS.items()
    )
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
{errors}
"""


def _frontend_section(spec: GatewaySpec, paths: GatewayPaths) -> str:
    names = [rule.name for rule in spec.endpoints]
    limit = spec.max_body_bytes
    headers_too_large = f"if {{ req.hdrs,length gt {MAX_HEADER_BYTES} }}"
    body_too_large = f"if is_generation {{ req.hdr_val(content-length) gt {limit} }}"
    no_model = "if is_generation !has_model"
    if len(names) == 1:  # nothing to choose: the front reads the model, wherever it is in the body
        without_model = f"http-request set-var(txn.backend) str({backend_name(names[0])}) {no_model}"
    else:
        without_model = _return(400, answers.model_not_found_in_head(HEAD_BYTES), no_model)
    return f"""frontend headrace
  bind {_bind_address(spec.bind)}
  unique-id-format hr-%{{+X}}o%Ts-%pid-%rt
  log-format '{answers.COMPLETION_LOG_FORMAT}'
  acl is_generation path {" ".join(answers.GENERATION_PATHS)}
  acl is_status path {" ".join(answers.STATUS_PATHS)}
  acl is_status path_beg /v1/models/
  acl has_model var(txn.model) -m found
  acl has_backend var(txn.backend) -m found
  http-request set-log-level silent unless is_generation METH_POST
  # What a client says about itself is not believed: our headers come from us alone.
  http-request del-header x-headrace- -m beg
  http-request set-header x-headrace-request-id %[unique-id]
  http-request del-header x-request-id unless {{ req.hdr(x-request-id) -m reg {_CLIENT_ID_PATTERN} }}
  http-request set-var(txn.client_id) req.hdr(x-request-id)
  http-request set-var(txn.client_id) unique-id unless {{ var(txn.client_id) -m found }}
  http-after-response set-header x-request-id %[var(txn.client_id)] if {{ var(txn.client_id) -m found }}
  {_return(413, answers.headers_too_large(MAX_HEADER_BYTES), headers_too_large)}
  {_return(404, answers.unknown_path(), "unless is_generation or is_status")}
  {_return(405, answers.method_not_allowed("POST"), "if is_generation !METH_POST", ("allow", "POST"))}
  {_return(413, answers.body_too_large(limit), body_too_large)}
  http-request wait-for-body time 30s at-least {HEAD_BYTES} if is_generation
  http-request set-var(txn.model) req.body,json_query('$.model') if is_generation
  http-request set-var(txn.backend) var(txn.model),map_str({paths.endpoint_map}) if has_model
  {_return_format(404, answers.unknown_model(names, MODEL_IN_REQUEST), "if has_model !has_backend")}
  {without_model}
  filter spoe engine route config {paths.spoe_config}
  http-request send-spoe-group route decide if is_generation {{ nbsrv({ROUTER_BACKEND}) gt 0 }}
  http-request return status 503 content-type application/json hdr retry-after %[var(txn.route.retry_after)] \
lf-string %[var(txn.route.refusal)] if {{ var(txn.route.refusal) -m found }}
  use_backend headrace-status if is_status
  use_backend %[var(txn.backend)] if has_backend
"""


def _status_backend(paths: GatewayPaths) -> str:
    version = answers.to_json({"version": headrace.__version__})
    return f"""backend headrace-status
  {_return(405, answers.method_not_allowed("GET"), "unless METH_GET", ("allow", "GET"))}
  http-request return status 200 content-type application/json file {paths.models} if {{ path /v1/models }}
  {_return(200, version, "if { path /version }")}
  {_return(200, answers.to_json({"status": "ok"}), "unless { path_beg /v1/models/ }")}
  http-request set-var(txn.model) path,url_dec,regsub(^/v1/models/,)
  http-request set-var(txn.card) var(txn.model),map_str({paths.model_map})
  http-request return status 200 content-type application/json lf-string %[var(txn.card)] \
if {{ var(txn.card) -m found }}
  {_return_format(404, answers.unknown_model([], MODEL_IN_REQUEST), "")}
"""


def _endpoint_backend(endpoint: str, servers: Sequence[Server]) -> str:
    """One backend per endpoint: with the router dead it balances by itself.

    A failed request is sent again elsewhere until its first byte came; the request id makes that harmless.
    503 is what a front answers that drains or whose engine restarts.
    """
    lines = "".join(
        f"  server {encode_name(server.replica_id)} {server.address} {server.options}\n" for server in servers
    )
    return f"""backend {backend_name(endpoint)}
  balance leastconn
  retries 3
  option redispatch 1
  retry-on conn-failure empty-response 503
  option httpchk GET /health
  timeout check 2s
  use-server %[var(txn.route.server)] if {{ var(txn.route.server) -m found }}
{lines}"""


def _router_backend(paths: GatewayPaths) -> str:
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
  retries 0
  server router unix@{paths.spoe_socket} check inter 300ms fastinter 100ms fall 2 rise 1 \
on-marked-down shutdown-sessions
"""


def _metrics_sections(spec: GatewaySpec, paths: GatewayPaths) -> str:
    return f"""frontend headrace-metrics
  bind {_bind_address(spec.metrics_bind)}
  no log
  http-request use-service prometheus-exporter if {{ path /metrics/haproxy }}
  {_return(404, answers.unknown_path(("/metrics", "/metrics/haproxy")), "unless { path /metrics }")}
  default_backend headrace-router-metrics

backend headrace-router-metrics
  timeout server 5s
  server router unix@{paths.metrics_socket}
"""


def _return(status: int, body: str, condition: str, header: tuple[str, str] | None = None) -> str:
    extra = f" hdr {header[0]} {_quote(header[1])}" if header else ""
    return f"{_RETURN} {status} content-type application/json{extra} string {_quote(body)} {condition}"


def _return_format(status: int, body: str, condition: str) -> str:
    """Like `_return`; `body` may hold HAProxy's %[expressions]."""
    return f"{_RETURN} {status} content-type application/json lf-string {_quote(body)} {condition}"


def _quote(text: str) -> str:
    """Quote one word. Strong quotes take everything but a strong quote, which no answer of ours holds."""
    assert not {"'", "\n"} & set(text), f"cannot be quoted for HAProxy: {text!r}"
    return f"'{text}'"


def _bind_address(value: str) -> str:
    host, port = split_address(value)
    if port == 0:
        raise ConfigError(f"{value} names no port; HAProxy needs one from 1 to 65535")
    host = "127.0.0.1" if host == "localhost" else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _longest_hold_s(spec: GatewaySpec) -> float:
    return max((rule.max_wait_s for rule in spec.endpoints), default=0.0)


def _milliseconds(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"
