"""HAProxy's frontends, rendered: who may ask, what the router is asked, what is refused. Pure.

The order of their rules is the order of a request's life. The public one judges clients; the internal one
takes requests back from the relay, which read their whole body, and believes what the public one wrote there.
Must not know the backends' servers.
"""

from __future__ import annotations

from headrace.api.messages import GatewaySpec
from headrace.gateway import haproxy_answers as answers
from headrace.gateway.haproxy_identity import identity_rules, lookup, served_names
from headrace.gateway.haproxy_words import bind_address, return_format, return_text
from headrace.gateway.names import SHARED_SUFFIX, backend_name
from headrace.gateway.paths import GatewayPaths
from headrace.policy.prompt import HEAD_BYTES as PROMPT_HEAD_BYTES

ROUTER_BACKEND = "headrace-router"
RELAY_BACKEND = "headrace-relay"
PLACE_HEADER = "x-headrace-place"
"""To a durable front: the replica whose engine it is to use."""
AGAIN_HEADER = "x-headrace-again"
"""Of the answer to a later pass that is to come again, as the relay knows it."""
NTH_HEADER = "x-headrace-pass"
"""Of a later pass: its name, with which the router and the completion log tell it from others of its id."""
LAST = "last"
"""The name of a pass that does not come again."""
HEAD_BYTES = 98_304
"""The part of the body in which `model` is looked for (the buffer also holds the headers)."""
RELAYED_FROM_BYTES = 65_536
"""A body without a model of which so much is in the buffer may go on beyond it: the relay reads it. Less than
HEAD_BYTES, because long headers leave less of the buffer to the body."""
ROUTER_HEAD_BYTES = PROMPT_HEAD_BYTES
"""The part of the body that the router sees: prompt hashes, session, an estimate of the work."""
MAX_HEADER_BYTES = 32_768
MAX_URL_BYTES = 8192
REJECTED_FROM = 2
"""Times the limit of connections from one address: from there on they are not even answered."""
MODEL_IN_REQUEST = "%[var(txn.model),bytes(0,128),json(utf8ps)]"
"""HAProxy's expression for the model that was asked for, safe inside a JSON string."""
_CLIENT_ID_PATTERN = "^[A-Za-z0-9._:@/+=-]{1,128}$"
"""What a client's x-request-id may look like; others are dropped, since it comes back in our answers."""


def has_models(spec: GatewaySpec) -> bool:
    """Whether requests must be told apart by their model. With one endpoint its front reads any body."""
    return len(spec.endpoints) > 1


def frontend_section(spec: GatewaySpec, paths: GatewayPaths, max_connections: int) -> str:
    """The public address. max_connections: clients; second passes and probes have room beyond them."""
    names = _all_names(spec)
    limit = spec.max_body_bytes
    headers_too_large = f"if {{ req.hdrs,length gt {MAX_HEADER_BYTES} }}"
    body_too_large = f"if is_generation {{ req.hdr_val(content-length) gt {limit} }}"
    known = [] if spec.tenants else names  # a tenant learns of no other's endpoints
    return f"""frontend headrace
  bind {bind_address(spec.bind)}{tls_options(spec, paths)}
  maxconn {max_connections}
{_connection_limit(spec)}  unique-id-format hr-{spec.gateway_id}-%{{+X}}o%Ts-%pid-%rt
  log-format '{answers.COMPLETION_LOG_FORMAT}'
  acl is_generation path {" ".join(answers.GENERATION_PATHS)}
  acl is_status path {" ".join(answers.STATUS_PATHS)}
  acl is_status path_beg /v1/models/
  acl has_model var(txn.model) -m found
  acl has_backend var(txn.backend) -m found
  acl is_relayed var(txn.backend) -m str {RELAY_BACKEND}
  http-request set-log-level silent unless is_generation METH_POST
{_busy_address(spec)}  # What a client says about itself is not believed: our headers come from us alone.
  http-request set-var(txn.explain) bool(true) if {{ req.hdr(x-headrace-route) -m found }}
  http-request del-header x-headrace -m beg
  http-request del-header x_headrace -m beg
  http-request del-header connection
  http-request set-header x-headrace-request-id %[unique-id]
  http-request del-header x-request-id unless {{ req.hdr(x-request-id) -m reg {_CLIENT_ID_PATTERN} }}
  http-request set-var(txn.client_id) req.hdr(x-request-id)
  http-request set-var(txn.client_id) unique-id unless {{ var(txn.client_id) -m found }}
  http-after-response set-header x-request-id %[var(txn.client_id)] if {{ var(txn.client_id) -m found }}
  {return_text(413, answers.headers_too_large(MAX_HEADER_BYTES), headers_too_large)}
  {return_text(414, answers.url_too_long(MAX_URL_BYTES), f"if {{ url_len gt {MAX_URL_BYTES} }}")}
  {return_text(404, answers.unknown_path(), "unless is_generation or is_status")}
{identity_rules(spec, paths)}
  {return_text(405, answers.method_not_allowed("POST"), "if is_generation !METH_POST", ("allow", "POST"))}
  {return_text(413, answers.body_too_large(limit), body_too_large)}
  http-request wait-for-body time 30s at-least {HEAD_BYTES} if is_generation
  http-request set-var(txn.model) req.body,json_query('$.model') if is_generation
  http-request set-var(txn.backend) {lookup(spec, "txn.model")},map_str({paths.endpoint_map}) if has_model
  {return_format(404, answers.unknown_model(known, MODEL_IN_REQUEST), "if has_model !has_backend")}
{_rules_without_model(spec, paths)}
  http-request set-var(txn.relays) nbsrv({RELAY_BACKEND}) if is_generation !is_relayed
{_decide_rules(paths, _WAIT_RULES)}  use_backend headrace-status if is_status
  use_backend %[var(txn.backend)] if has_backend
"""


