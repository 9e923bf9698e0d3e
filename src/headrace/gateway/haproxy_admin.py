"""HAProxy's frontend of the admin API, rendered: who has the admin key is relayed to the controller. Pure.

Must not know the API itself: the controller answers on a UNIX socket, and believes who comes there.
"""

from __future__ import annotations

from headrace.api.messages import GatewaySpec
from headrace.api.run_paths import ADMIN_HTTP_SOCKET
from headrace.gateway import haproxy_answers as answers
from headrace.gateway.haproxy_frontend import tls_options
from headrace.gateway.haproxy_words import bind_address, return_text
from headrace.gateway.paths import GatewayPaths

MAX_BODY_BYTES = 4 * 1024 * 1024
"""Longest body of an admin request: a whole config."""


def admin_sections(spec: GatewaySpec, paths: GatewayPaths) -> str:
    """Return the frontend and its backend."""
    challenge = ("www-authenticate", "Bearer")
    too_large = f"if {{ req.hdr_val(content-length) gt {MAX_BODY_BYTES} }}"
    unavailable = answers.error_body(
        "The controller does not answer right now; it is being restarted. Try again in a second.",
        "server_error",
        "controller_unavailable",
    )
    return f"""frontend headrace-admin
  bind {bind_address(spec.admin_bind)}{tls_options(spec, paths)}
  no log
  http-request del-header x-headrace- -m beg
  {return_text(401, answers.no_admin_key(), "unless { http_auth_bearer -m found }", challenge)}
  http-request set-var(txn.admin) http_auth_bearer,sha2(256),hex,lower,map_str({paths.admin_key_map})
  {return_text(401, answers.wrong_admin_key(), "unless { var(txn.admin) -m found }", challenge)}
  http-request del-header authorization
  {return_text(413, answers.admin_body_too_large(MAX_BODY_BYTES), too_large)}
  default_backend headrace-controller

backend headrace-controller
  timeout server 30s
  http-error status 503 content-type application/json string '{unavailable}' hdr retry-after 1
  server controller unix@{spec.run_dir}/{ADMIN_HTTP_SOCKET}
"""
