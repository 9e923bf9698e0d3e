"""The comparison's report: tables with ratios, aims beside them, and the table that the README shows.

Must not measure.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.peers.catalogue import DATA_PATH, INSTALLED, ROOT, Peer
from benchmarks.peers.measure import BESIDE, FIRST_TOKEN_STEP_MS, Cost, FirstTokens
from benchmarks.report import Aim, Report, Table

if TYPE_CHECKING:  # the comparison imports this module
    from benchmarks.peers.comparison import Plan, Turns

AIM_US = 15.0
AIM_FIRST_TOKEN_MS = 0.3
AIM_SATURATION = 0.95
BUSY_STEPS = 3
"""A first token takes one step and the wait for it; a median above this many steps is the machine's."""
FRONT, GATEWAY = "front alone", "headrace"
PROXY_ROLES = ("haproxy", "router", *(f"peer {role}" for role in DATA_PATH if role != "replica"))
BACKEND_ROLES = ("front", "peer replica")
ALL = "all turns"


def write_report(report: Report, results: list[Turns], missing: list[Peer], plan: Plan) -> None:
    """Fill the report."""
    report.method = _METHOD.format(rounds=plan.rounds, window=plan.window_s, first=plan.first_token_s)
    done = [turns for turns in results if not turns.error]
    for turns in done:
        report.data[turns.peer.name] = _data(turns)
    if done:
        report.tables += [_cost_table(done), _first_token_table(done), _saturation_table(done)]
        report.aims += _aims(done)
        report.tables.append(_readme_table(done))
    report.tables.append(_peers_table(results))
    report.caveats += [f"{turns.peer.title}: {turns.error}" for turns in results if turns.error]
    report.caveats += [f"{peer.title} was not installed; `make peers` installs it." for peer in missing]
    report.caveats += [line for turns in done for line in _failures(turns)]
    report.caveats += _doubts(done)
    report.caveats += _CAVEATS


_METHOD = (
    "One front of headrace with the simulated engine is the backend of every proxy; headrace is its "
    "gateway and the same front. Ray Serve cannot use that front: it serves an application of its "
    "own, which streams the same chunks on the same step grid. One peer at a time; bare front, "
    "headrace and the peer in turns (each round begins with another), rounds: {rounds}. CPU: closed "
    "loops that ask for 20,000 tokens/s, windows of {window:g} s, user and system time of the "
    "processes that relay tokens, make them into HTTP or choose where requests go. First tokens: open"
    " loops of {first:g} s on kept connections, 5 ms per step, latency from the sending. Saturation: "
    "512 streams that ask for 102,400 tokens/s."
)
_CAVEATS = [
    "Client, proxies, front and engine share the machine's cores: at saturation a proxy's CPU is "
    "missing elsewhere, which it would not be with a core for each.",
    "Ray Serve's application does less than a front: it tokenizes nothing and its bytes are made "
    "ahead, which is its best case. `added` is for it too counted from headrace's bare front.",
    "headrace's gateway and the plain HAProxy have one thread each; Ray's HAProxy has one per core; "
    "the routers in Rust have as many as they choose.",
    "The kernel's share of loopback TCP is counted to whoever makes the system call. CPU times have a"
    " resolution of 10 ms per process.",
    "`of headrace` and `added` compare within the same turns, with headrace and the bare front; "
    "figures of different turns also differ by the machine's mood.",
    "Every peer has one backend here: what its policy is worth with many is another question.",
]


def _pooled(done: list[Turns]) -> dict[int, dict[str, Cost]]:
    """Cost by streams and path; headrace and the front over all turns."""
    found: dict[int, dict[str, Cost]] = {}
    for turns in done:
        for streams, costs in turns.cost.items():
            for name, cost in costs.items():
                found.setdefault(streams, {}).setdefault(name, Cost()).add(cost)
    return found


def _pooled_first_tokens(done: list[Turns]) -> dict[int, dict[str, FirstTokens]]:
    found: dict[int, dict[str, FirstTokens]] = {}
    for turns in done:
        for streams, by_path in turns.first_tokens.items():
            for name, times in by_path.items():
                known = found.setdefault(streams, {}).setdefault(name, FirstTokens())
                known.times_s += times.times_s
    return found


def path_us(cost: Cost) -> float:
    """CPU µs per token of proxies and backend, the simulated engine aside."""
    return cost.us_per_token(*PROXY_ROLES, *BACKEND_ROLES)


def _cost_table(done: list[Turns]) -> Table:
    rows = []
    for streams, costs in _pooled(done).items():
        for name, cost in costs.items():
            own = next((turns for turns in done if turns.peer.name == name), None)
            beside = own.cost[streams][GATEWAY] if own else None
            rows.append(
                [
                    str(streams),
                    _title(name, done),
                    f"{cost.tokens_per_s:,.0f}",
                    f"{cost.us_per_token(*PROXY_ROLES):.1f}",
                    f"{cost.us_per_token(*BACKEND_ROLES):.1f}",
                    f"**{path_us(cost):.1f}**",
                    f"{path_us(cost) / path_us(beside):.2f}" if beside else "",
                    f"{cost.us_per_token(BESIDE):.1f}",
                ]
            )
    headers = ("streams", "path", "tokens/s", "proxy + router", "backend", "path", "of headrace", "beside")
    return Table("CPU µs per streamed token, 20,000 tokens/s asked for", headers, rows)