def _all_names(spec: GatewaySpec) -> list[str]:
    return list(served_names([rule.name for rule in spec.endpoints], spec))


def tls_options(spec: GatewaySpec, paths: GatewayPaths) -> str:
    """Return what makes an address speak TLS, and HTTP/2 to clients that offer it."""
    if not spec.certificate:
        return ""
    return f" ssl crt {paths.certificate} ssl-min-ver TLSv1.2 alpn h2,http/1.1"


def _connection_limit(spec: GatewaySpec) -> str:
    """Rules against one client address that takes all connections. Each line ends with a line feed."""
    limit = spec.max_connections_per_address
    if not limit:
        return ""
    return f"""  stick-table type ipv6 size 100k expire 1m store conn_cur
  tcp-request connection track-sc0 src
  tcp-request connection reject if {{ sc0_conn_cur gt {limit * REJECTED_FROM} }}
"""


def _busy_address(spec: GatewaySpec) -> str:
    limit = spec.max_connections_per_address
    if not limit:
        return ""
    condition = f"if {{ sc0_conn_cur gt {limit} }}"
    headers = ("retry-after", "1"), ("connection", "close")
    return f"  {return_text(429, answers.too_many_connections(limit), condition, *headers)}\n"


def _rules_without_model(spec: GatewaySpec, paths: GatewayPaths) -> str:
    """What becomes of a request without a model in the head of its body."""
    condition = "if is_generation !has_model"
    rules = []
    if spec.tenants:  # found where the tenant has only one endpoint
        only_one = f"var(txn.endpoints),map_str({paths.endpoint_map})"
        rules.append(f"  http-request set-var(txn.backend) {only_one} {condition}")
    elif len(spec.endpoints) == 1:  # nothing to choose: the front reads the model, wherever it is in the body
        backend = backend_name(spec.endpoints[0].name)
        return f"  http-request set-var(txn.backend) str({backend}) {condition}"
    if has_models(spec):
        is_long = f"{{ req.body_len ge {RELAYED_FROM_BYTES} }}"
        rules += [
            f"  http-request set-var(txn.backend) str({RELAY_BACKEND}) {condition} !has_backend {is_long}",
            "  http-request set-header x-headrace-route 1 if is_relayed { var(txn.explain) -m found }",
        ]
    rules.append(f"  {return_text(400, answers.model_required(), f'{condition} !has_backend')}")
    return "\n".join(rules)


