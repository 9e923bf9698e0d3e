"""`headrace status`: endpoints, replicas and processes of a running system, as tables or JSON.

Must not know where the numbers come from.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from headrace.cli.options import DEFAULT_NAME, Name, ask_system, find_run_directory

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from headrace.api.messages import EndpointStatus, ReplicaStatus, RolloutStatus, SystemStatus

WATCH_INTERVAL_S = 0.5
LONG_WAIT_S = 1.0
START_IS_NEWS_S = 60.0
"""For so long after a replica came up, how long its engine took is shown."""


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing it, until Ctrl-C.")] = False,
    explain: Annotated[
        str, typer.Option("--explain", metavar="ENDPOINT", help="Why it has as many replicas as it has.")
    ] = "",
    name: Name = DEFAULT_NAME,
) -> None:
    """Show what a running system is doing."""
    if watch and as_json:
        raise typer.BadParameter("--watch is for people and --json for programs; give one of them")
    if watch and explain:
        raise typer.BadParameter("--explain shows one moment; give it without --watch")
    if explain:
        _explain(explain, name, as_json=as_json)
        return
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(_ask(name)), indent=2).decode())
    elif watch:
        _watch(name)
    else:
        from rich.console import Console

        Console().print(render(_ask(name)))


def _explain(endpoint: str, name: str, *, as_json: bool) -> None:
    from headrace.cli.explain import ask_explanation, render_explanation

    explanation = ask_explanation(endpoint, name)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(explanation), indent=2).decode())
    else:
        from rich.console import Console

        Console().print(render_explanation(explanation))


def _ask(name: str) -> SystemStatus:
    from headrace.api.messages import GetStatus

    reply = ask_system(name, GetStatus())
    assert reply.status is not None
    return reply.status


def _watch(name: str) -> None:
    from rich.live import Live

    from headrace.control.admin import NotRunning

    current = _ask(name)
    try:
        with Live(render(current), auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(WATCH_INTERVAL_S)
                try:
                    live.update(render(_ask(name)), refresh=True)
                except NotRunning as error:
                    if not find_run_directory(name).is_dir():
                        raise
                    live.update(str(error), refresh=True)
    except KeyboardInterrupt:
        pass


def render(system: SystemStatus) -> RenderableType:
    """Return a head line, the tables, and a line for everything that needs words."""
    from rich.console import Group
    from rich.text import Text

    from headrace.units import format_seconds

    state = "ready" if system.is_ready else "not ready"
    head = f"{system.url}  {state}, up {format_seconds(system.uptime_s)}, {system.run_dir}"
    notes = Text("\n".join(_notes(system)))
    tables = [_endpoints(system), _gateways(system), _replicas(system), _processes(system)]
    if system.nodes:
        tables.insert(2, _nodes(system))
    if any(tenant.tenant for tenant in system.tenants):
        tables.insert(1, _tenants(system))
    if system.durable_fronts:
        tables.insert(-1, _durable_fronts(system))
    parts: list[RenderableType] = [Text(head, style="bold")]
    for table in tables:
        parts += [Text(), table]
    return Group(*parts, Text(), notes)


def _table(*columns: str) -> Table:
    """`>` before a name: a column of numbers; they stay whole on a narrow screen."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="underline")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        name = column.lstrip(">")
        width = len(name) if justify == "right" else 4
        table.add_column(name, justify=justify, no_wrap=True, min_width=width)
    return table


def _endpoints(system: SystemStatus) -> Table:
    from headrace.units import format_seconds

    columns = [">ready", ">held", ">oldest", ">open", ">finished", ">failed", ">refused"]
    has_standby = any(endpoint.standby or endpoint.desired_standby for endpoint in system.endpoints)
    if has_standby:
        columns.insert(1, ">standby")
    table = _table("endpoint", "model", *columns)
    for endpoint in system.endpoints:
        table.add_row(
            endpoint.name,
            _short(endpoint.model),
            f"{endpoint.ready}/{endpoint.desired}",
            *([f"{endpoint.standby}/{endpoint.desired_standby}"] if has_standby else []),
            str(endpoint.num_held),
            format_seconds(endpoint.oldest_held_s) if endpoint.num_held else "-",
            str(endpoint.num_in_flight),
            str(endpoint.finished),
            str(endpoint.failed_requests),
            str(endpoint.refused),
        )
    return table


