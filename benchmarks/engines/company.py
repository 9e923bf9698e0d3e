"""All engines of one comparison, started once, with turns in which only one of them runs.

Owns who is there, who is missing and why. An engine that fails ends nobody else's turns. Must not know what
is measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.engines.catalogue import MAX_RUNNING, PeerEngine, engines, on_request
from benchmarks.engines.load import LoadFailed
from benchmarks.engines.models import BenchModel
from benchmarks.engines.running import (
    EngineFailed,
    RunningEngine,
    running_headrace,
    running_peer,
)
from benchmarks.peers.catalogue import UnknownPeer
from headrace.errors import HeadraceError

Figure = TypeVar("Figure")


@dataclass
class Company:
    """The engines that answer, headrace first, and what went wrong."""

    running: list[RunningEngine] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Engine -> why it is not there, or why it left. One that is not installed is one of them."""
    turns_failed: list[str] = field(default_factory=list)
    """Turns that gave no figure, one sentence each."""

    def take_turns(
        self, rounds: int, what: str, measure: Callable[[RunningEngine, int], Figure], limit_s: float
    ) -> dict[str, list[Figure]]:
        """Measure every engine once per round, each round beginning with another one; only one runs at a
        time. An engine whose turn took longer than `limit_s`, or failed, gets no further turn.

        `measure` takes an engine and the number of the round. Returns the figures by engine.
        """
        figures: dict[str, list[Figure]] = {engine.name: [] for engine in self.running}
        left = list(self.running)
        for number in range(rounds):
            for engine in [*left[number % len(left) :], *left[: number % len(left)]] if left else []:
                try:
                    figure, took_s = _turn(engine, number, measure)
                except (LoadFailed, HeadraceError) as error:
                    self.turns_failed.append(f"{engine.title}, {what}: {error}")
                    print(f"   {self.turns_failed[-1]}", file=sys.stderr, flush=True)
                    left.remove(engine)
                    self._dismiss_the_dead(engine)
                    continue
                figures[engine.name].append(figure)
                if took_s > limit_s or number + 1 >= engine.max_rounds:
                    left.remove(engine)
        return figures

    def _dismiss_the_dead(self, engine: RunningEngine) -> None:
        if not engine.find():
            self.failures[engine.name] = "it died"
            self.running.remove(engine)


def _turn(
    engine: RunningEngine, number: int, measure: Callable[[RunningEngine, int], Figure]
) -> tuple[Figure, float]:
    engine.wake()
    started_s = time.monotonic()
    try:
        return measure(engine, number), time.monotonic() - started_s
    finally:
        engine.pause()


def choose_engines(only: Sequence[str]) -> list[PeerEngine]:
    """Return the peers to compare with: those named, or all; `none`: headrace alone. Raises UnknownPeer."""
    if list(only) == ["none"]:
        return []
    known = {engine.name: engine for engine in [*engines(), *on_request()]}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise UnknownPeer(f"no engine {', '.join(unknown)}; there are: {', '.join(known)}")
    return [known[name] for name in only] if only else engines()


@contextmanager
def company(
    model: BenchModel, only: Sequence[str], context_tokens: int, max_running: int = MAX_RUNNING
) -> Iterator[Company]:
    """Start headrace and every peer that is installed, one after another, and yield them paused. All end with
    the block. Raises UnknownPeer; what headrace raises."""
    found = Company()
    chosen = choose_engines(only)
    with ExitStack() as life:
        found.running.append(life.enter_context(running_headrace(model, context_tokens, max_running)))
        _tell(found.running[-1])
        for peer in chosen:
            if not peer.is_installed:
                found.failures[peer.name] = f"not installed: make peers PEERS={peer.environment}"
                print(f"-- {peer.title}: {found.failures[peer.name]}", file=sys.stderr, flush=True)
                continue
            try:
                engine = life.enter_context(running_peer(peer, model, context_tokens, max_running))
            except (EngineFailed, OSError) as error:
                found.failures[peer.name] = str(error)
                print(f"-- {peer.title}: {error}", file=sys.stderr, flush=True)
                continue
            engine.pause()
            found.running.append(engine)
            _tell(engine)
        yield found


def _tell(engine: RunningEngine) -> None:
    print(f"-- {engine.title} answers after {engine.start_s:.1f} s", file=sys.stderr, flush=True)
