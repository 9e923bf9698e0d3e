"""Programs that play front, router and HAProxy towards the controller: they speak its messages and no more.

Run as `python fake_processes.py ROLE JSON`. The real ones are tested with the controller in
`test_control_system.py` and in tests/e2e.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import Demand, GatewaySpec, LoadReport, ReplicaSpec, ReplicaView
from headrace.api.notation import split_address
from headrace.api.run_paths import alive_socket_path, relay_socket_path, router_socket_path

INTERVAL_S = 0.1


async def front(spec: ReplicaSpec) -> None:
    """Reports starting, then ready; a model called `broken` fails, `crash` exits; SIGTERM drains."""
    if spec.engine.model == "crash":
        print("no memory left", flush=True)
        sys.exit(7)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    loop_start_s = asyncio.get_running_loop().time()
    sequence = 0

    def report() -> LoadReport:
        nonlocal sequence
        sequence += 1
        elapsed_s = asyncio.get_running_loop().time() - loop_start_s
        state = "ready" if elapsed_s >= spec.engine.simulated_start_s else "starting"
        if spec.engine.model == "broken":
            state = "failed"
        if stopping.is_set():
            state = "draining"
        return LoadReport(
            replica_id=spec.replica_id,
            endpoint=spec.endpoint,
            model=spec.engine.model,
            address="127.0.0.1:1",
            pid=os.getpid(),
            sequence=sequence,
            lease_s=spec.lease_s,
            state=state,  # type: ignore[arg-type]
            last_error="the weights are damaged" if state == "failed" else "",
            is_retryable=state != "failed",
            generation=spec.generation,
        )

    async def tell(path: str) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(path)
                while not reader.at_eof():
                    writer.write(encode_frame(report()))
                    await writer.drain()
                    await asyncio.sleep(INTERVAL_S)
            except OSError:
                pass
            await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(tell(path)) for path in spec.report_sockets]
    await stopping.wait()
    await asyncio.sleep(2 * INTERVAL_S)
    for task in tasks:
        task.cancel()


async def router(spec: GatewaySpec) -> None:
    """Takes load reports, and tells the controller that ready replicas are served."""
    states: dict[str, str] = {}
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sys.exit, 0)

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder: FrameDecoder[LoadReport] = FrameDecoder(LoadReport)
        name = ""
        while data := await reader.read(65536):
            for message in decoder.feed(data):
                name = message.replica_id
                states[name] = message.state
        states.pop(name, None)
        writer.close()

    path = router_socket_path(spec.run_dir, spec.gateway_id)
    remove(path)
    await asyncio.start_unix_server(listen, path)
    while True:
        try:
            reader, writer = await asyncio.open_unix_connection(f"{spec.run_dir}/controller.sock")
            while not reader.at_eof():
                views = [ReplicaView(name, 0, state == "ready") for name, state in states.items()]
                writer.write(encode_frame(Demand(spec.gateway_id, os.getpid(), [], views)))
                await writer.drain()
                await asyncio.sleep(INTERVAL_S)
        except OSError:
            pass
        await asyncio.sleep(0.05)


async def relay(spec: GatewaySpec) -> None:
    """Answers HTTP on its socket."""
    path = relay_socket_path(spec.run_dir, spec.gateway_id)
    remove(path)
    server = await asyncio.start_unix_server(answer_http, path)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sys.exit, 0)
    await server.serve_forever()


async def answer_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    await writer.drain()
    writer.close()


async def haproxy(spec: GatewaySpec) -> None:
    """Answers HTTP, on the public port that it shares with others and on its own socket."""
    host, port = split_address(spec.bind)
    alive_socket = alive_socket_path(spec.run_dir, spec.gateway_id)
    remove(alive_socket)
    await asyncio.start_unix_server(answer_http, alive_socket)
    server = await asyncio.start_server(answer_http, host, port, reuse_port=True)
    await server.serve_forever()


def remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)


if __name__ == "__main__":
    role, argument = sys.argv[1:]
    if role == "front":
        asyncio.run(front(msgspec.json.decode(argument, type=ReplicaSpec)))
    else:
        gateway = msgspec.json.decode(argument, type=GatewaySpec)
        asyncio.run({"router": router, "haproxy": haproxy, "relay": relay}[role](gateway))
