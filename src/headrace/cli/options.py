"""Options that several subcommands share, and how they find a config or a running system.

Must not know what the subcommands do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from headrace.api.config import Config
    from headrace.api.messages import AdminCommand, AdminReply

DEFAULT_NAME = "default"
CONFIG_HELP = "The config, a YAML file. Without it only the environment and --set count."
ConfigPath = Annotated[Path | None, typer.Argument(help=CONFIG_HELP, metavar="[CONFIG]", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.FIELD=VALUE", help="Override one field of the config; repeatable."
    ),
]
Address = Annotated[
    str, typer.Option("--address", help="host:port of the Ray cluster's head. Without it RAY_ADDRESS counts.")
]
Name = Annotated[str, typer.Option("--name", help="Which running system, when there are several.")]


def load(path: Path | None, settings: Sequence[str] | None) -> Config:
    """Read the config: file < environment < --set. Raises ConfigError."""
    from headrace.api.config_loader import load_config
    from headrace.errors import ConfigError

    environment = os.environ
    if path is None and not settings and not any(name.startswith("HEADRACE__") for name in environment):
        raise ConfigError("no config is given; try: headrace up examples/quickstart.yaml")
    return load_config(path, environment=environment, settings=settings or ())


def find_run_directory(name: str) -> Path:
    """Return where the system called `name` keeps its files: one that this machine holds, or one of a cluster
    whose controller is here."""
    from headrace.fabric.run_directory import default_run_directory
    from headrace.fabric.shared_run_directory import find_host_run_directory

    default = default_run_directory(name)
    return default if default.is_dir() else find_host_run_directory(name) or default


def find_local_run_directory(name: str) -> Path | None:
    """Return where the system called `name` keeps its files, if this machine holds it."""
    from headrace.fabric.run_directory import default_run_directory

    default = default_run_directory(name)
    return default if default.is_dir() else None


def ask_system(name: str, command: AdminCommand) -> AdminReply:
    """Ask the controller of the system called `name`: through its socket if it is on this machine, else
    through the cluster that RAY_ADDRESS says. Raises NotRunning or CommandRefused."""
    from headrace.control.admin import ask
    from headrace.control.specs import ADMIN_SOCKET

    path = find_run_directory(name)
    address = os.environ.get("RAY_ADDRESS", "")
    if (path / ADMIN_SOCKET).exists() or not address:
        return ask(path, command)
    import asyncio

    from headrace.control.cluster_system import ask_once

    return asyncio.run(ask_once(name, address, command))
