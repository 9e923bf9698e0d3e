"""`headrace config check` and `headrace config show`.

Must not know how configs are read (`headrace.api.config_loader`).
"""

from __future__ import annotations

import typer

from headrace.cli.options import ConfigPath, Settings, load

config_app = typer.Typer(
    help="Check a config, or show it with every default.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@config_app.command()
def check(config: ConfigPath = None, settings: Settings = None) -> None:
    """Say whether a config would work here: its fields, its models, the libraries they need."""
    from headrace.control.preflight import check_certificate, check_keys, check_models

    checked = check_keys(check_models(load(config, settings)))
    check_certificate(checked)
    for name, endpoint in checked.endpoints.items():
        count = f"{endpoint.replicas.min} to {endpoint.replicas.max} replicas"
        typer.echo(f"{name}: {endpoint.model} on the {endpoint.engine} engine, {count}")
    typer.echo(f"ok: would serve at {checked.gateway.bind}")


@config_app.command()
def show(config: ConfigPath = None, settings: Settings = None) -> None:
    """Print the whole resolved config as YAML, defaults included."""
    from headrace.api.config_loader import dump_config

    typer.echo(dump_config(load(config, settings)), nl=False)
