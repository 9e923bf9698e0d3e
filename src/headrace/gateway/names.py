"""Names inside HAProxy: endpoints become backends, replicas become servers. Pure, and reversible.

HAProxy allows letters, digits and `- _ . :` and uses `/` between backend and server; endpoint names may hold
`/`, so `_` is written `_u` and `/` is written `_s`.
"""

from __future__ import annotations

import re

ENDPOINT_PREFIX = "ep-"
"""Begins every backend of an endpoint, so that none can collide with the gateway's own backends."""
_SHARED_SUFFIX = "_h2"
"""No replica's name ends so: in encoded names an `_` stands only before `u` or `s`."""
REPLICA_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,159}")


def encode_name(name: str) -> str:
    return name.replace("_", "_u").replace("/", "_s")


def decode_name(name: str) -> str:
    return name.replace("_s", "/").replace("_u", "_")


def shared_name(server_name: str) -> str:
    """Return the name of a replica's second server, whose connections carry many streams (HTTP/2)."""
    return server_name + _SHARED_SUFFIX


def split_shared_name(server_name: str) -> tuple[str, bool]:
    """Return the name of a replica's first server, and whether `server_name` is the second one's."""
    name = server_name.removesuffix(_SHARED_SUFFIX)
    return name, name != server_name


def backend_name(endpoint: str) -> str:
    """Return the backend that holds an endpoint's servers."""
    return ENDPOINT_PREFIX + encode_name(endpoint)


def endpoint_of_backend(backend: str) -> str | None:
    """Return the endpoint of a backend, None if it is one of the gateway's own."""
    if not backend.startswith(ENDPOINT_PREFIX):
        return None
    return decode_name(backend.removeprefix(ENDPOINT_PREFIX))
