"""`python -m headrace.replica JSON`: one front process, and its engine if it is a replica's. JSON is a
ReplicaSpec."""

from __future__ import annotations

import gc
import logging
import sys

import msgspec
import uvloop
from setproctitle import setproctitle

from headrace.api.messages import ReplicaSpec
from headrace.clock import SystemClock
from headrace.lifetime import die_with_parent
from headrace.replica.durable_front import DurableFront
from headrace.replica.front import Front, FrontLimits
from headrace.replica.http_messages import HttpLimits


def main(arguments: list[str]) -> int:
    """Run a front. Exit status: 0 drained, 1 a fault of its own, 2 wrong use or its address is taken."""
    if len(arguments) != 1:
        print("front: give one argument, a ReplicaSpec as JSON", file=sys.stderr)
        return 2
    try:
        spec = msgspec.json.decode(arguments[0], type=ReplicaSpec)
    except msgspec.DecodeError as error:
        print(f"front: the argument is not a ReplicaSpec: {error}", file=sys.stderr)
        return 2
    if not die_with_parent():
        print("front: the parent ended during the start", file=sys.stderr)
        return 2
    setproctitle(f"headrace: front {spec.replica_id}")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    limits = FrontLimits(http=HttpLimits(max_body_bytes=spec.max_body_bytes))
    # What was imported stays: collections need not look at it again, nor run for every few tokens.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    return uvloop.run(_run(spec, limits))


async def _run(spec: ReplicaSpec, limits: FrontLimits) -> int:
    if spec.gateway_id:
        return await DurableFront(spec, SystemClock(), limits.http).run()
    return await Front(spec, SystemClock(), limits).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
