"""The router's answers as HAProxy reads them: variables of the transaction, encoded. No I/O.

The other side of them is in `haproxy_frontend`. Must not know requests or connections.
"""

from __future__ import annotations

from urllib.parse import quote

from headrace.gateway.arrivals import Bound, Refused
from headrace.gateway.haproxy_answers import error_body
from headrace.gateway.spop import encode_actions

MAX_KEPT = 4096


class Answers:
    """Answers that name a server. Nearly all are among a few, so that they are encoded once."""

    def __init__(self) -> None:
        self._encoded: dict[tuple[str, str, bool], bytes] = {}

    def __repr__(self) -> str:
        return f"<Answers {len(self._encoded)} kept>"

    def bound(self, decision: Bound, *, is_shared: bool) -> bytes:
        """Return the answer; `is_shared`: the request may share an HTTP/2 connection with others."""
        if decision.explanation:
            return _encode(decision, is_shared)
        key = (decision.server_name, decision.place, is_shared)
        encoded = self._encoded.get(key)
        if encoded is None:
            if len(self._encoded) >= MAX_KEPT:
                self._encoded.clear()  # of servers that came and went
            encoded = self._encoded[key] = _encode(decision, is_shared)
        return encoded


def refusal(decision: Refused) -> bytes:
    """Return the answer that lets HAProxy refuse the request."""
    kind = "rate_limit_error" if decision.status == 429 else "server_error"
    body = error_body(decision.message, kind, decision.code)
    name = b"limited" if decision.status == 429 else b"refusal"
    retry_after = {b"retry_after": b"%d" % decision.retry_after_s}
    return encode_actions({name: body.encode(), **retry_after, **_eta(decision.eta_s)})


def parked(endpoint: str, eta_s: float) -> bytes:
    """Return the answer that lets HAProxy send a held stream to the relay, which waits with the client.

    `eta_s`: when a replica is expected; negative: not known.
    """
    variables = {b"wait": b"%.1f" % eta_s, b"wait_model": quote(endpoint, safe="").encode()}
    return encode_actions({**variables, **_eta(eta_s)})


def _eta(eta_s: float) -> dict[bytes, bytes]:
    return {b"eta": b"%.1f" % eta_s} if eta_s >= 0 else {}


def _encode(decision: Bound, is_shared: bool) -> bytes:
    variables = {b"server": decision.server_name.encode()}
    if decision.place:
        variables[b"place"] = decision.place.encode()
    if is_shared:
        variables[b"shared"] = b"1"
    if decision.explanation:
        variables[b"explanation"] = decision.explanation.encode()
    return encode_actions(variables)
