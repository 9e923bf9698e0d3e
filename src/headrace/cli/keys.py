"""`headrace keys create`, `list` and `revoke`: API keys of tenants, with or without a running system.

A new key is the only thing on stdout, so that it can be piped; all words go to stderr. Must not know how keys
are kept.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.options import DEFAULT_NAME, find_run_directory, load

if TYPE_CHECKING:
    from headrace.api.config import Config
    from headrace.api.messages import AdminReply, KeyInfo
    from headrace.control.identity import KeyCommand

keys_app = typer.Typer(
    help="Make, list and revoke the API keys of tenants.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="The config, for when no system runs: it names the tenants and state_dir.",
        show_default=False,
    ),
]
System = Annotated[str, typer.Option("--system", help="Which running system, when there are several.")]


@keys_app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="The tenant's name.", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="What the key is for, to tell it from others.")] = "",
    config: ConfigOption = None,
    system: System = DEFAULT_NAME,
) -> None:
    """Make a key and print it. It is shown this once: only its hash is kept."""
    from headrace.api.messages import CreateKey

    reply = _obey(CreateKey(tenant, name), config, system)
    typer.echo(reply.key)
    _tell(f"{reply.keys[0].key_id} of tenant {tenant}; keep the key above, it is shown this once")


@keys_app.command("list")
def list_keys(
    tenant: Annotated[str, typer.Argument(help="Only this tenant's keys.", show_default=False)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    config: ConfigOption = None,
    system: System = DEFAULT_NAME,
) -> None:
    """Show which keys there are: their ids and where they come from, never the keys."""
    from headrace.api.messages import ListKeys

    reply = _obey(ListKeys(tenant), config, system)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(reply.keys), indent=2).decode())
    else:
        for line in _table(reply.keys):
            typer.echo(line)
    for note in reply.notes:
        _tell(note)


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `headrace keys list` shows it.")],
    config: ConfigOption = None,
    system: System = DEFAULT_NAME,
) -> None:
    """Make a key invalid. Streams that it opened go on to their end; its next request gets 401."""
    from headrace.api.messages import RevokeKey

    reply = _obey(RevokeKey(key_id), config, system)
    _tell(f"{key_id} of tenant {reply.keys[0].tenant} is revoked; its open streams go on to their end")


@keys_app.command("admin")
def admin_key(
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Make a new one; the old one stops working.")
    ] = False,
    config: ConfigOption = None,
    system: System = DEFAULT_NAME,
) -> None:
    """Print the file that holds the admin API's key. It is made on first use, readable by you alone."""
    from headrace.control.key_store import KeyStore, state_directory

    known = _find_config(config, system)
    setting = known.state_dir if known is not None else os.environ.get("HEADRACE__STATE_DIR", "")
    store = KeyStore(state_directory(setting, os.environ))
    store.create_admin_key(replace=rotate)
    store.admin_key_hash()  # complains about a file that would not be believed
    path = store.admin_key_path()
    typer.echo(str(path))
    if known is not None and known.gateway.admin_bind:
        url = f"{'https' if known.gateway.tls else 'http'}://{known.gateway.admin_bind}"
        _tell(f'curl -s {url}/admin/v1/status -H "authorization: Bearer $(cat {path})"')
    else:
        _tell("the admin API is off; set gateway.admin_bind, for example to 127.0.0.1:8001")


def _find_config(config_path: Path | None, system: str) -> Config | None:
    """Return the config that is given, or the running system's; None: neither is there."""
    from headrace.control.applied import read_config
    from headrace.control.specs import CONFIG_FILE

    run_directory = find_run_directory(system)
    if config_path is not None:
        return load(config_path, None)
    return read_config(run_directory) if (run_directory / CONFIG_FILE).exists() else None


def _obey(command: KeyCommand, config_path: Path | None, system: str) -> AdminReply:
    """Ask the running system; if there is none, change the keys' file, which it reads when it starts."""
    from headrace.control.admin import NoAnswer, NotRunning, ask
    from headrace.control.identity import Identity, open_identity
    from headrace.control.key_store import state_directory

    try:
        return ask(find_run_directory(system), command)
    except NoAnswer:
        raise  # it may have been done: doing it again could make a second key
    except NotRunning:
        pass
    config = _find_config(config_path, system)  # of a system whose controller is just being restarted
    if config is None:
        directory = state_directory(os.environ.get("HEADRACE__STATE_DIR", ""), os.environ)
        _tell(f"no system runs and no --config is given: using {directory}, without knowing the tenants")
        return Identity(directory).obey(command, None, time.time())
    return open_identity(config).obey(command, config, time.time())


def _table(keys: list[KeyInfo]) -> list[str]:
    rows = [("id", "tenant", "name", "created", "sha256")]
    for key in keys:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.created_s))
        made = created if key.source == "created" else "in the config"
        rows.append((key.key_id, key.tenant, key.name or "-", made, key.hash_start))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _tell(words: str) -> None:
    print(words, file=sys.stderr)