def internal_frontend(spec: GatewaySpec, paths: GatewayPaths) -> str:
    """The second pass of a relayed request: same id, same tenant, its model in a header. Limits and keys were
    applied in the first pass, which the router was not told of: the request counts once."""
    known = [] if spec.tenants else _all_names(spec)
    find_backend = f"{lookup(spec, 'txn.model')},map_str({paths.endpoint_map})"
    return f"""frontend headrace-internal
  bind unix@{paths.internal_socket} mode 600
  unique-id-format %[req.hdr(x-headrace-request-id)]
  log-format '{answers.COMPLETION_LOG_FORMAT}'
  acl is_generation path {" ".join(answers.GENERATION_PATHS)}
  acl has_model var(txn.model) -m found
  acl has_backend var(txn.backend) -m found
  acl is_relayed always_false
  http-request set-var(txn.tenant) req.hdr(x-headrace-tenant)
  http-request set-var(txn.endpoints) var(txn.tenant),map_str({paths.tenant_map})
  http-request set-var(txn.explain) bool(true) if {{ req.hdr(x-headrace-route) -m found }}
  http-request set-var(txn.client_id) req.hdr(x-request-id)
  http-request set-var(txn.client_id) unique-id unless {{ var(txn.client_id) -m found }}
  http-after-response set-header x-request-id %[var(txn.client_id)]
  http-request set-var(txn.model) req.hdr(x-headrace-model),url_dec
  http-request del-header x-headrace-model
  http-request del-header x-headrace-route
  http-request del-header x-headrace-wait
  http-request set-var(txn.pass) req.hdr({NTH_HEADER}) if {{ req.hdr({NTH_HEADER}) -m found }}
  http-request del-header {NTH_HEADER}
  http-request del-header {PLACE_HEADER}
  {return_text(400, answers.model_required(), "unless is_generation has_model")}
  http-request wait-for-body time 30s at-least {ROUTER_HEAD_BYTES}
  http-request set-var(txn.backend) {find_backend}
  http-request set-log-level silent unless has_backend
  {return_format(404, answers.unknown_model(known, MODEL_IN_REQUEST), "unless has_backend")}
{_decide_rules(paths, _SECOND_PASS_RULES)}  use_backend %[var(txn.backend)]
"""


_AGAIN_RULE = """  http-request set-var(txn.again) bool(true) \
if is_generation has_model has_backend !is_relayed !{ var(txn.route.server) -m found } \
!{ var(txn.route.wait) -m found } !{ var(txn.backend),nbsrv gt 0 }
"""
"""No word from the router, and no server to go to without it: the request is not lost, it comes again."""
_WAIT_RULES = f"""{_AGAIN_RULE}  http-request set-header x-headrace-wait %[var(txn.route.wait)] \
if {{ var(txn.route.wait) -m found }}
  http-request set-header x-headrace-model %[var(txn.route.wait_model)] if {{ var(txn.route.wait) -m found }}
  http-request set-header x-headrace-route 1 if {{ var(txn.route.wait) -m found }} \
{{ var(txn.explain) -m found }}
  http-after-response set-header x-headrace-eta-s %[var(txn.route.eta)] if {{ var(txn.route.eta) -m found }}
  http-request set-header x-headrace-wait router if {{ var(txn.again) -m found }}
  http-request set-header x-headrace-model %[var(txn.model),url_enc] if {{ var(txn.again) -m found }}
  use_backend {RELAY_BACKEND} if {{ var(txn.route.wait) -m found }}
  use_backend {RELAY_BACKEND} if {{ var(txn.again) -m found }} {{ nbsrv({RELAY_BACKEND}) gt 0 }}
"""
"""A stream that waits for long: the relay waits with its client, and sends it again (`gateway.waiting`). And
what came while the router was away: the relay sends it again until there is one."""
_SECOND_PASS_RULES = f"""{_AGAIN_RULE}  http-request set-log-level silent if {{ var(txn.again) -m found }}
  http-request return status 503 hdr {AGAIN_HEADER} 1 if {{ var(txn.again) -m found }}
  http-after-response set-var(txn.refused) var(txn.pass) if {{ status 503 }} {{ var(txn.pass) -m found }} \
!{{ var(txn.pass) -m str {LAST} }} !{{ var(txn.route.refusal) -m found }} !{{ var(txn.again) -m found }}
  http-after-response set-header {AGAIN_HEADER} refused if {{ var(txn.refused) -m found }}
"""
"""A 503 that is not the router's is the fronts' or HAProxy's own, before any token: fronts leave, start, have
no room. The line of such a pass names it, and ends nothing."""


def _decide_rules(paths: GatewayPaths, wait_rules: str = "") -> str:
    """Ask the router, and do what it says. Each line of them ends with a line feed."""
    return f"""  filter spoe engine route config {paths.spoe_config}
  http-request send-spoe-group route decide if is_generation !is_relayed {{ nbsrv({ROUTER_BACKEND}) gt 0 }}
  http-request return status 503 content-type application/json hdr retry-after %[var(txn.route.retry_after)] \
lf-string %[var(txn.route.refusal)] if {{ var(txn.route.refusal) -m found }}
  http-request return status 429 content-type application/json hdr retry-after %[var(txn.route.retry_after)] \
lf-string %[var(txn.route.limited)] if {{ var(txn.route.limited) -m found }}
  http-after-response set-header x-headrace-route %[var(txn.route.explanation)] \
if {{ var(txn.route.explanation) -m found }}
  http-request set-header {PLACE_HEADER} %[var(txn.route.place)] if {{ var(txn.route.place) -m found }}
{wait_rules}  use_backend %[var(txn.backend),concat({SHARED_SUFFIX})] if {{ var(txn.route.shared) -m found }}
"""
