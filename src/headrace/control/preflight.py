"""What can be known to fail before any process is started: models, the engine's libraries, the address.

Owns these checks and their messages. Must not know: processes.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
from pathlib import Path

from headrace.api.config import Config, Endpoint, split_address
from headrace.engine.model_files.resolve import resolve_model
from headrace.errors import ConfigError, ModelError

_PORT_ATTEMPTS = 20
"""For free metrics ports that follow each other, when any will do (port 0)."""


def check_models(config: Config) -> Config:
    """Return `config` with absolute model paths. Raises ConfigError with every model that cannot be had."""
    problems: list[str] = []
    endpoints: dict[str, Endpoint] = {}
    for name, endpoint in config.endpoints.items():
        path = f"endpoints.{name}"
        if endpoint.engine == "native" and importlib.util.find_spec("torch") is None:
            problems.append(
                f"{path}.engine: native needs torch; install it with: pip install headrace[engine]"
            )
        try:
            resolve_model(endpoint.model)
        except ModelError as error:
            problems.append(f"{path}.model: {error}")
        endpoints[name] = endpoint.model_copy(update={"model": _absolute(endpoint.model)})
    if problems:
        raise ConfigError(problems)
    return config.model_copy(update={"endpoints": endpoints})


def check_address(config: Config) -> Config:
    """Return `config` with a free port in place of port 0. Raises ConfigError if an address cannot be had."""
    gateway = config.gateway
    bind = _check_bind("gateway.bind", gateway.bind)
    metrics_bind = _check_metrics_binds(gateway.metrics_bind, gateway.count) if gateway.metrics_bind else ""
    changed = gateway.model_copy(update={"bind": bind, "metrics_bind": metrics_bind})
    return config.model_copy(update={"gateway": changed})


def _absolute(model: str) -> str:
    """The controller outlives this working directory, and `apply` may come from another one."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() and resolve_model(model).path == path else model


def _check_metrics_binds(bind: str, count: int) -> str:
    """Each gateway has a metrics port of its own: this one and the `count - 1` that follow."""
    field = "gateway.metrics_bind"
    host, port = bind.rpartition(":")[0], split_address(bind)[1]
    if port + count - 1 > 65_535:
        raise ConfigError(
            f"{field}: {bind} and the {count - 1} ports after it, one per gateway, go beyond 65535; "
            "choose a lower port"
        )
    for attempt in range(_PORT_ATTEMPTS):
        first = _check_bind(field, bind)
        first_port = split_address(first)[1]
        try:
            for number in range(1, count):
                _check_bind(field, f"{host}:{first_port + number}")
        except (ConfigError, OverflowError):
            if port != 0 or attempt == _PORT_ATTEMPTS - 1:
                raise
        else:
            break
    return first


def _check_bind(field: str, bind: str) -> str:
    host, port = split_address(bind)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConfigError(_explain(field, bind, port, error)) from None
        free_port = listener.getsockname()[1]
    return f"{bind.rpartition(':')[0]}:{free_port}"


def _explain(field: str, bind: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        other = f"{bind.rpartition(':')[0]}:{port + 1 if port < 65535 else 0}"
        return (
            f"{field}: {bind} is in use by another program. Stop it, or choose another: --set {field}={other}"
        )
    if error.errno == errno.EACCES:
        return f"{field}: {bind} is not allowed for user {os.getuid()}; ports below 1024 belong to root"
    return f"{field}: {bind} cannot be used: {error.strerror}"
