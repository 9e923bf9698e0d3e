"""`headrace apply`, `scale`, `sleep` and `wake`: change a running system without dropping a request.

Must not know how changes are carried out.
"""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.options import DEFAULT_NAME, ConfigPath, Name, Settings, ask_system, load


def apply(config: ConfigPath = None, settings: Settings = None, name: Name = DEFAULT_NAME) -> None:
    """Give a running system a new config. Replicas that it changes are replaced step by step: see
    `headrace rollout`."""
    from headrace.api.messages import ApplyConfig
    from headrace.control.preflight import check_keys, check_models

    checked = check_keys(check_models(load(config, settings)))
    reply = ask_system(name, ApplyConfig(checked.model_dump_json()))
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

    reply = ask_system(name, ScaleEndpoint(endpoint, replicas))
    for note in reply.notes:
        typer.echo(note)


def sleep(
    replica: Annotated[str, typer.Argument(help="The replica's name, as in the status.", show_default=False)],
    level: Annotated[
        int,
        typer.Option(help="1: give the memory of keys and values back; 2: of weights, too.", min=1, max=2),
    ] = 1,
    name: Name = DEFAULT_NAME,
) -> None:
    """Put a replica on standby: it gives memory back and takes no requests. Refused while it has some."""
    _set_sleep(replica, level, name)


def wake(
    replica: Annotated[str, typer.Argument(help="The replica's name, as in the status.", show_default=False)],
    name: Name = DEFAULT_NAME,
) -> None:
    """Let a replica on standby take requests again."""
    _set_sleep(replica, 0, name)


def _set_sleep(replica: str, level: int, name: str) -> None:
    import msgspec

    from headrace.api.messages import SleepReplica

    command = msgspec.convert({"type": "SleepReplica", "replica_id": replica, "level": level}, SleepReplica)
    for note in ask_system(name, command).notes:
        typer.echo(note)
