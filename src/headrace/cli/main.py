"""The `headrace` command: which subcommands there are, and how a user's mistake is told.

Owns exit statuses: 0 done, 1 failed, 2 the command or the config is wrong. Subcommands are imported when they
are used, so that each starts fast. Must not know what they do.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import headrace
from headrace.errors import ConfigError, HeadraceError

EXIT_FAILED = 1
EXIT_MISTAKE = 2
COMMANDS = {
    "up": ("headrace.cli.up", "up"),
    "down": ("headrace.cli.down", "down"),
    "apply": ("headrace.cli.change", "apply"),
    "scale": ("headrace.cli.change", "scale"),
    "sleep": ("headrace.cli.change", "sleep"),
    "wake": ("headrace.cli.change", "wake"),
    "rollout": ("headrace.cli.rollout", "rollout_app"),
    "status": ("headrace.cli.status", "status"),
    "keys": ("headrace.cli.keys", "keys_app"),
    "chat": ("headrace.cli.chat", "chat"),
    "bench": ("headrace.cli.bench", "bench"),
    "config": ("headrace.cli.config", "config_app"),
    "version": ("headrace.cli.main", "version"),
}
"""Subcommand -> module and function (or Typer app), in the order of the help."""


class LazyGroup(TyperGroup):
    """A group that imports a subcommand's module when the subcommand is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        target = getattr(importlib.import_module(module), attribute)
        if not isinstance(target, typer.Typer):
            single = typer.Typer(add_completion=False, rich_markup_mode=None)
            single.command(cmd_name)(target)
            target = single
        command = typer.main.get_command(target)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=LazyGroup,
    name="headrace",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve open large language models behind one OpenAI-compatible address."""


def version() -> None:
    """Print the version."""
    typer.echo(f"headrace {headrace.__version__}")


def main() -> None:
    """Run the command line; tell mistakes in a sentence, without a traceback."""
    try:
        app()
    except ConfigError as error:
        fail(error, EXIT_MISTAKE)
    except HeadraceError as error:
        fail(error, EXIT_FAILED)
    except BrokenPipeError:  # `headrace status | head`
        sys.stderr.close()
        sys.exit(EXIT_FAILED)


def fail(error: Exception, status: int) -> None:
    """Print `error` and end."""
    for line in str(error).splitlines() or [type(error).__name__]:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
