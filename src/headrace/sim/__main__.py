"""`python -m headrace.sim --seeds A-B`: run seeds, print what failed and what it took."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence

from headrace.sim.scenario import draw
from headrace.sim.world import World


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m headrace.sim")
    parser.add_argument("--seeds", default="1-100")
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args(argv)
    first, _, last = arguments.seeds.partition("-")
    logging.disable(logging.CRITICAL)
    began = time.process_time()
    total, events, faults, requests, failed = 0.0, Counter(), Counter(), Counter(), []
    for seed in range(int(first), int(last or first) + 1):
        t=time.process_time()
        outcome = World(draw(seed, arguments.hours)).run()
        total += outcome.simulated_s
        events += outcome.events
        faults += outcome.faults
        requests += outcome.requests
        if outcome.violation is not None:
            failed.append(seed)
            print(f"seed {seed}: {outcome.violation}")
        if arguments.verbose:
            print(f"seed {seed}: {time.process_time()-t:.2f} s cpu, {outcome.simulated_s:.0f} s, {outcome.num_events} events, converged {outcome.converged_s:.0f}, {dict(outcome.requests)}")
            if outcome.violation is not None and first==(last or first): print("\n".join(outcome.history))
    spent = time.process_time() - began
    print(f"{len(failed)} failed; {total / 3600:.2f} simulated hours, {spent:.1f} CPU s, {total/3600/spent:.3f} hours per CPU s")
    print(dict(events.most_common())); print(dict(faults)); print(dict(requests))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
