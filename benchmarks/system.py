"""The system under test: started with `headrace.serve`, as in a notebook, and loaded from here."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import headrace
from headrace.api.config_loader import parse_config
from headrace.bench.load import LoadRun, LoadSpec, run_load
from headrace.bench.results import RunResult, evaluate
from headrace.bench.target import parse_target
from headrace.bench.workload import ROUTE_PATHS, Lengths, Route, Workload

ENDPOINT = "chat"
MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class System:
    """Addresses of a running system."""

    url: str
    """Of the gateway, with /v1."""
    front_urls: list[str]
    """Of each replica's front, with /v1: straight, past the gateway."""


@contextmanager
def serve(endpoint: dict[str, Any], **gateway: Any) -> Iterator[System]:
    """Serve one endpoint (a section of the config) behind a gateway on a free port. `gateway`: more of that
    section."""
    config = parse_config(
        {"endpoints": {ENDPOINT: endpoint}, "gateway": {"bind": f"127.0.0.1:{free_port()}", **gateway}}
    )
    with headrace.serve(config) as system:
        status = system.status()
        fronts = [f"http://{replica.address}/v1" for replica in status.replicas if replica.address]
        yield System(system.url, fronts)


def simulated(step_ms: float, max_open: int = 1024) -> dict[str, Any]:
    """Return the section of one replica with the simulated engine and room for `max_open` requests."""
    return {
        "model": MODEL,
        "engine": "simulated",
        "replicas": 1,
        "simulated": {"step_ms": step_ms},
        "native": {"max_running": min(max_open, 1024)},
        "max_open": max_open,
    }


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def workload(num_input: int, num_output: int, *, seed: int = 0, route: Route = "chat") -> Workload:
    """Return requests of fixed lengths, answers exactly as long as asked."""
    return Workload(
        ENDPOINT,
        route,
        input_tokens=Lengths("fixed", num_input),
        output_tokens=Lengths("fixed", num_output),
        ignore_eos=True,
        seed=seed,
    )


def load(url: str, work: Workload, spec: LoadSpec) -> LoadRun:
    """Load one address. Raises RuntimeError when a request failed: a figure over failures means nothing."""
    run = run_load(parse_target(url, ROUTE_PATHS[work.route]), work, spec)
    failed = [record for record in run.records if not record.is_ok]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0].error}: {failed[0].error_detail}")
    return run


def evaluate_valid(run: LoadRun) -> RunResult:
    """Return a run's figures. Raises RuntimeError when the run is invalid."""
    result = evaluate(run)
    if not result.is_valid:
        raise RuntimeError(f"invalid run: {'; '.join(result.invalid_reasons)}")
    return result