def _added(turns: Turns, streams: int, name: str) -> tuple[float, float] | None:
    """Added p50 and p99 in ms over the bare front of the same turns."""
    bare = turns.first_tokens[streams][FRONT].summary
    own = turns.first_tokens[streams][name].summary
    return (own.p50 - bare.p50, own.p99 - bare.p99) if own and bare else None


def _added_pooled(done: list[Turns], streams: int, name: str) -> tuple[float, float] | None:
    """The same over all turns in which the path took part."""
    pooled = _pooled_first_tokens([turns for turns in done if name in turns.first_tokens[streams]])
    bare, own = pooled[streams][FRONT].summary, pooled[streams][name].summary
    return (own.p50 - bare.p50, own.p99 - bare.p99) if own and bare else None


def _first_token_table(done: list[Turns]) -> Table:
    rows = []
    for streams, by_path in _pooled_first_tokens(done).items():
        for name, times in by_path.items():
            found = times.summary
            if found is None:
                continue
            added = _added_pooled(done, streams, name)
            cells = ["", ""] if name == FRONT or added is None else [f"**{added[0]:.2f}**", f"{added[1]:.2f}"]
            rows.append(
                [
                    str(streams),
                    _title(name, done),
                    *(f"{value:.2f}" for value in (found.mean, found.p50, found.p99)),
                    *cells,
                    str(found.count),
                ]
            )
    headers = ("streams", "path", "mean", "p50", "p99", "added p50", "added p99", "samples")
    return Table("Time to first token in ms", headers, rows)


def _saturation_ratio(done: list[Turns], name: str) -> float:
    """Tokens/s relative to the bare front of the same turns."""
    mine = [turns for turns in done if name in turns.saturation]
    bare = sum(turns.saturation[FRONT].tokens_per_s for turns in mine)
    return sum(turns.saturation[name].tokens_per_s for turns in mine) / bare


def _saturation_table(done: list[Turns]) -> Table:
    rows = []
    for name in [FRONT, GATEWAY, *(turns.peer.name for turns in done)]:
        total = Cost()
        for turns in done:
            total.add(turns.saturation.get(name, Cost()))
        rows.append(
            [
                _title(name, done),
                f"{total.tokens_per_s:,.0f}",
                f"**{_saturation_ratio(done, name):.2f}**",
                f"{path_us(total):.1f}",
            ]
        )
    return Table(
        "Saturation, 512 streams", ("path", "tokens/s", "of the bare front", "CPU µs per token"), rows
    )


def _aims(done: list[Turns]) -> list[Aim]:
    aims = []
    for streams, costs in _pooled(done).items():
        ours = path_us(costs[GATEWAY])
        aims.append(
            Aim(
                f"CPU per token, {streams} streams",
                f"at most {AIM_US:g} µs",
                f"{ours:.1f} µs",
                ours <= AIM_US,
            )
        )
        lowest = min(path_us(t.cost[streams][t.peer.name]) / path_us(t.cost[streams][GATEWAY]) for t in done)
        aims.append(
            Aim(
                f"the same, cheapest peer's relative to headrace's, {streams} streams",
                "above 1: headrace is the cheapest",
                f"{lowest:.2f}",
                lowest > 1,
            )
        )
    routers = [turns for turns in done if turns.peer.is_router]
    for streams in done[0].first_tokens:
        ours_added = _added_pooled(done, streams, GATEWAY)
        if ours_added is None:
            continue
        aim = f"p50 at most {AIM_FIRST_TOKEN_MS:g} ms"
        measured = f"{ours_added[0]:.2f} ms"
        is_met = ours_added[0] <= AIM_FIRST_TOKEN_MS
        aims.append(Aim(f"added to the first token, {streams} streams", aim, measured, is_met))
        aims += [_lowest_added(routers, streams)] if routers else []
    failed = sum(len(found.failures) for turns in done for found in _measured(turns, GATEWAY))
    aims.append(Aim("failed requests, headrace", "none", str(failed), failed == 0))
    ratio = _saturation_ratio(done, GATEWAY)
    aims.append(
        Aim(
            "tokens/s at saturation",
            f"at least {AIM_SATURATION:g} of bare",
            f"{ratio:.2f}",
            ratio >= AIM_SATURATION,
        )
    )
    return aims


def _lowest_added(routers: list[Turns], streams: int) -> Aim:
    """headrace against the best full router, each pair in its own turns."""
    pairs = []
    for turns in routers:
        ours, theirs = _added(turns, streams, GATEWAY), _added(turns, streams, turns.peer.name)
        if ours and theirs:
            pairs.append((theirs[0] - ours[0], turns.peer.name))
    least, name = min(pairs, default=(float("nan"), "none"))
    return Aim(
        f"the same beside the best full router, {streams} streams",
        "router's p50 minus headrace's is above 0",
        f"{least:.2f} ms ({name})",
        least > 0,
    )


