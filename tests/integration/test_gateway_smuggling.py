"""Requests that two parsers might read differently, against a real HAProxy: one request, one answer, and no
header of ours from outside. What reached the front is recorded; a real front process judges the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httptools
import msgspec
import pytest
import pytest_asyncio
from tests.integration.gateway_rig import Gateway, running_gateway, wait_for
from tests.integration.recording_front import RecordingFront

from headrace.api.messages import EngineSpec, ProcessSpec, ReplicaSpec
from headrace.control.specs import python_process

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
LIMIT_S = 5.0
BODY = b'{"model":"chat"}'
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
LENGTH = b"content-length: 16\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
CHUNKS = b"10\r\n" + BODY + b"\r\n0\r\n\r\n"
HIDDEN = POST + b"x-evil: 1\r\n" + LENGTH + b"\r\n" + BODY
OURS = "x-headrace-request-id"


@dataclass(frozen=True)
class Attempt:
    """Bytes of one connection, the statuses that come back, how many requests may reach the front."""

    name: str
    data: bytes
    statuses: tuple[int, ...]
    num_seen: int = 0
    is_closed: bool = False
    """HAProxy does not trust the rest of the connection."""


def post(headers: bytes = b"", target: bytes = b"/v1/completions") -> bytes:
    return b"POST " + target + b" HTTP/1.1\r\nhost: x\r\n" + headers + LENGTH + b"\r\n" + BODY


def refused(name: str, data: bytes, status: int = 400) -> Attempt:
    return Attempt(name, data, (status,), 0, True)


def served(name: str, data: bytes, is_closed: bool = False) -> Attempt:
    return Attempt(name, data, (200,), 1, is_closed)


def with_te(value: bytes, name: bytes = b"transfer-encoding:") -> bytes:
    return POST + name + value + b"\r\n\r\n" + CHUNKS


def with_length(value: bytes) -> bytes:
    return POST + b"content-length: " + value + b"\r\n\r\n" + BODY


ATTEMPTS = [
    # Two lengths: the coding wins, and nothing behind it on the connection is believed.
    served("CL.TE", POST + b"content-length: 1000\r\n" + CHUNKED + b"\r\n" + CHUNKS + HIDDEN, True),
    served("TE.CL", POST + CHUNKED + b"content-length: 4\r\n\r\n" + CHUNKS + HIDDEN, True),
    refused("two different lengths", POST + LENGTH + b"content-length: 17\r\n\r\n" + BODY + b"x"),
    served("the same length twice", POST + LENGTH + LENGTH + b"\r\n" + BODY),
    *(
        refused(f"length {value!r}", with_length(value))
        for value in (b"+16", b"0x10", b"-1", b"18446744073709551632", b"", b"1 6", b"16;", b"1,6")
    ),
    # Codings that some parsers take for chunked.
    *(
        refused(f"coding {value!r}", with_te(value))
        for value in (b" xchunked", b" \x0bchunked", b" chunked, chunked", b" chunked\x00", b' "chunked"')
    ),
    refused("coding, space before the colon", with_te(b" chunked", b"transfer-encoding :")),
    refused("gzip, chunked", with_te(b" gzip, chunked"), 422),
    refused("chunked, then identity", with_te(b" chunked\r\ntransfer-encoding: identity")),
    refused("identity, then chunked", with_te(b" identity\r\ntransfer-encoding: chunked"), 422),
    served("chunked in any case after a tab", with_te(b"\tChUnKeD")),
    served("chunked in HTTP/1.0", POST.replace(b"/1.1", b"/1.0") + CHUNKED + b"\r\n" + CHUNKS, True),
    # Chunks.
    *(
        refused(f"chunk size {size!r}", POST + CHUNKED + b"\r\n" + size + BODY + b"\r\n0\r\n\r\n")
        for size in (
            b"10\n",
            b"10;\n",
            b"10000000000000010\r\n",
            b"-10\r\n",
            b" 10\r\n",
            b"0x10\r\n",
            b"\r\n",
        )
    ),
    served("chunk extension", POST + CHUNKED + b"\r\n10;a=b\r\n" + BODY + b"\r\n0\r\n\r\n"),
    refused("chunk without its end", POST + CHUNKED + b"\r\n10\r\n" + BODY + b"XX0\r\n\r\n"),
    # Lines and names.
    served("line feeds alone", (POST + LENGTH + b"\r\n" + BODY).replace(b"\r\n", b"\n")),
    refused("a carriage return in a value", post(b"a: b\rx-headrace-tenant: rich\r\n")),
    refused("a null in a value", post(b"a: b\x00c\r\n")),
    refused("spaces in a name", post(b"x headrace tenant: rich\r\n")),
    refused("a space before the colon", post(b"x-headrace-tenant : rich\r\n")),
    refused("a space before the first name", post(b" x-headrace-tenant: rich\r\n")),
    refused("a line without a colon", post(b"x-headrace-tenant\r\n")),
    served("a folded line", post(b"a: b\r\n x-headrace-tenant: rich\r\n")),
    # Our headers.
    served("our names in any case", post(b"X-HEADRACE-TENANT: rich\r\nx-HeadRace-Model: evil\r\n")),
    served("our names with underscores", post(b"x_headrace_tenant: r\r\nx-headrace_request_id: f\r\n")),
    served("our name alone", post(b"x-headrace: r\r\n")),
    served("our names as hop-by-hop", post(b"connection: x-headrace-tenant, x-headrace-request-id\r\n")),
    served("hop-by-hop and close", post(b"connection: close, x-headrace-request-id\r\n"), True),
    # Targets.
    served("an absolute target of this host", post(target=b"http://x/v1/completions")),
    refused("an absolute target of another host", post(target=b"http://evil/v1/completions")),
    refused("two hosts", post(b"host: y\r\n")),
    *(
        Attempt(f"target {target!r}", post(target=target), (404,))
        for target in (b"/V1/completions", b"/v1%2fcompletions", b"/v1/x/../completions", b"//v1/completions")
    ),
    *(
        refused(f"target {target!r}", post(target=target))
        for target in (b"/v1/completions#x", b"/v1/completions x", b"/v1/comp\x01letions", b"/v1/\xc3\xa9")
    ),
    Attempt("a connect", b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n", (404,)),
    Attempt("an asterisk", b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n", (404,)),
    refused("HTTP/0.9", b"GET /health\r\n\r\n"),
    # What follows on the same connection.
    Attempt("two in a row", post() + post(), (200, 200), 2),
    Attempt("one behind a 404", b"GET /nope HTTP/1.1\r\nhost: x\r\n\r\n" + post(), (404, 200), 1),
    refused("one behind a 413", POST + b"content-length: 99999999\r\n\r\n" + HIDDEN, 413),
    Attempt(
        "one as a body", b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 89\r\n\r\n" + HIDDEN, (200,)
    ),
    Attempt(
        "one as a body of a wrong method",
        b"PUT /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        (405,),
    ),
    Attempt(
        "an upgrade", post(b"connection: upgrade\r\nupgrade: h2c\r\nhttp2-settings: AAMA\r\n"), (200,), 1
    ),
]
assert len(HIDDEN) == 89


class Client:
    """A raw connection whose answers are parsed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self._parser = httptools.HttpResponseParser(self)
        self.statuses: list[int] = []
        self.is_closed = False

    def on_message_complete(self) -> None:
        self.statuses.append(self._parser.get_status_code())

    async def read_answers(self, count: int) -> None:
        """Read until `count` answers are there, or the connection is closed."""
        async with asyncio.timeout(LIMIT_S):
            while len(self.statuses) < count and not self.is_closed:
                await self._read()

    async def read_end(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not self.is_closed:
                await self._read()

    async def _read(self) -> None:
        try:
            data = await self._reader.read(65_536)
        except OSError:  # closed with what we sent unread
            data = b""
        self.is_closed = not data
        if data:
            self._parser.feed_data(data)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig() -> AsyncIterator[tuple[Gateway, RecordingFront]]:
    async with running_gateway(replica_protocol="http1") as gateway:
        front = RecordingFront("chat-1", "chat", gateway.paths.router_socket)
        gateway.fronts.append(await front.start())
        await wait_for(lambda: gateway.is_serving("chat-1"), "the front serves")
        yield gateway, front


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.name)
async def test_one_request_is_one_answer_and_says_nothing_of_ours(
    rig: tuple[Gateway, RecordingFront], attempt: Attempt
) -> None:
    gateway, front = rig
    num_before = len(front.seen)
    client = Client(*await asyncio.open_connection("127.0.0.1", gateway.port))
    try:
        client.writer.write(attempt.data)
        await client.read_answers(len(attempt.statuses))
        if attempt.is_closed:
            await client.read_end()
        else:  # the next request on this connection is read where it begins
            client.writer.write(b"GET /v1/models/none HTTP/1.1\r\nhost: x\r\n\r\n")
            await client.read_answers(len(attempt.statuses) + 1)
            assert client.statuses.pop() == 404
            assert not client.is_closed
        assert tuple(client.statuses) == attempt.statuses
    finally:
        client.writer.transport.abort()
    seen = front.seen[num_before:]
    assert len(seen) == attempt.num_seen
    for request in seen:
        assert request.body == BODY
        names = [name for name, _ in request.headers if "headrace" in name.lower()]
        assert names == [OURS], "our own id, once"
        assert dict(request.headers)[OURS].startswith("hr-")
        assert not {"x-evil", "connection"} & {name for name, _ in request.headers}
    assert front.num_bad == 0


