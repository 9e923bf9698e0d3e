"""Names inside the run directory that more than one process must know. Pure."""

from __future__ import annotations

from hashlib import sha256

MAX_SOCKET_PATH_BYTES = 100
"""The kernel takes 107 (unix(7), sun_path); HAProxy wants room for a suffix."""


RUN_DIR_PLACEHOLDER = "@RUN_DIR@"
"""Stands in a ProcessSpec for the run directory of the host that gets it, which puts its own in."""
PYTHON_PLACEHOLDER = "@PYTHON@"
"""Stands for the host's own Python."""
HOST_PLACEHOLDER = "@HOST@"
"""Stands for the address that fronts of the host listen on while all gateways are beside the controller:
loopback there, and elsewhere the one by which other hosts know it."""
NODE_PLACEHOLDER = "@NODE@"
"""Stands for the address by which other hosts know the host."""
NODE_HOST = "node"
"""In an address of a gateway, as users write it: the address of the node that holds it, whichever that is."""
KEEPER_PLACEHOLDER = "@KEEPER@"
"""Stands for a word that no two keepers have: what a process finds of another keeper's is out of date."""
IDENTITY_PLACEHOLDER = "@IDENTITY@"
"""Stands for the path of the cluster's identity where fronts of the host show it; else for nothing."""

CONTROLLER_SOCKET = "controller.sock"
ADMIN_HTTP_SOCKET = "admin-http.sock"
HEARTBEAT_FILE = "controller.beat"
"""The controller touches it once a second."""
LOG_DIRECTORY = "logs"
IDENTITY_FILE = "cluster.pem"
"""The key and certificate that all hosts of a cluster share (`fabric.cluster_identity`), mode 0600."""
_ROUTER_SOCKET = "router.sock"


def gateway_directory(run_dir: str, gateway_id: str) -> str:
    """Return where one gateway's sockets and files are."""
    return f"{run_dir}/{gateway_id}"


def router_socket_path(run_dir: str, gateway_id: str) -> str:
    """Return the path of the UNIX socket on which a gateway's router takes load reports."""
    return f"{gateway_directory(run_dir, gateway_id)}/{_ROUTER_SOCKET}"


def alive_socket_path(run_dir: str, gateway_id: str) -> str:
    """Return the path of the UNIX socket on which a gateway's HAProxy says that it lives: the public port is
    shared with the other gateways."""
    return f"{gateway_directory(run_dir, gateway_id)}/alive.sock"


def runtime_socket_path(run_dir: str, gateway_id: str) -> str:
    """Return the path of the UNIX socket of a HAProxy's runtime API."""
    return f"{gateway_directory(run_dir, gateway_id)}/haproxy.sock"


def relay_socket_path(run_dir: str, gateway_id: str) -> str:
    """Return the path of the UNIX socket on which a gateway's relay takes requests."""
    return f"{gateway_directory(run_dir, gateway_id)}/relay.sock"


def front_socket_path(run_dir: str, replica_id: str) -> str:
    """Return the path of the UNIX socket on which a front serves gateways of its own machine; empty if that
    is too long for a socket: then there is only the TCP address."""
    return _replica_socket_path(run_dir, "front", replica_id)


def peer_socket_path(run_dir: str, replica_id: str) -> str:
    """Return the path of the UNIX socket on which a front takes its siblings' streams into its engine; empty
    if that is too long for a socket: then it takes none."""
    return _replica_socket_path(run_dir, "peer", replica_id)


def rank_socket_path(run_dir: str, replica_id: str) -> str:
    """Return the path of the UNIX socket on which a replica's engine finds the ranks that a launcher placed.
    Short, so that it fits in any run directory, also one that is not known yet."""
    return f"{run_dir}/ranks-{sha256(replica_id.encode()).hexdigest()[:8]}.sock"


def _replica_socket_path(run_dir: str, kind: str, replica_id: str) -> str:
    """An id that is too long for a socket's name, or that would lead out of the directory, is replaced by its
    hash."""
    path = f"{run_dir}/{kind}-{replica_id}.sock"
    if "/" in replica_id or len(path.encode()) > MAX_SOCKET_PATH_BYTES:
        path = f"{run_dir}/{kind}-{sha256(replica_id.encode()).hexdigest()[:16]}.sock"
    return path if len(path.encode()) <= MAX_SOCKET_PATH_BYTES else ""