def _gateways(system: SystemStatus) -> Table:
    from headrace.units import format_seconds

    table = _table("gateway", "router", "haproxy", ">held", ">oldest", ">open", ">replicas")
    for gateway in system.gateways:
        is_up = gateway.is_answering or gateway.haproxy != "running"
        table.add_row(
            gateway.gateway_id,
            gateway.router,
            gateway.haproxy if is_up else "silent",
            str(gateway.num_held),
            format_seconds(gateway.oldest_held_s) if gateway.num_held else "-",
            str(gateway.num_in_flight),
            str(gateway.num_serving),
        )
    return table


def _nodes(system: SystemStatus) -> Table:
    table = _table("node", "address", "state", "free", "replicas", "labels")
    for node in system.nodes:
        free = ", ".join(
            f"{name} {node.available.get(name, 0.0):g}/{total:g}"
            for name, total in sorted(node.total.items())
            if name not in ("memory", "object_store_memory")
        )
        labels = ", ".join(f"{name}={value}" for name, value in node.labels.items() if "ray.io/" not in name)
        state = f"[yellow]{node.leaving or 'alive'}[/yellow]" if node.leaving else "alive"
        state = state if node.is_alive else "[red]gone[/red]"
        table.add_row(node.node_id[:8], node.address, state, free, " ".join(node.replicas), labels)
    return table


def _tenants(system: SystemStatus) -> Table:
    """In 80 columns: priority with weight, prompt and output tokens together; long waits are in the notes."""
    numbers = (">share", ">held", ">open", ">done", ">refused", ">tokens")
    table = _table("tenant", "endpoint", "priority", *numbers)
    for tenant in system.tenants:
        table.add_row(
            tenant.tenant,
            tenant.endpoint,
            f"{tenant.priority} ×{tenant.weight:g}",
            f"{tenant.share:.0%}",
            str(tenant.num_held),
            str(tenant.num_in_flight),
            str(tenant.finished),
            str(tenant.refused),
            _count(tenant.prompt_tokens + tenant.output_tokens),
        )
    return table


