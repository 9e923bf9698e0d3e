"""The comparison: every peer in turns with the bare front and headrace's gateway, stage by stage.

Owns the stages and their lengths. Must not know how a peer is started or how a report looks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from benchmarks.peers.catalogue import DATA_PATH, Peer, UnknownPeer, catalogue, on_request
from benchmarks.peers.measure import (
    FIRST_TOKEN_STEP_MS,
    Cost,
    FirstTokens,
    Path,
    in_turns,
    measure_cost,
    measure_first_tokens,
)
from benchmarks.peers.page import write_report
from benchmarks.peers.running import PeerFailed, RunningPeer, running
from benchmarks.report import Report
from benchmarks.system import System, serve, simulated
from headrace.errors import HeadraceError

TOKENS_PER_S = 20_000
ANSWER_TOKENS = {64: 256, 512: 128}
"""Streams -> tokens per answer: 0.8 and 3.3 s each, so that a load ends soon after its window."""
SATURATION_STREAMS = 512
"""At 5 ms per step they ask for 102,400 tokens/s: more than anything here gives."""
FRONT, GATEWAY = "front alone", "headrace"
GATEWAY_ROLES = ("haproxy", "router", "front")


@dataclass(frozen=True)
class Plan:
    """How long is measured."""

    rounds: int
    window_s: float
    first_token_s: float
    saturation_window_s: float
    saturation_tokens: int
    """Per answer; the slowest peers need seconds to end what is open."""
    cost_streams: tuple[int, ...]
    first_token_streams: tuple[int, ...]


FULL = Plan(2, 2.0, 1.6, 1.5, 64, (64, 512), (1, 32, 128))
QUICK = Plan(1, 0.8, 0.6, 0.8, 32, (64,), (1, 32))


@dataclass
class Turns:
    """What one peer's turns measured, by path; the front and headrace beside it in each."""

    peer: Peer
    start_s: float = 0.0
    command: list[str] = field(default_factory=list)
    """With the variables that it is given, as in a shell."""
    cost: dict[int, dict[str, Cost]] = field(default_factory=dict)
    """Streams -> path -> cost at 20,000 tokens/s asked for."""
    first_tokens: dict[int, dict[str, FirstTokens]] = field(default_factory=dict)
    saturation: dict[str, Cost] = field(default_factory=dict)
    error: str = ""


def run(*, is_quick: bool, only: Sequence[str] = ()) -> Report:
    """Compare with all peers that are installed, or with those named. Raises UnknownPeer."""
    chosen, missing = choose(only)
    plan = QUICK if is_quick else FULL
    words = ["python -m benchmarks peers", *(["--quick"] if is_quick else [])]
    words += [f"--only {','.join(only)}"] if only else []
    report = Report("peers", "The data plane beside its peers", "", command=" ".join(words))
    results = []
    for peer in chosen:
        print(f"-- {peer.title}", file=sys.stderr, flush=True)
        turns = Turns(peer)
        results.append(turns)
        try:
            compare(turns, plan)
        except (PeerFailed, HeadraceError) as error:
            turns.error = str(error)
            print(f"   {error}", file=sys.stderr, flush=True)
    write_report(report, results, missing, plan)
    return report


def choose(only: Sequence[str]) -> tuple[list[Peer], list[Peer]]:
    """Return the peers to measure and those that are not installed. Raises UnknownPeer."""
    known = {peer.name: peer for peer in [*catalogue(), *on_request()]}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise UnknownPeer(f"no peer {', '.join(unknown)}; there are: {', '.join(known)}")
    wanted = [known[name] for name in only] if only else catalogue()
    missing = [peer for peer in wanted if not peer.is_installed]
    for peer in missing:
        print(f"-- {peer.title} is not installed: make peers", file=sys.stderr, flush=True)
    return [peer for peer in wanted if peer.is_installed], missing


def compare(turns: Turns, plan: Plan) -> None:
    """Measure one peer in all stages, the front and headrace in the same turns."""
    with ExitStack() as life:
        own = None
        if turns.peer.has_own_backend:  # started once: its start is long, and it needs no front
            own = life.enter_context(running(turns.peer, ""))
        for streams in plan.cost_streams:
            with stage(turns, own, streams * 1e3 / TOKENS_PER_S) as paths:
                turns.cost[streams] = _measure_costs(
                    paths, streams, ANSWER_TOKENS[streams], plan.rounds, plan.window_s
                )
        with stage(turns, own, FIRST_TOKEN_STEP_MS) as paths:
            for streams in plan.first_token_streams:
                turns.first_tokens[streams] = _measure_first_tokens(paths, streams, plan)
            turns.saturation = _measure_costs(
                paths, SATURATION_STREAMS, plan.saturation_tokens, plan.rounds, plan.saturation_window_s
            )


def _measure_costs(
    paths: list[Path], streams: int, num_output: int, rounds: int, window_s: float
) -> dict[str, Cost]:
    costs = {path.name: Cost() for path in paths}

    def spend(path: Path, _: int) -> None:
        costs[path.name].add(measure_cost(path, streams, num_output, window_s))

    in_turns(paths, rounds, spend)
    return costs


def _measure_first_tokens(paths: list[Path], streams: int, plan: Plan) -> dict[str, FirstTokens]:
    seed = time.time_ns() % 1_000_000  # round i has the same requests on every path
    times = {path.name: FirstTokens() for path in paths}

    def ask(path: Path, number: int) -> None:
        got = measure_first_tokens(path, streams, plan.first_token_s, seed + number)
        times[path.name].times_s += got.times_s
        times[path.name].failures += got.failures

    in_turns(paths, plan.rounds, ask)
    return times


@contextmanager
def stage(turns: Turns, own: RunningPeer | None, step_ms: float) -> Iterator[list[Path]]:
    """Start headrace with steps of this length, and the peer before its front; yield the three paths."""
    with serve(simulated(step_ms, max_open=1024)) as system, ExitStack() as life:
        if own is None:
            up = life.enter_context(running(turns.peer, system.front_urls[0].removesuffix("/v1")))
        else:
            own.set_step(step_ms)
            up = own
        turns.start_s = up.start_s
        turns.command = [*(f"{name}={value}" for name, value in up.variables.items()), *up.command]
        yield paths_of(system, up)


def paths_of(system: System, up: RunningPeer) -> list[Path]:
    """Return the bare front, headrace's gateway and the peer, with whose CPU their tokens cost."""
    peer_roles = [f"peer {role}" for role in DATA_PATH]
    backend = [] if up.peer.has_own_backend else ["front"]
    return [
        Path(FRONT, system.front_urls[0], ("front",), up.tree),
        Path(GATEWAY, system.url, GATEWAY_ROLES, up.tree),
        Path(up.peer.name, up.url, (*peer_roles, *backend), up.tree),
    ]
