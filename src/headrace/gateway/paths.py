"""Where one gateway's files and sockets are inside the system's run directory. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from headrace.api.run_paths import (
    CONTROLLER_SOCKET,
    LOG_DIRECTORY,
    alive_socket_path,
    gateway_directory,
    relay_socket_path,
    router_socket_path,
    runtime_socket_path,
)
from headrace.errors import ConfigError

MAX_RUN_DIR_LENGTH = 70
"""A UNIX socket's path has at most 107 bytes; `/g16/haproxy-master.sock` and the suffix that HAProxy appends
while it binds (`.PID.tmp`) take 36."""
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/-]*")


@dataclass(frozen=True, slots=True)
class GatewayPaths:
    """Every file and socket of one gateway. Those of its own are in a directory named after it, so that
    gateways share nothing."""

    run_dir: str
    """The system's."""
    gateway_id: str = "g1"

    @property
    def directory(self) -> str:
        return gateway_directory(self.run_dir, self.gateway_id)

    def path(self, name: str) -> str:
        return f"{self.directory}/{name}"

    def log(self, name: str) -> str:
        """Logs of all processes of a system are in one directory."""
        return f"{self.run_dir}/{LOG_DIRECTORY}/{name}"

    @property
    def config(self) -> str:
        return self.path("haproxy.cfg")

    @property
    def spoe_config(self) -> str:
        return self.path("spoe.conf")

    @property
    def endpoint_map(self) -> str:
        return self.path("endpoints.map")

    @property
    def key_map(self) -> str:
        return self.path("keys.map")

    @property
    def admin_key_map(self) -> str:
        return self.path("admin-keys.map")

    @property
    def tenant_map(self) -> str:
        return self.path("tenants.map")

    @property
    def models(self) -> str:
        return self.path("models.json")

    @property
    def model_map(self) -> str:
        return self.path("models.map")

    @property
    def runtime_socket(self) -> str:
        return runtime_socket_path(self.run_dir, self.gateway_id)

    @property
    def master_socket(self) -> str:
        return self.path("haproxy-master.sock")

    @property
    def spoe_socket(self) -> str:
        return self.path("spoe.sock")

    @property
    def completions_socket(self) -> str:
        return self.path("completions.sock")

    @property
    def router_socket(self) -> str:
        return router_socket_path(self.run_dir, self.gateway_id)

    @property
    def alive_socket(self) -> str:
        return alive_socket_path(self.run_dir, self.gateway_id)

    @property
    def metrics_socket(self) -> str:
        return self.path("metrics.sock")

    @property
    def request_log(self) -> str:
        """One JSON line per request."""
        return self.log(f"requests-{self.gateway_id}.jsonl")

    @property
    def certificate(self) -> str:
        """Certificate, chain and key of the public address in one file, as HAProxy loads them."""
        return self.path("gateway.pem")

    @property
    def relay_socket(self) -> str:
        """Where the relay takes requests whose model is not in the head of their body."""
        return relay_socket_path(self.run_dir, self.gateway_id)

    @property
    def internal_socket(self) -> str:
        """HAProxy's listener for the relay alone: what its headers say of identity is believed."""
        return self.path("internal.sock")

    @property
    def controller_socket(self) -> str:
        return f"{self.run_dir}/{CONTROLLER_SOCKET}"


def check_run_dir(run_dir: str) -> None:
    """Raise ConfigError if sockets and files of the gateway cannot live in this directory."""
    if len(run_dir.encode()) > MAX_RUN_DIR_LENGTH or not _PLAIN_PATH.fullmatch(run_dir):
        raise ConfigError(
            f"the run directory is {run_dir!r}; it must be an absolute path of at most {MAX_RUN_DIR_LENGTH} "
            "bytes, of letters, digits and . _ / -, because UNIX sockets and HAProxy's files allow no more. "
            "Set TMPDIR to a short directory."
        )
