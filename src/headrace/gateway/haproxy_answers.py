"""What HAProxy says by itself: the model list, and errors in OpenAI's JSON shape. Pure text.

Also the format of the completion log. Must not know HAProxy's configuration grammar beyond %[expressions].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
STATUS_PATHS = ("/v1/models", "/health", "/ready", "/version")
MAX_NAMES_SHOWN = 30
MODEL_CREATED_S = 1_700_000_000
"""OpenAI's model objects need a creation time; an endpoint has none that a client could use."""

COMPLETION_LOG_FORMAT = (
    '{"id":"%ID","client_id":"%[var(txn.client_id)]","tenant":"%[var(txn.tenant)]","path":"%HP",'
    '"backend":"%[var(txn.backend)]","server":"%s","status":%ST,"termination":"%ts","request_ms":%TR,'
    '"wait_ms":%Tw,"connect_ms":%Tc,"first_byte_ms":%Tr,"total_ms":%Ta,"bytes_in":%U,"bytes_out":%B,'
    '"retries":"%rc","refused":"%[var(txn.refused)]"}'
)
"""One line of JSON per request at its end (HAProxy 2.8, configuration manual 8.2.4)."""


def to_json(value: Any) -> str:
    """Return compact ASCII JSON that HAProxy's strong quotes can carry."""
    return json.dumps(value, separators=(",", ":")).replace("'", "\\u0027")


def error_body(
    message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
) -> str:
    """Return an error in OpenAI's shape."""
    return to_json({"error": {"message": message, "type": kind, "param": param, "code": code}})


def model_card(name: str) -> str:
    return to_json({"id": name, "object": "model", "created": MODEL_CREATED_S, "owned_by": "headrace"})


def models_list(names: Iterable[str]) -> str:
    cards = ",".join(model_card(name) for name in names)
    return f'{{"object":"list","data":[{cards}]}}'


def unknown_model(names: Sequence[str], model: str) -> str:
    """404 for a model that is not served. `model`: text or an expression that is safe inside JSON."""
    known = ", ".join(names[:MAX_NAMES_SHOWN])
    if len(names) > MAX_NAMES_SHOWN:
        known += f" and {len(names) - MAX_NAMES_SHOWN} more"
    known = f"Known models: {known}." if names else "See /v1/models for the known ones."
    body = error_body(f"The model `@` does not exist. {known}", code="model_not_found", param="model")
    return body.replace("%", "%%").replace("@", model)


def model_required() -> str:
    return error_body(
        "No string field `model` was found in the body, which must be a JSON object. "
        "Several models are served: name one.",
        code="model_required",
        param="model",
    )


def no_key() -> str:
    return error_body(
        "No API key was sent. Send `Authorization: Bearer KEY`; whoever runs this system makes one with "
        "`headrace keys create`.",
        code="invalid_api_key",
    )


def unknown_key() -> str:
    """401 for a key that is not, or no longer, valid. It is not shown: it may be a mistyped valid one."""
    return error_body(
        "This API key is not valid. Check it, or ask whoever runs this system for another one.",
        code="invalid_api_key",
    )


def no_admin_key() -> str:
    return error_body(
        "The admin API needs the admin key: `headrace keys admin` says where it is. Send it as "
        "`Authorization: Bearer KEY`.",
        code="invalid_api_key",
    )


def wrong_admin_key() -> str:
    return error_body(
        "This is not the admin key. Tenants' keys do not count here; `headrace keys admin` says where the "
        "admin key is.",
        code="invalid_api_key",
    )


def admin_body_too_large(max_bytes: int) -> str:
    return error_body(f"The body is longer than {max_bytes} bytes, the limit.", code="payload_too_large")


def unknown_path(known: Sequence[str] = (*GENERATION_PATHS, *STATUS_PATHS)) -> str:
    return error_body(f"This path does not exist. Known paths: {', '.join(known)}.", code="not_found")


def method_not_allowed(allowed: str) -> str:
    return error_body(f"This path does not take this method. Use {allowed}.", code="method_not_allowed")


def body_too_large(max_bytes: int) -> str:
    return error_body(
        f"The body is longer than {max_bytes} bytes, the limit (gateway.max_body_mb).",
        code="payload_too_large",
    )


def url_too_long(max_bytes: int) -> str:
    return error_body(f"The URL is longer than {max_bytes} bytes, the limit.", code="uri_too_long")


def too_many_connections(limit: int) -> str:
    return error_body(
        f"More than {limit} connections are open from your address, the limit "
        "(gateway.max_connections_per_address). Close some, or wait for answers.",
        "rate_limit_error",
        "too_many_connections",
    )


def headers_too_large(max_bytes: int) -> str:
    return error_body(f"The headers are longer than {max_bytes} bytes, the limit.", code="payload_too_large")


HAPROXY_ERRORS = {
    400: error_body("This is not valid HTTP/1.1, or its headers are too long.", code="bad_request"),
    408: error_body("The request was not complete in time. Send the whole body.", code="request_timeout"),
    413: error_body("The request is too large.", code="payload_too_large"),
    500: error_body("The gateway failed on this request.", "server_error", "internal_error"),
    502: error_body(
        "The replica that served this request is gone. Send it again.", "server_error", "replica_lost"
    ),
    503: error_body(
        "No replica can take this request now. Send it again after Retry-After seconds.",
        "server_error",
        "overloaded",
    ),
    504: error_body("The replica gave no answer in time.", "server_error", "timeout"),
}
"""Answers to what goes wrong inside HAProxy itself, by status."""
