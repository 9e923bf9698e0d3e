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

DEFAULT_NAME = "default"
CONFIG_HELP = "The config, a YAML file. Without it only the environment and --set count."
ConfigPath = Annotated[Path | None, typer.Argument(help=CONFIG_HELP, metavar="[CONFIG]", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.FIELD=VALUE", help="Override one field of the config; repeatable."
    ),
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
    """Return where the running system called `name` keeps its files."""
    from headrace.fabric.run_directory import default_run_directory

    return default_run_directory(name)