def _readme_table(done: list[Turns]) -> Table:
    costs, rows = _pooled(done), []
    for name in [GATEWAY, *(turns.peer.name for turns in done)]:
        added = [_added_pooled(done, streams, name) for streams in done[0].first_tokens]
        spent = [by_path[name] for by_path in costs.values()]
        mark = "**" if name == GATEWAY else ""
        rows.append(
            [
                f"{mark}{_title(name, done)}{mark}",
                " / ".join(f"{path_us(cost):.1f}" for cost in spent),
                " / ".join(f"{cost.tokens_per_s / 1e3:.1f}" for cost in spent),
                " / ".join(f"{pair[0]:.2f}" if pair else "-" for pair in added),
                " / ".join(f"{pair[1]:.1f}" if pair else "-" for pair in added),
                f"{_saturation_ratio(done, name):.2f}",
            ]
        )
    headers = (
        "path",
        "CPU µs per streamed token, 64 / 512 streams",
        "of 20,000 tokens/s asked: thousands given",
        "added to the first token, p50 ms, 1 / 32 / 128 streams",
        "p99 ms",
        "tokens/s at saturation, of the bare front",
    )
    return Table("How it compares (the README's table)", headers, rows)


def _peers_table(results: list[Turns]) -> Table:
    rows = []
    for turns in results:
        peer = turns.peer
        size = _size(peer) if peer.environment else "part of headrace"
        command = " ".join(turns.command).replace(str(ROOT) + "/", "")
        rows.append([peer.title, _version(peer), size, f"{turns.start_s:.1f} s", f"`{command}`"])
    return Table("Peers", ("peer", "version", "on disk", "start to first answer", "command"), rows)


def _version(peer: Peer) -> str:
    """Ask the peer's own environment."""
    if not peer.environment:
        from importlib.metadata import version

        return version(peer.package)
    question = f"from importlib.metadata import version; print(version({peer.package!r}))"
    command = [str(peer.folder / "bin" / "python"), "-c", question]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or "unknown"


def _size(peer: Peer) -> str:
    done = subprocess.run(
        ["du", "-sm", str(INSTALLED / peer.environment)], capture_output=True, text=True, check=False
    )
    return f"{done.stdout.split()[0]} MB" if done.stdout else "unknown"


def _title(name: str, done: list[Turns]) -> str:
    return next((turns.peer.title for turns in done if turns.peer.name == name), name)


def _failures(turns: Turns) -> list[str]:
    """Failed requests are a result: one line for each path that had some."""
    lines = []
    for name in turns.saturation:
        failures = [failure for found in _measured(turns, name) for failure in found.failures]
        if failures:
            title = _title(name, [turns])
            lines.append(f"{title}: {len(failures)} requests failed, the first with {failures[0]}")
    return lines


def _measured(turns: Turns, name: str) -> list[Cost | FirstTokens]:
    """Return everything that was measured on one path."""
    stages: list[Mapping[str, Cost | FirstTokens]] = [*turns.cost.values(), *turns.first_tokens.values()]
    return [by_path[name] for by_path in [*stages, turns.saturation] if name in by_path]


def _doubts(done: list[Turns]) -> list[str]:
    """Say when the machine was too busy for times to mean anything: the bare front itself was late."""
    late = []
    for streams, by_path in _pooled_first_tokens(done).items():
        found = by_path[FRONT].summary
        if found is not None and found.p50 > BUSY_STEPS * FIRST_TOKEN_STEP_MS:
            late.append(f"{found.p50:.0f} ms at {streams} streams")
    if not late:
        return []
    return [
        f"The machine was too busy: the bare front's own p50 was {', '.join(late)}. Do not use the times."
    ]


def _data(turns: Turns) -> dict[str, Any]:
    def costs(by_path: dict[str, Cost]) -> dict[str, Any]:
        return {
            name: {
                "tokens_per_s": cost.tokens_per_s,
                "cpu_us_per_token": {role: cost.us_per_token(role) for role in sorted(cost.cpu_s)},
                "failed": len(cost.failures),
            }
            for name, cost in by_path.items()
        }

    first_tokens = {
        str(streams): {
            name: {"p50_ms": found.p50, "p99_ms": found.p99, "mean_ms": found.mean, "count": found.count}
            for name, times in by_path.items()
            if (found := times.summary) is not None
        }
        for streams, by_path in turns.first_tokens.items()
    }
    return {
        "cost": {str(streams): costs(by_path) for streams, by_path in turns.cost.items()},
        "first_tokens": first_tokens,
        "saturation": costs(turns.saturation),
        "start_s": turns.start_s,
        "command": [word.replace(f"{ROOT}/", "") for word in turns.command],
    }
