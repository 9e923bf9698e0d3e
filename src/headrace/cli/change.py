"""`headrace apply` and `headrace scale`: change a running system without dropping a request.

Must not know how changes are carried out.
"""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.options import DEFAULT_NAME, ConfigPath, Name, Settings, find_run_directory, load


def apply(config: ConfigPath = None, settings: Settings = None, name: Name = DEFAULT_NAME) -> None:
    """Give a running system a new config. Replicas that it changes are replaced one by one."""
    from headrace.api.messages import ApplyConfig
    from headrace.control.admin import ask
    from headrace.control.preflight import check_keys, check_models

    checked = check_keys(check_models(load(config, settings)))
    reply = ask(find_run_directory(name), ApplyConfig(checked.model_dump_json()))
    for note in reply.notes:
        typer.echo(note)


def scale(
    endpoint: Annotated[str, typer.Argument(help="The endpoint's name.", show_default=False)],
    replicas: Annotated[
        int, typer.Argument(help="How many, 0 to its replicas.max.", min=0, show_default=False)
    ],
    name: Name = DEFAULT_NAME,
) -> None:
    """Set how many replicas an endpoint has. Those that are too many finish what is open and leave."""
    from headrace.api.messages import ScaleEndpoint
    from headrace.control.admin import ask

    reply = ask(find_run_directory(name), ScaleEndpoint(endpoint, replicas))
    for note in reply.notes:
        typer.echo(note)
