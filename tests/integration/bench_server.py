"""A tiny OpenAI server with a known schedule, for the tests of the load generator. Runs in its own thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

USAGE = {"prompt_tokens": 11, "prompt_tokens_details": {"cached_tokens": 3}}


@dataclass
class Script:
    """How the server answers, and what it saw."""

    ttft_s: float = 0.01
    gap_s: float = 0.002
    behaviour: str = "ok"
    """ok | http_500 | http_401 | cut | no_done | error_event | hang | not_http | json | drop | close"""
    has_usage: bool = True
    models: list[str] = field(default_factory=lambda: ["tiny"])
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    num_connections: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


class TinyServer:
    """Serves a Script."""

    def __init__(self, script: Script) -> None:
        self._script = script

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._script.num_connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self._script.heads.append(head)
        if head.startswith("GET"):
            data = [{"id": name, "object": "model"} for name in self._script.models]
            _plain(
                writer,
                "401 Unauthorized" if self._script.behaviour == "http_401" else "200 OK",
                {"data": data},
            )
            return True
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self._script.bodies.append(body)
        is_ended = await self._behave(body, reader, writer)
        await writer.drain()
        return not is_ended

    async def _behave(
        self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request. Returns whether the connection ends with it."""
        behaviour = self._script.behaviour
        if behaviour == "hang":
            await reader.read()  # until the client gives up
            return True
        if behaviour == "not_http":
            writer.write(b"SSH-2.0-nothing\r\n")
            return True
        if behaviour == "drop":
            return True
        if behaviour == "http_500":
            _plain(
                writer,
                "500 Internal Server Error",
                {"error": {"message": "it broke", "type": "server_error"}},
            )
            return False
        if behaviour == "json":
            _plain(writer, "200 OK", {"choices": [{"message": {"content": "no stream"}}]})
            return False
        await self._stream(body, writer)
        return behaviour in ("cut", "close")

    async def _stream(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        script = self._script
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        if "messages" in body:
            _event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(script.ttft_s)
        for position in range(body["max_tokens"]):
            if position:
                await asyncio.sleep(script.gap_s)
            if position == 2 and script.behaviour == "cut":
                return
            if position == 2 and script.behaviour == "error_event":
                _event(writer, {"error": {"message": "engine died"}})
                break
            piece = {"text": "x"} if "prompt" in body else {"delta": {"content": "x"}}
            _event(writer, {"choices": [{"index": 0, **piece}]})
        else:
            _event(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
            if script.has_usage:
                usage = {**USAGE, "completion_tokens": body["max_tokens"]}
                _event(writer, {"choices": [], "usage": usage})
            if script.behaviour != "no_done":
                _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")


def _event(writer: asyncio.StreamWriter, tree: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(tree).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def _plain(writer: asyncio.StreamWriter, status: str, tree: dict[str, Any]) -> None:
    body = json.dumps(tree).encode()
    writer.write(
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


@contextmanager
def tiny_server(script: Script) -> Iterator[Script]:
    """Serve until the end of the block; `script.port` is set."""
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        tasks: set[asyncio.Task[None]] = set()
        server_of = TinyServer(script)

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(server_of.handle(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        script.port = server.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert started.wait(10), "the tiny server did not start"
    try:
        yield script
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive(), "the tiny server did not stop"
        loop.close()
