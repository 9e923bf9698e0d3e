"""How addresses and tenants' names are written, checked.

Must not import the config tree: its library takes a fifth of a second of CPU time to import, and fronts,
keepers and routers need these words alone.
"""

from __future__ import annotations

import ipaddress
import re

from headrace.api.run_paths import NODE_HOST
from headrace.errors import ConfigError

TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def split_host_port(value: str, field: str) -> tuple[str, int]:
    """Split `host:port` of somebody else, whose host may be a name. Raises ConfigError."""
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) <= 65535:
        raise ConfigError(f"{field} is {value!r}; it must be host:port, for example 10.0.0.1:6379, or auto")
    return host.removeprefix("[").removesuffix("]"), int(port)


def split_bind(value: str) -> tuple[str, int]:
    """Split the address of a gateway: `host:port`, or `node:port`. Raises ValueError."""
    host, separator, port = value.rpartition(":")
    if host == NODE_HOST and separator:
        return host, split_address(f"0.0.0.0:{port}")[1]
    return split_address(value)


def split_address(value: str) -> tuple[str, int]:
    """Split `host:port` (`[::1]:8000` for IPv6). Raises ValueError that says what is allowed."""
    host, separator, port = value.rpartition(":")
    if not separator or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError(f"{value!r} is not host:port; write for example 127.0.0.1:8000")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if host != "localhost":
            raise ValueError(
                f"{host!r} is not an IP address; use 127.0.0.1, [::1], 0.0.0.0 or localhost"
            ) from None
    return host, int(port)
