"""`headrace rollout status`, `pause`, `resume`, `promote` and `undo`: how a change of version goes on.

Must not know how rollouts are decided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from headrace.cli.options import DEFAULT_NAME, Name, ask_system

if TYPE_CHECKING:
    from headrace.api.messages import RolloutStatus

rollout_app = typer.Typer(
    help="See and steer rollouts: how a changed model, engine or setting reaches an endpoint's replicas.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
Endpoint = Annotated[str, typer.Argument(help="The endpoint's name.", show_default=False)]


@rollout_app.command()
def status(
    endpoint: Annotated[str, typer.Argument(help="Only this endpoint's.", show_default=False)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    name: Name = DEFAULT_NAME,
) -> None:
    """Show where each endpoint's last change of version stands, and why."""
    from headrace.api.messages import GetStatus
    from headrace.errors import ConfigError

    system = ask_system(name, GetStatus()).status
    assert system is not None
    names = sorted(known.name for known in system.endpoints)
    if endpoint and endpoint not in names:
        raise ConfigError(f"endpoint {endpoint!r} does not exist; there are: {', '.join(names)}")
    rollouts = [rollout for rollout in system.rollouts if endpoint in ("", rollout.endpoint)]
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(rollouts), indent=2).decode())
        return
    for rollout in rollouts:
        for line in describe(rollout):
            typer.echo(line)
    if not rollouts:
        typer.echo(f"{endpoint or 'no endpoint'}: no change of version since the system started")


@rollout_app.command()
def pause(endpoint: Endpoint, name: Name = DEFAULT_NAME) -> None:
    """Leave replicas and traffic as they are until resumed; nothing is judged meanwhile."""
    _change(endpoint, "pause", name)


@rollout_app.command()
def resume(endpoint: Endpoint, name: Name = DEFAULT_NAME) -> None:
    """Go on with a paused rollout; its stage begins anew."""
    _change(endpoint, "resume", name)


@rollout_app.command()
def promote(endpoint: Endpoint, name: Name = DEFAULT_NAME) -> None:
    """Skip the stages that are left: the new version gets everything."""
    _change(endpoint, "promote", name)


@rollout_app.command()
def undo(endpoint: Endpoint, name: Name = DEFAULT_NAME) -> None:
    """Go back to the version before, whether or not the new one was promoted. New replicas of the old version
    are started before those of the new one stop."""
    _change(endpoint, "undo", name)


def describe(rollout: RolloutStatus) -> list[str]:
    """Return a rollout's state for people: a head line, the versions, the reason."""
    from headrace.units import format_seconds

    state = rollout.state.replace("_", " ")
    lines = [f"{rollout.endpoint}: {state} for {format_seconds(rollout.since_s)}"]
    for label, generation, part, num_ready in (
        ("old", rollout.old, 1 - rollout.traffic, rollout.old_replicas),
        ("new", rollout.new, rollout.traffic, rollout.new_replicas),
    ):
        replicas = "replica" if num_ready == 1 else "replicas"
        lines.append(f"  {label} {generation}: {num_ready} {replicas} ready, {part:.0%} of the requests")
    return [*lines, f"  {rollout.reason}"]


def _change(endpoint: str, action: Literal["pause", "resume", "promote", "undo"], name: str) -> None:
    from headrace.api.messages import ChangeRollout

    for note in ask_system(name, ChangeRollout(endpoint, action)).notes:
        typer.echo(note)
