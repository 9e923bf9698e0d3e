"""Where the gateway's files and sockets are inside the run directory. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from headrace.errors import ConfigError

MAX_RUN_DIR_LENGTH = 70
"""A UNIX socket's path has at most 107 bytes, and HAProxy appends a suffix while it binds."""
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/-]*")


@dataclass(frozen=True, slots=True)
class GatewayPaths:
    """Every file and socket of the gateway inside the run directory."""

    run_dir: str

    def path(self, name: str) -> str:
        return str(PurePosixPath(self.run_dir) / name)

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
    def models(self) -> str:
        return self.path("models.json")

    @property
    def model_map(self) -> str:
        return self.path("models.map")

    @property
    def runtime_socket(self) -> str:
        return self.path("haproxy.sock")

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
        return self.path("router.sock")

    @property
    def metrics_socket(self) -> str:
        return self.path("metrics.sock")

    @property
    def relay_socket(self) -> str:
        """Where the relay takes requests whose model is not in the head of their body."""
        return self.path("relay.sock")

    @property
    def internal_socket(self) -> str:
        """HAProxy's listener for the relay alone: what its headers say of identity is believed."""
        return self.path("internal.sock")

    @property
    def controller_socket(self) -> str:
        return self.path("controller.sock")


def check_run_dir(run_dir: str) -> None:
    """Raise ConfigError if sockets and files of the gateway cannot live in this directory."""
    if len(run_dir.encode()) > MAX_RUN_DIR_LENGTH or not _PLAIN_PATH.fullmatch(run_dir):
        raise ConfigError(
            f"the run directory is {run_dir!r}; it must be an absolute path of at most {MAX_RUN_DIR_LENGTH} "
            "bytes, of letters, digits and . _ / -, because UNIX sockets and HAProxy's files allow no more. "
            "Set TMPDIR to a short directory."
        )
