"""What can be known to fail before any process is started: models, the engine's libraries, the address.

Owns these checks and their messages. Must not know: processes.
"""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path

from headrace.api.config import Config
from headrace.api.endpoint_config import Endpoint
from headrace.api.notation import split_address
from headrace.control.key_store import KeyStore, state_directory
from headrace.engine.lora import rank_of
from headrace.engine.model_files.resolve import resolve_model
from headrace.errors import ConfigError, ModelError
from headrace.gateway.certificate import load_certificate
from headrace.gateway.process import check_port_is_free

_PORT_ATTEMPTS = 20
"""For free metrics ports that follow each other, when any will do (port 0)."""


def check_models(config: Config) -> Config:
    """Return `config` with absolute paths of models and certificate. Raises ConfigError with every model that
    cannot be had."""
    problems: list[str] = []
    endpoints: dict[str, Endpoint] = {}
    for name, endpoint in config.endpoints.items():
        path = f"endpoints.{name}"
        if endpoint.engine == "native" and importlib.util.find_spec("torch") is None:
            problems.append(
                f"{path}.engine: native needs torch; install it with: pip install headrace[engine]"
            )
        if endpoint.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            problems.append(
                f"{path}.engine: vllm needs vLLM; install it with: pip install headrace[vllm] (for CPUs see "
                "docs/guides/vllm.md)"
            )
        try:
            files = resolve_model(endpoint.model)
            if endpoint.engine == "vllm" and files.format != "huggingface":
                problems.append(
                    f"{path}.model: {endpoint.model!r} is a {files.format} model; engine vllm takes a "
                    "Hugging Face id, or a directory with config.json, tokenizer.json and *.safetensors"
                )
        except ModelError as error:
            problems.append(f"{path}.model: {error}")
        vllm = endpoint.vllm.model_copy(update={"lora": _checked_adapters(path, endpoint, problems)})
        endpoints[name] = endpoint.model_copy(update={"model": _absolute(endpoint.model), "vllm": vllm})
    if problems:
        raise ConfigError(problems)
    tls = config.gateway.tls
    if tls is not None:
        paths = {name: os.path.abspath(os.path.expanduser(path)) for name, path in tls.model_dump().items()}
        tls = tls.model_copy(update=paths)
    gateway = config.gateway.model_copy(update={"tls": tls})
    return config.model_copy(update={"endpoints": endpoints, "gateway": gateway})


def check_certificate(config: Config) -> None:
    """Raise ConfigError unless the public address's certificate, if there is one, can be used now."""
    if config.gateway.tls is not None:
        load_certificate(config.gateway.tls.certificate, config.gateway.tls.key, time.time())


def check_keys(config: Config) -> Config:
    """Return `config` with an absolute state_dir; if the admin API is on, its key is made
    there the first time.

    Raises ConfigError if the keys there cannot be used.
    """
    directory = state_directory(config.state_dir, os.environ)
    store = KeyStore(directory)
    if config.tenants:
        store.read()
    if config.gateway.admin_bind:
        store.create_admin_key()
        store.admin_key_hash()
    return config.model_copy(update={"state_dir": str(directory)})


def check_address(config: Config) -> Config:
    """Return `config` with a free port in place of port 0. Raises ConfigError if an address cannot be had, or
    its certificate cannot be used, or gateways are to be on other machines."""
    if config.gateway.placement is not None:
        raise ConfigError(
            f"gateway.placement is set, and launcher is {config.launcher}, which has this machine only. Set "
            "launcher: ray (headrace up --launcher ray), or remove gateway.placement"
        )
    check_certificate(config)
    gateway = config.gateway
    bind = _check_bind("gateway.bind", gateway.bind)
    metrics_bind = _check_metrics_binds(gateway.metrics_bind, gateway.count) if gateway.metrics_bind else ""
    admin_bind = _check_bind("gateway.admin_bind", gateway.admin_bind) if gateway.admin_bind else ""
    addresses = {"bind": bind, "metrics_bind": metrics_bind, "admin_bind": admin_bind}
    changed = gateway.model_copy(update=addresses)
    return config.model_copy(update={"gateway": changed})


def _checked_adapters(path: str, endpoint: Endpoint, problems: list[str]) -> dict[str, str]:
    """Return the adapters with absolute paths; what is wrong with them is added to `problems`."""
    found = {name: Path(text).expanduser().absolute() for name, text in endpoint.vllm.lora.items()}
    for name, directory in found.items():
        try:
            rank_of(name, directory)
        except ConfigError as error:
            problems.append(f"{path}.{error}")
    return {name: str(directory) for name, directory in found.items()}


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
    return f"{bind.rpartition(':')[0]}:{check_port_is_free(bind, field)}"
