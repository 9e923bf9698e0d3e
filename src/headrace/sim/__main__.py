"""`python -m headrace.sim --seeds A-B`: runs seeds, prints what failed in a small history, and what it took.

Exit status 0: every seed kept every invariant. 1: some did not. 2: wrong use.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from headrace.sim.draws import draw
from headrace.sim.shrink import Shrinker, describe
from headrace.sim.summary import Summary
from headrace.sim.world import World

MAX_SHRUNK = 5
"""Failing seeds that are made small: each takes up to a hundred runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the seeds; return the exit status."""
    arguments = _parse(argv)
    # The product's warnings are about what the faults do.
    logging.disable(logging.CRITICAL)
    _collect_rarely()
    summary, began_s = Summary(), time.process_time()
    for seed in arguments.seeds:
        scenario, seed_began_s = draw(seed, arguments.hours), time.process_time()
        outcome = World(scenario).run()
        summary.add(outcome)
        if arguments.verbose:
            taken_s = time.process_time() - seed_began_s
            print(f"seed {seed}: {taken_s:.2f} CPU s, {outcome.simulated_s:.0f} s, {dict(outcome.requests)}")
        if outcome.violation is not None:
            if len(summary.failed) <= MAX_SHRUNK and not arguments.fast:
                shrinker = Shrinker(scenario, outcome)
                outcome = shrinker.run()
                scenario = shrinker.scenario
            lines = describe(scenario, outcome)
            print("\n".join(lines[:1] if arguments.fast else lines), flush=True)
    cpu_s = time.process_time() - began_s
    for line in summary.lines(cpu_s):
        print(line)
    if arguments.record is not None:
        with arguments.record.open("ab") as record:
            record.write(msgspec.json.encode(summary.record(arguments.seeds, cpu_s)) + b"\n")
    return 1 if summary.failed else 0


def _collect_rarely() -> None:
    """A world makes much that lives long and few circles: looking for them took a tenth of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m headrace.sim",
        description="Runs the real decisions on a virtual clock, under faults, and checks every invariant.",
    )
    parser.add_argument("--seeds", type=_seeds, default=range(1, 101), metavar="A-B", help="or one seed")
    parser.add_argument("--hours", type=float, default=0.0, help="simulated hours per seed; 0: some minutes")
    parser.add_argument("--verbose", action="store_true", help="a line per seed")
    parser.add_argument("--fast", action="store_true", help="one line per failure, without its history")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add the figures as one line of JSON")
    return parser.parse_args(argv)


def _seeds(text: str) -> range:
    first, _, last = text.partition("-")
    if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
        raise argparse.ArgumentTypeError(f"{text!r} is not A-B with A <= B, like 1-100, nor one number")
    return range(int(first), int(last or first) + 1)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of words have an order of their own in each process; a seed is to give one history everywhere.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "headrace.sim", *sys.argv[1:]])  # noqa: S606, ourselves
    sys.exit(main())
