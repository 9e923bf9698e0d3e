"""HAProxy's grammar in small: quoting, answers by itself, addresses, times. Pure.

Must not know what is answered, or when.
"""

from __future__ import annotations

from headrace.api.notation import split_address
from headrace.errors import ConfigError

_RETURN = "http-request return status"


def return_text(status: int, body: str, condition: str, *headers: tuple[str, str]) -> str:
    """Return the rule that answers `body`, a JSON text, if `condition` holds."""
    extra = "".join(f" hdr {name} {quote(value)}" for name, value in headers)
    return f"{_RETURN} {status} content-type application/json{extra} string {quote(body)} {condition}"


def return_format(status: int, body: str, condition: str) -> str:
    """Like `return_text`; `body` may hold HAProxy's %[expressions]."""
    return f"{_RETURN} {status} content-type application/json lf-string {quote(body)} {condition}"


def quote(text: str) -> str:
    """Quote one word. Strong quotes take everything but a strong quote, which no answer of ours holds."""
    assert not {"'", "\n"} & set(text), f"cannot be quoted for HAProxy: {text!r}"
    return f"'{text}'"


def bind_address(value: str) -> str:
    """Return host:port as HAProxy wants it. Raises ConfigError without a port."""
    host, port = split_address(value)
    if port == 0:
        raise ConfigError(f"{value} names no port; HAProxy needs one from 1 to 65535")
    host = "127.0.0.1" if host == "localhost" else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def milliseconds(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"
