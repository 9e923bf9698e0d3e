"""The real router, HAProxy idle beside it, and replicas that are made up: what a router hears from outside.

Owns the processes, the load reports, the completion lines and the controller's socket. Must not know who asks
the router, or what it decides.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.system import ENDPOINT, MODEL, free_port
from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import (
    Demand,
    EndpointRule,
    EngineLoad,
    FinishedRequest,
    GatewaySpec,
    LoadReport,
    ProcessSpec,
    TenantRule,
    TerminalState,
)
from headrace.gateway.names import backend_name, encode_name
from headrace.gateway.paths import GatewayPaths
from headrace.gateway.process import prepare

NUM_REPLICAS = 8
NUM_TENANTS = 20
REPORT_PERIOD_S = 0.05
MAX_OPEN = 60_000
CACHED_PROMPTS = 128
"""Prompts that a replica's cache holds: fewer than are around, so blocks come and go all the time."""
START_LIMIT_S = 20.0


def gateway_spec(run_dir: Path) -> GatewaySpec:
    """Return a gateway with one endpoint and tenants whose limits nobody reaches."""
    tenants = [
        TenantRule(
            f"tenant-{number}",
            weight=1.0 + number % 3,
            requests_per_minute=100_000_000,
            tokens_per_minute=100_000_000_000,
            max_concurrent=50_000,
        )
        for number in range(NUM_TENANTS)
    ]
    keys = {hashlib.sha256(rule.name.encode()).hexdigest(): rule.name for rule in tenants}
    return GatewaySpec(
        run_dir=str(run_dir),
        bind=f"127.0.0.1:{free_port()}",
        endpoints=[EndpointRule(ENDPOINT, MODEL, max_queue=50_000, max_wait_s=300.0)],
        tenants=tenants,
        keys=keys,
    )


@dataclass
class FakeReplica:
    """What one front would report."""

    replica_id: str
    address: str
    finished: list[FinishedRequest] = field(default_factory=list)
    num_open: int = 0
    sequence: int = 0
    cached: OrderedDict[tuple[int, ...], None] = field(default_factory=OrderedDict)
    added: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)

    @property
    def server(self) -> str:
        return encode_name(self.replica_id)

    def finish(self, request_id: str, tenant: str, hashes: tuple[int, ...]) -> None:
        """End a request: its slot is free, its prompt cached, and another one's evicted for it."""
        self.finished.append(
            FinishedRequest(request_id, TerminalState.FINISHED, "stop", tenant, 1000, 250, 128, 0.05, 1.0)
        )
        if hashes in self.cached:
            self.cached.move_to_end(hashes)
            return
        self.cached[hashes] = None
        self.added += hashes
        if len(self.cached) > CACHED_PROMPTS:
            # Blocks of the shared beginning stay: others of the tenant use them.
            self.removed += self.cached.popitem(last=False)[0][4:]

    def report(self) -> LoadReport:
        """Return the next report; what it carries is forgotten here."""
        self.sequence += 1
        load = EngineLoad(self.num_open, 0, 1000, 4096, 0.02, prefill_token_s=2e-5, decode_token_s=1e-3)
        report = LoadReport(
            replica_id=self.replica_id,
            endpoint=ENDPOINT,
            model=MODEL,
            address=self.address,
            pid=os.getpid(),
            sequence=self.sequence,
            lease_s=3.0,
            state="ready",
            num_open=self.num_open,
            max_open=MAX_OPEN,
            engine=load,
            finished=self.finished,
            prefix_epoch=1,
            prefixes_added=self.added,
            prefixes_removed=self.removed,
        )
        self.finished, self.added, self.removed = [], [], []
        return report