def _count(number: int) -> str:
    """Four digits at most: 9999, 12k, 3M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 10 * size:
            return f"{number // size}{unit}"
    return str(number)


def _replicas(system: SystemStatus) -> Table:
    from headrace.units import format_seconds

    columns = ">for", ">open", ">run+wait", ">KV", ">cached", ">restarts"
    table = _table("replica", "state", *columns, "address")
    colours = {"ready": "green", "failed": "red", "lost": "red"}
    for replica in system.replicas:
        colour = colours.get(replica.state, "yellow")
        table.add_row(
            replica.replica_id,
            f"[{colour}]{replica.state}[/{colour}]",
            format_seconds(replica.since_s),
            str(replica.num_open),
            f"{replica.num_running}+{replica.num_waiting}",
            f"{replica.kv_used_ratio:.0%}",
            f"{replica.cached_ratio:.0%}",
            str(replica.restarts + replica.engine_restarts),
            replica.address,
        )
    return table


def _durable_fronts(system: SystemStatus) -> Table:
    from headrace.units import format_seconds

    table = _table("durable front", "endpoint", "state", ">for", ">open", ">streams", ">restarts")
    for front in system.durable_fronts:
        table.add_row(
            front.replica_id,
            front.endpoint,
            front.state,
            format_seconds(front.since_s),
            str(front.num_open),
            str(front.num_hosted),
            str(front.restarts),
        )
    return table


def _notes(system: SystemStatus) -> list[str]:
    """What does not fit a table: why an endpoint has its size, what a replica is doing or died of,
    which tenant waits long."""
    from headrace.units import format_seconds

    notes = [_describe_size(endpoint) for endpoint in system.endpoints]
    notes += [_describe_rollout(rollout) for rollout in system.rollouts]
    notes += [
        f"{gateway.gateway_id}: {gateway.url} on node {gateway.node[:8]}"
        for gateway in system.gateways
        if gateway.node and gateway.url
    ]
    notes += system.warnings
    for replica in system.replicas:
        if replica.state in ("starting", "standby", "ready") and replica.phase:
            notes.append(f"{replica.replica_id}: {replica.phase}")
        elif replica.last_error:
            is_past = "last error: " if replica.state == "ready" else ""
            notes.append(f"{replica.replica_id}: {is_past}{replica.last_error}")
        if replica.start_phases and replica.since_s < START_IS_NEWS_S:
            notes.append(
                f"{replica.replica_id}: its engine started in {_describe_start(replica.start_phases)}"
            )
        if replica.state == "ready" and replica.arithmetic:
            notes.append(f"{replica.replica_id}: computes in {replica.arithmetic}")
        if replica.state == "ready" and replica.step_model is not None:
            notes.append(_costs(replica))
    notes += [
        f"{front.replica_id}: {front.last_error}" for front in system.durable_fronts if front.last_error
    ]
    for tenant in system.tenants:
        if tenant.tenant and tenant.oldest_held_s >= LONG_WAIT_S:
            waits = f"its oldest held request waits {format_seconds(tenant.oldest_held_s)}"
            notes.append(f"{tenant.tenant} at {tenant.endpoint}: {waits}")
    for process in system.processes:
        if process.last_error:
            notes.append(f"{process.name}: last ended with {process.last_error}")
    return notes


def _describe_size(endpoint: EndpointStatus) -> str:
    """How many replicas are wanted and why, and how long those who wait will."""
    from headrace.units import format_seconds

    words = f"{endpoint.name}: {endpoint.desired} wanted, {endpoint.reason}"
    if endpoint.num_held and endpoint.eta_s:
        is_known = endpoint.eta_s > 0
        words += (
            f"; a replica is expected in about {format_seconds(endpoint.eta_s)}"
            if is_known
            else "; when a replica can serve them is not known"
        )
    return words


def _describe_rollout(rollout: RolloutStatus) -> str:
    """One line; `headrace rollout status` says more."""
    traffic = f" at {rollout.traffic:.0%} of the requests" if rollout.state in ("running", "paused") else ""
    state = rollout.state.replace("_", " ")
    return f"{rollout.endpoint}: rollout {rollout.old} -> {rollout.new} {state}{traffic}, {rollout.reason}"


def _costs(replica: ReplicaStatus) -> str:
    """What the replica's engine found its steps to take, and how much of its time it had work."""
    model = replica.step_model
    assert model is not None
    return (
        f"{replica.replica_id}: {replica.busy_ratio:.0%} busy, a step takes {1e3 * model.a:.3g} ms "
        f"+ {1e6 * model.b:.3g} µs/prompt token + {1e6 * model.c:.3g} µs/output token "
        f"+ {1e9 * model.d:.3g} ns/token of context (±{model.relative_error:.0%})"
    )


def _describe_start(phases: dict[str, float]) -> str:
    """The sum, and the phases that took most of it."""
    from headrace.units import format_seconds

    longest = sorted(phases.items(), key=lambda phase: -phase[1])[:3]
    parts = ", ".join(f"{phase} {format_seconds(seconds)}" for phase, seconds in longest)
    return f"{format_seconds(sum(phases.values()))}: {parts}"


def _processes(system: SystemStatus) -> Table:
    from headrace.units import format_bytes

    table = _table("process", ">pid", "state", ">restarts", ">memory")
    for process in system.processes:
        memory = format_bytes(process.resident_bytes)
        table.add_row(process.name, str(process.pid or "-"), process.state, str(process.restarts), memory)
    return table


def _short(model: str) -> str:
    """A model's path would push everything else off the line."""
    return model.rsplit("/", 1)[-1] if model.startswith("/") else model
