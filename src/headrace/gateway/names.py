"""Names inside HAProxy: endpoints become backends, replicas become servers. Pure, and reversible.

HAProxy allows letters, digits and `- _ . :` and uses `/` between backend and server; endpoint names may hold
`/`, so `_` is written `_u` and `/` is written `_s`.
"""

from __future__ import annotations

import re
from functools import lru_cache

ENDPOINT_PREFIX = "ep-"
"""Begins every backend of an endpoint, so that none can collide with the gateway's own backends."""
SHARED_SUFFIX = "_h2"
"""Ends an endpoint's second backend, and no other: in encoded names `_` stands only before `u` or `s`."""
REPLICA_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,159}")


def encode_name(name: str) -> str:
    return name.replace("_", "_u").replace("/", "_s")


def decode_name(name: str) -> str:
    return name.replace("_s", "/").replace("_u", "_")


def backend_name(endpoint: str, *, is_shared: bool = False) -> str:
    """Return the backend that holds an endpoint's servers: on HTTP/1.1, or (is_shared) on HTTP/2."""
    return ENDPOINT_PREFIX + encode_name(endpoint) + (SHARED_SUFFIX if is_shared else "")


def is_shared_backend(backend: str) -> bool:
    """Whether a backend holds an endpoint's servers on HTTP/2."""
    return backend.endswith(SHARED_SUFFIX)


@lru_cache(maxsize=1024)  # asked for each request, twice
def endpoint_of_backend(backend: str) -> str | None:
    """Return the endpoint of a backend, None if it is one of the gateway's own."""
    if not backend.startswith(ENDPOINT_PREFIX):
        return None
    return decode_name(backend.removeprefix(ENDPOINT_PREFIX).removesuffix(SHARED_SUFFIX))