class Surroundings:
    """Everything that the router hears but questions. Lives in the benchmark's event loop."""

    def __init__(self, spec: GatewaySpec) -> None:
        self.spec = spec
        self.paths = GatewayPaths(spec.run_dir, spec.gateway_id)
        self.replicas: dict[str, FakeReplica] = {}
        """By name inside HAProxy."""
        self.demand: Demand | None = None
        self.num_demands = 0
        self._lines: list[bytes] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._completions: asyncio.StreamWriter | None = None
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._health_address = ""

    async def open(self) -> None:
        """Listen as controller and as the replicas' health check. Call it before the router starts."""
        controller = await asyncio.start_unix_server(self._hear_demand, self.paths.controller_socket)
        health = await asyncio.start_server(_answer_health, "127.0.0.1", 0)
        self._servers += [controller, health]
        host, port = health.sockets[0].getsockname()[:2]
        self._health_address = f"{host}:{port}"

    async def connect(self) -> None:
        """Connect as HAProxy's completion log."""
        _, self._completions = await asyncio.open_unix_connection(self.paths.completions_socket)

    async def start_replicas(self) -> None:
        """Report as NUM_REPLICAS replicas, and return when the router may choose all of them."""
        for number in range(NUM_REPLICAS):
            replica = FakeReplica(f"{ENDPOINT}-{number + 1}", self._health_address)
            self.replicas[replica.server] = replica
            _, writer = await asyncio.open_unix_connection(self.paths.router_socket)
            self._writers.append(writer)
            self._tasks.add(asyncio.create_task(self._report_for_ever(replica, writer, number)))
        await wait_until(
            lambda: (
                self.demand is not None
                and sum(view.is_serving for view in self.demand.replicas) == NUM_REPLICAS
            )
        )

    def complete(self, request_id: str, server: str) -> None:
        """Note a request's end for HAProxy's log; `flush` sends it."""
        self._lines.append(
            b'{"id":"%s","backend":"%s","server":"%s","status":200,"termination":"--","first_byte_ms":20,'
            b'"total_ms":1000,"bytes_in":4096,"bytes_out":30000,"retries":"0"}\n'
            % (request_id.encode(), backend_name(ENDPOINT).encode(), server.encode())
        )

    def flush(self) -> None:
        """Send the completion lines that are waiting."""
        if self._lines and self._completions is not None:
            self._completions.write(b"".join(self._lines))
            self._lines.clear()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for server in self._servers:
            server.close()
        for writer in [*self._writers, self._completions]:
            if writer is not None:
                writer.transport.abort()

    async def _report_for_ever(self, replica: FakeReplica, writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(REPORT_PERIOD_S * number / NUM_REPLICAS)  # fronts are not in step
        while True:
            writer.write(encode_frame(replica.report()))
            await asyncio.sleep(REPORT_PERIOD_S)

    async def _hear_demand(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder: FrameDecoder[Demand] = FrameDecoder(Demand)
        while data := await reader.read(65_536):
            for demand in decoder.feed(data):
                self.demand = demand
                self.num_demands += 1
        writer.close()


async def _answer_health(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if await reader.read(4096):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    writer.close()


async def wait_until(condition: Callable[[], bool], limit_s: float = START_LIMIT_S) -> None:
    """Poll a condition until it holds. Raises TimeoutError."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110, most are conditions of another process
            await asyncio.sleep(0.02)


def start(spec: ProcessSpec) -> subprocess.Popen[bytes]:
    """Start one of the gateway's processes, its output in its log."""
    with Path(spec.log_path).open("wb") as log:
        return subprocess.Popen(spec.argv, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


@asynccontextmanager
async def gateway() -> AsyncIterator[tuple[Surroundings, psutil.Process]]:
    """Run a gateway in a directory of its own; yield what is around it, and its router's process."""
    with tempfile.TemporaryDirectory(prefix="hr-router-") as name:
        run_dir = Path(name)
        spec = gateway_spec(run_dir)
        surroundings = Surroundings(spec)
        await surroundings.open()
        (run_dir / "logs").mkdir(exist_ok=True)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            processes += [start(one) for one in prepare(spec)]
            await wait_until(lambda: Path(surroundings.paths.spoe_socket).exists())
            await wait_until(lambda: Path(surroundings.paths.completions_socket).exists())
            await surroundings.connect()
            yield surroundings, psutil.Process(processes[0].pid)
        finally:
            await surroundings.close()
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
