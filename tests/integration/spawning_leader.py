"""A process that spawns another one as vLLM does, with the lines of `headrace.engine.adapted` for it."""

from __future__ import annotations

import multiprocessing
import sys
import time

from headrace.engine.adapted import become_spawner, die_with_spawner


def linger() -> None:
    print("lingering", file=sys.stderr, flush=True)
    time.sleep(60)


if __name__ == "__mp_main__":
    die_with_spawner()
if __name__ == "__main__":
    become_spawner()
    child = multiprocessing.get_context("spawn").Process(target=linger)
    child.start()
    # To standard error: an engine process has its parent's.
    print(f"spawned {child.pid}", file=sys.stderr, flush=True)
    child.join()
