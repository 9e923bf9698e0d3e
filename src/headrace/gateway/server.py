"""One replica as HAProxy sees it: its name, address and options, in HAProxy's words. Pure.

A replica that speaks HTTP/2 is two servers at one address, in two backends of its endpoint. Connections of
the second are shared between clients, and HAProxy 2.8 stops reading all streams of such a connection when
one client does not take 260,000 bytes of its answer. So only the router sends there, and only what is
certainly shorter (ADR 14); by itself HAProxy balances over the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from headrace.gateway.names import backend_name, encode_name

_ON_REFUSAL = "observe layer4 error-limit 1 on-error mark-down"
UNIX_ADDRESS = "-:0"
"""How `show servers state` writes the address of a server on a UNIX socket."""


def identity_options(identity: str) -> str:
    """Return how a server of another host is reached: it must show the cluster's key, and we show ours."""
    return f"ssl crt {identity} ca-file {identity} verify required check-ssl"


@dataclass(frozen=True, slots=True, order=True)
class Server:
    """One replica as HAProxy sees it. `max_open` 0: unlimited."""

    endpoint: str
    replica_id: str
    host: str
    port: int
    max_open: int = 0
    socket_path: str = ""
    """UNIX socket of a replica on this machine: about half the kernel's work per token of loopback TCP, and
    only its owner may open it. Empty: TCP."""

    is_shared: bool = False
    """Reached on HTTP/2."""
    identity: str = ""
    """PEM file with which the hosts of a cluster know each other: what is not on this machine is reached with
    it. Empty: plain TCP."""
    is_backup: bool = False
    """HAProxy by itself sends there only when there is no other kind; the router may at any time."""

    @property
    def name(self) -> str:
        """Its name inside its backend."""
        return encode_name(self.replica_id)

    @property
    def path(self) -> str:
        """`backend/server`, the name that the runtime API uses."""
        return f"{backend_name(self.endpoint, is_shared=self.is_shared)}/{self.name}"

    @property
    def shared(self) -> Server:
        """The same replica, reached on HTTP/2."""
        return replace(self, is_shared=True)

    @property
    def address(self) -> str:
        """Where HAProxy connects to."""
        return f"unix@{self.socket_path}" if self.socket_path else self.tcp_address

    @property
    def tcp_address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def shown_address(self) -> str:
        """The address in `show servers state`, which does not name UNIX sockets."""
        return UNIX_ADDRESS if self.socket_path else self.tcp_address

    @property
    def options(self) -> str:
        """Options after the address, the same in the file and for `add server`.

        A refused connection takes the server out at once, so that retries go elsewhere even while it has the
        fewest connections; a check brings it back within downinter.
        """
        limit = f" maxconn {self.max_open}" if self.max_open else ""
        protocol = "proto h2 " if self.is_shared else ""
        if self.identity and not self.socket_path:
            # HAProxy 2.8's check on HTTP/2 over TLS never gets beyond the preface; fronts take both.
            protocol += f"{identity_options(self.identity)} {'check-proto h1 ' if self.is_shared else ''}"
        backup = "backup " if self.is_backup else ""
        checks = "check inter 1s fastinter 200ms downinter 200ms fall 2 rise 1"
        return f"{protocol}{backup}{checks} {_ON_REFUSAL}{limit}"
