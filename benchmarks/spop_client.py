"""A client that asks the router as HAProxy does: NOTIFY frames on many pipelined connections to spoe.sock.

Owns the frames: the arguments that HAProxy's rendered spoe.conf names, in that order, with values like a real
request's. Must not know the router's inside, nor what is done with an answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from headrace.api.messages import GatewaySpec
from headrace.gateway import spop
from headrace.gateway.haproxy_config import render_spoe
from headrace.gateway.haproxy_frontend import ROUTER_HEAD_BYTES
from headrace.gateway.names import backend_name

_SERVER_VARIABLE = b"\x06server\x08"
"""In an ACK: the length and name of the variable, and the type of its value, a string."""
_HELLO = {"supported-versions": b"2.0", "capabilities": b"pipelining", "engine-id": b"benchmark"}
_STRING, _BINARY, _SIGNED, _IPV4, _NULL = b"\x08", b"\x09", b"\x04", b"\x06", b"\x00"


@dataclass(frozen=True)
class Question:
    """A request's announcement without its id, and what its tenant and prompt are."""

    before_id: bytes
    after_id: bytes
    tenant: str
    head: bytes


def make_questions(spec: GatewaySpec, num: int, head_bytes: int, seed: int) -> list[Question]:
    """Return announcements of chat requests with bodies of `head_bytes`, of all tenants in turn. The first
    kilobyte of a tenant's prompts is the same, the rest is new in each."""
    source = random.Random(seed)
    endpoint = spec.endpoints[0].name
    tenants = [rule.name for rule in spec.tenants] or [""]
    names = _argument_names(spec)
    shared = {tenant: _words(source, 1024) for tenant in tenants}
    questions = []
    for number in range(num):
        tenant = tenants[number % len(tenants)]
        prompt = shared[tenant] + _words(source, head_bytes - 1024 - 120)
        body = json.dumps(
            {"model": endpoint, "messages": [{"role": "user", "content": prompt}], "max_tokens": 128}
        ).encode()
        values = {
            "id": b"",  # stands apart
            "endpoint": _STRING + spop.write_string(backend_name(endpoint).encode()),
            "tenant": _STRING + spop.write_string(tenant.encode()),
            "client": _IPV4 + bytes((127, 0, 0, 1)),
            "client_port": _SIGNED + spop.write_varint(40_000 + number % 8192),
            "path": _STRING + spop.write_string(b"/v1/chat/completions"),
            "size": _SIGNED + spop.write_varint(len(body)),
            "head": _BINARY + spop.write_string(body[:ROUTER_HEAD_BYTES]),
        }
        before, after = _payload(names, values)
        questions.append(Question(before, after, tenant, body))
    return questions


def _argument_names(spec: GatewaySpec) -> list[str]:
    """Read them from the file that HAProxy reads, so that the two cannot differ."""
    text = render_spoe(spec).replace("\\\n", " ")
    line = re.search(r"^\s*args (.*)$", text, re.MULTILINE)
    assert line is not None, "spoe.conf has no args"
    return [part.partition("=")[0] for part in line.group(1).split() if "=" in part]


def _payload(names: list[str], values: dict[str, bytes]) -> tuple[bytes, bytes]:
    """Return the message before and after the value of `id`. Arguments without a value are null, as HAProxy
    sends what a request does not have."""
    before = after = b""
    has_id = False
    for name in names:
        part = spop.write_string(name.encode()) + values.get(name, _NULL)
        if has_id:
            after += part
        else:
            before += part
        has_id = has_id or name == "id"
    return spop.write_string(b"decide") + bytes((len(names),)) + before, after


def _words(source: random.Random, num_bytes: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz     "
    return "".join(source.choices(letters, k=num_bytes))


class SpopClient(asyncio.Protocol):
    """One connection. `on_answers` gets the stream ids that were answered, and their servers ("": none)."""

    def __init__(self, on_answers: Callable[[SpopClient, list[tuple[int, str]]], None]) -> None:
        self._on_answers = on_answers
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self.greeted = asyncio.get_running_loop().create_future()
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        items = b"".join(
            spop.write_string(name.encode()) + _STRING + spop.write_string(value)
            for name, value in _HELLO.items()
        )
        size = spop.write_string(b"max-frame-size") + b"\x03" + spop.write_varint(65_532)
        self._transport.write(spop.encode_frame(spop.HAPROXY_HELLO, 0, 0, items + size))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if not self.greeted.done():
            self.greeted.set_exception(ConnectionError("the router closed the connection"))

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        start, size = 0, len(data)
        answers = []
        while size - start >= 4:
            end = start + 4 + int.from_bytes(data[start : start + 4], "big")
            if end > size:
                break
            kind = data[start + 4]
            if kind == spop.ACK:
                stream_id, at = spop.read_varint(data, start + 9)
                found = data.find(_SERVER_VARIABLE, at, end)
                server = ""
                if found >= 0:
                    name, _ = spop.read_string(data, found + len(_SERVER_VARIABLE))
                    server = name.decode()
                answers.append((stream_id, server))
            elif kind == spop.AGENT_HELLO:
                self.greeted.set_result(None)
            else:
                raise ConnectionError(f"the router sent a frame of kind {kind}: {data[start:end]!r}")
            start = end
        self._rest = data[start:]
        if answers:
            self._on_answers(self, answers)

    def send(self, frames: bytes) -> None:
        """Write whole frames."""
        if self._transport is None or self.is_lost:
            raise ConnectionError("the router closed the connection")
        self._transport.write(frames)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def notify_frame(stream_id: int, request_id: str, question: Question) -> bytes:
    """Return one whole NOTIFY frame."""
    payload = b"".join(
        (question.before_id, _STRING, spop.write_string(request_id.encode()), question.after_id)
    )
    return spop.encode_frame(spop.NOTIFY, stream_id, 1, payload)


def request_id_of(stream_id: int) -> str:
    """Return an id like those of HAProxy's unique-id-format."""
    return f"hr-g1-{int(time.time()):X}-1F{stream_id % 16:X}-{stream_id:X}"
