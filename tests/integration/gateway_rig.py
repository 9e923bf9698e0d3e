"""A real HAProxy and a real router as child processes, a controller that listens, a small HTTP client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.mock_front import MockFront

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import Demand, EndpointDemand, EndpointRule, GatewaySpec, ProcessSpec
from headrace.control.probe import probe_gateway
from headrace.fabric.child import death_with_parent
from headrace.gateway.paths import GatewayPaths
from headrace.gateway.process import prepare

DEADLINE_S = 10.0


@dataclass
class HttpAnswer:
    """One response, read to its end. `is_whole` is false if the connection broke before that."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool = True

    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


async def wait_for(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Poll until `condition()` is true. Fails with `what` after the deadline."""
    end_s = asyncio.get_running_loop().time() + deadline_s
    while not condition():
        assert asyncio.get_running_loop().time() < end_s, f"after {deadline_s} s still not: {what}"
        await asyncio.sleep(0.005)


class Client:
    """One connection to the gateway."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    async def open(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        return self

    def close(self) -> None:
        self.writer.transport.abort()

    def send(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        lines = [f"{method} {path} HTTP/1.1", "host: test", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def receive_head(self) -> HttpAnswer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in head[1:] if line)
        return HttpAnswer(int(head[0].split()[1]), {n.lower(): v.strip() for n, _, v in pairs}, b"")

    async def receive(self) -> HttpAnswer:
        answer = await self.receive_head()
        if answer.headers.get("transfer-encoding") != "chunked":
            answer.body = await self.reader.readexactly(int(answer.headers.get("content-length", "0")))
            return answer
        try:
            while size := int((await self.reader.readuntil(b"\r\n")).strip(), 16):
                answer.body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readuntil(b"\r\n")
        except (asyncio.IncompleteReadError, OSError):
            answer.is_whole = False
        return answer


class Gateway:
    """HAProxy and router, and what the controller would know of them."""

    def __init__(self, endpoints: list[EndpointRule], **settings: Any) -> None:
        self.run_dir = tempfile.mkdtemp(prefix="hr-")
        (Path(self.run_dir) / "logs").mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.spec = GatewaySpec(
            run_dir=self.run_dir, bind=f"127.0.0.1:{self.port}", endpoints=endpoints, **settings
        )
        self.paths = GatewayPaths(self.run_dir, self.spec.gateway_id)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.fronts: list[MockFront] = []
        self.demand: Demand | None = None
        self._controllers: set[asyncio.StreamWriter] = set()
        self._clients: list[Client] = []
        self.config_edits: dict[str, str] = {}
        """What to replace in HAProxy's first config."""

    async def start(self) -> Gateway:
        self._controller = await asyncio.start_unix_server(
            self._on_router, os.path.join(self.run_dir, "controller.sock")
        )
        self.specs = {spec.name.partition("-")[0]: spec for spec in prepare(self.spec)}
        self._edit_config()
        self.start_process("router")
        await wait_for(Path(self.paths.spoe_socket).exists, "the router listens")
        if "relay" in self.specs:
            self.start_process("relay")
            await wait_for(Path(self.paths.relay_socket).exists, "the relay listens")
        self.start_process("haproxy")
        await self.wait_until_haproxy_answers()
        return self

    def _edit_config(self) -> None:
        """Put limits in that a test can wait for."""
        config = Path(self.paths.config)
        for old, new in self.config_edits.items():
            assert old in config.read_text()
            config.write_text(config.read_text().replace(old, new))

    async def wait_until_haproxy_answers(self) -> None:
        end_s = asyncio.get_running_loop().time() + DEADLINE_S
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                if self.spec.certificate:  # this client speaks plain text
                    if await probe_gateway(self.paths.alive_socket):
                        return
                elif (await self.get("/health")).status == 200:
                    return
            assert asyncio.get_running_loop().time() < end_s, (
                f"HAProxy does not answer: {self.log('haproxy')}"
            )
            await asyncio.sleep(0.02)

    def start_process(self, name: str) -> None:
        spec: ProcessSpec = self.specs[name]
        with open(spec.log_path, "ab") as log:
            self.processes[name] = subprocess.Popen(
                spec.argv,
                stdout=log,
                stderr=log,
                env={**os.environ, **spec.environment},
                start_new_session=True,
                preexec_fn=death_with_parent(),  # a test run that is killed leaves nothing behind
            )

    def signal(self, name: str, number: int) -> None:
        self.processes[name].send_signal(number)

    async def kill(self, name: str) -> None:
        """SIGKILL a process; for HAProxy master and worker, as the supervisor's process group would."""
        os.killpg(self.processes[name].pid, signal.SIGKILL)
        await wait_for(lambda: self.processes[name].poll() is not None, f"{name} is dead")

    def log(self, name: str) -> str:
        return Path(self.specs[name].log_path).read_text()[-3000:]

    async def stop(self) -> None:
        for client in self._clients:
            client.close()
        for front in self.fronts:
            await front.kill()
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(DEADLINE_S)
        self._controller.close()
        for writer in self._controllers:
            writer.transport.abort()
        await asyncio.sleep(0.01)  # transports close in the loop's next turns
        shutil.rmtree(self.run_dir)

    # ---- replicas

    async def add_front(self, replica_id: str, endpoint: str = "chat", **settings: Any) -> MockFront:
        """Start a mock front and wait until HAProxy has it as a server."""
        front = MockFront(replica_id, endpoint, self.paths.router_socket, **settings)
        self.fronts.append(await front.start())
        await wait_for(lambda: self.is_serving(replica_id), f"{replica_id} serves: {self.log('router')}")
        return front

    def is_serving(self, replica_id: str) -> bool:
        views = self.demand.replicas if self.demand else []
        return any(view.replica_id == replica_id and view.is_serving for view in views)

    def endpoint(self, name: str = "chat") -> EndpointDemand:
        """The newest demand of one endpoint."""
        assert self.demand is not None
        return next(endpoint for endpoint in self.demand.endpoints if endpoint.endpoint == name)

    # ---- controller

    async def _on_router(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._controllers.add(writer)
        decoder: FrameDecoder[Demand] = FrameDecoder(Demand)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(65_536):
                for self.demand in decoder.feed(data):
                    pass
        self._controllers.discard(writer)
        writer.transport.abort()

    def send_spec(self, spec: GatewaySpec) -> None:
        for writer in self._controllers:
            writer.write(encode_frame(spec))

    # ---- clients

    async def connect(self) -> Client:
        client = await Client("127.0.0.1", self.port).open()
        self._clients.append(client)
        return client

    async def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> HttpAnswer:
        client = await self.connect()
        try:
            client.send(method, path, body, headers)
            async with asyncio.timeout(DEADLINE_S):
                return await client.receive()
        finally:
            client.close()

    async def get(self, path: str) -> HttpAnswer:
        return await self.request("GET", path)

    async def chat(
        self, model: str = "chat", headers: dict[str, str] | None = None, **mock: Any
    ) -> HttpAnswer:
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "mock": mock})
        return await self.request("POST", "/v1/chat/completions", body.encode(), headers)


@contextlib.asynccontextmanager
async def running_gateway(
    *endpoints: EndpointRule, config_edits: dict[str, str] | None = None, **settings: Any
) -> AsyncIterator[Gateway]:
    gateway = Gateway(list(endpoints) or [EndpointRule("chat", "mock", 1024, 30.0)], **settings)
    gateway.config_edits = config_edits or {}
    try:
        yield await gateway.start()
    finally:
        await gateway.stop()