# ---- a real front behind a real HAProxy


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real() -> AsyncIterator[Gateway]:
    async with running_gateway(max_body_bytes=300_000) as gateway:
        engine = EngineSpec("simulated", "simulated", simulated_step_s=0.001)
        sockets = [gateway.paths.router_socket]
        spec = ReplicaSpec("chat-1", "chat", engine, gateway.run_dir, sockets, max_body_bytes=300_000)
        process: ProcessSpec = python_process(
            "chat-1", "headrace.replica", msgspec.json.encode(spec).decode(), Path(gateway.run_dir)
        )
        gateway.specs["chat-1"] = process
        gateway.start_process("chat-1")
        await wait_for(lambda: gateway.is_serving("chat-1"), "the front serves", 20)
        yield gateway
        assert "Traceback" not in gateway.log("chat-1")


def question(**fields: Any) -> bytes:
    return msgspec.json.encode({"model": "chat", "prompt": "x", "max_tokens": 2, **fields})


def chunks(body: bytes, trailers: bytes = b"") -> bytes:
    pieces = (body[start : start + 50_000] for start in range(0, len(body), 50_000))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + trailers + b"\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (POST + CHUNKED + b"\r\n" + chunks(question()), 200),
        (POST + CHUNKED + b"\r\n" + chunks(question(), b"x-headrace-tenant: rich\r\na: b\r\n"), 200),
        (POST + CHUNKED + b"\r\n" + chunks(question(metadata="x" * 250_000)), 200),
        # Its model is in the head, so it goes to the front, which counts while it reads.
        (POST + CHUNKED + b"\r\n" + chunks(question(metadata="x" * 400_000)), 413),
        (POST + CHUNKED + b"\r\n" + chunks(b'{"prompt":"' + b"x" * 400_000 + b'","model":"chat"}'), 413),
        (
            b"POST http://x/v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
            % len(question())
            + question(),
            200,
        ),
    ],
)
async def test_a_real_front_answers_what_haproxy_lets_through(
    real: Gateway, data: bytes, status: int
) -> None:
    client = Client(*await asyncio.open_connection("127.0.0.1", real.port))
    try:
        client.writer.write(data)
        await client.read_answers(1)
        assert client.statuses == [status]
    finally:
        client.writer.transport.abort()
    assert (await real.request("POST", "/v1/completions", question())).status == 200
