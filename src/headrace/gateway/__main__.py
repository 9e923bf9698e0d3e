"""`python -m headrace.gateway JSON`: the router process. JSON is a GatewaySpec."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import sys

import msgspec
import setproctitle
import uvloop

from headrace.api.messages import GatewaySpec
from headrace.clock import SystemClock
from headrace.gateway.placed import localized
from headrace.gateway.process import fd_limit
from headrace.gateway.router import Router
from headrace.lifetime import die_with_parent


def main() -> int:
    """Run the router until SIGTERM or SIGINT, or until the parent dies."""
    if len(sys.argv) != 2:
        print("usage: python -m headrace.gateway JSON   (a GatewaySpec)", file=sys.stderr)
        return 2
    try:
        spec = msgspec.json.decode(sys.argv[1], type=GatewaySpec)
    except msgspec.DecodeError as error:
        print(f"not a GatewaySpec: {error}", file=sys.stderr)
        return 2
    spec = localized(spec, spec.run_dir, spec.node)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    setproctitle.setproctitle(f"headrace: router {spec.gateway_id}")
    die_with_parent()
    limit = fd_limit()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    uvloop.run(_serve(spec, limit))
    return 0


async def _serve(spec: GatewaySpec, limit: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    router = Router(spec, SystemClock(), limit)
    # What is imported and built now lives as long as the process: a full collection, during which nobody is
    # answered, need not look at it again. It is four fifths of all objects of a busy router.
    gc.collect()
    gc.freeze()
    await router.run(stop)


if __name__ == "__main__":
    sys.exit(main())
