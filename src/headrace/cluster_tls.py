"""Mutual TLS between the hosts of one cluster: whoever holds the cluster's identity is one of us.

Owns the two contexts. All hosts have the same key and certificate (`fabric/cluster_identity.py` derives them
from the cluster's secret), so that certificate alone is trusted, and names of hosts mean nothing.
Must not know what is said over the connections.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from headrace.errors import ConfigError


def server_context(identity: Path) -> ssl.SSLContext:
    """Return the context of a listener. identity: PEM file of key and certificate. Raises ConfigError."""
    return _context(ssl.PROTOCOL_TLS_SERVER, identity)


def client_context(identity: Path) -> ssl.SSLContext:
    """Return the context of a connection to another host. Raises ConfigError."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, identity)


def _context(protocol: int, identity: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the key is the name
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(identity)
        context.load_verify_locations(identity)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the cluster's identity {identity} cannot be used: {error}") from error
    return context
