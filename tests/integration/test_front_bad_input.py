"""Wrong requests and rude clients get a clear answer and harm nobody else: a stream runs beside each test."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from tests.integration.front_process import RunningFront, check_conservation, running_front

from headrace.api.messages import EngineSpec, TerminalState

pytestmark = pytest.mark.slow
CONTEXT = 4000
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def front() -> Iterator[RunningFront]:
    engine = EngineSpec("simulated", "simulated", simulated_step_s=0.001, max_context_tokens=CONTEXT)
    with running_front(engine, max_body_bytes=100_000) as front:
        front.wait_ready()
        yield front
        check_conservation(front)


@pytest.fixture(autouse=True)
async def bystander(front: RunningFront) -> AsyncIterator[None]:
    """A stream that must come through whole, whatever the test does."""
    body = {"model": "chat", "prompt": "bystander", "max_tokens": 100, "stream": True}

    async def read_all() -> str:
        async with httpx.AsyncClient(verify=False, timeout=20) as client:
            return (await client.post(f"{front.url}/v1/completions", json=body)).text

    task = asyncio.create_task(read_all())
    yield
    text = await task
    assert text.count('"text":') == 101, "100 pieces and the finish"
    assert text.endswith("data: [DONE]\n\n")


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "chat", "messages": MESSAGES, "max_tokens": 4, **fields}


BAD_CHATS: list[tuple[Any, int, str | None, str]] = [
    (b"", 400, None, "body is empty"),
    (b'{"model": "chat"', 400, None, "not valid JSON"),
    (b'{"model": "chat", "messages": "\xff"}', 400, "messages", "expected array"),
    (b"[1]", 400, None, "must be a JSON object"),
    (b"[" * 50_000, 400, None, "JSON"),
    ({"messages": MESSAGES}, 400, "model", "model is missing"),
    ({"model": "chat"}, 400, "messages", "messages is missing"),
    (chat(model="nope"), 404, "model", "serves 'chat'"),
    (chat(messages=[]), 400, "messages", "messages is empty"),
    (chat(messages=[{"role": "wizard", "content": "x"}]), 400, "messages[0].role", "'wizard'"),
    (chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages[0]", "not supported yet"),
    (chat(messages=[{"role": "user"}]), 400, "messages[0].content", "missing"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
        "messages[0].content",
        "only 'text'",
    ),
    (chat(max_tokens="many"), 400, "max_tokens", "expected int | null, got str"),
    (chat(max_tokens=0), 400, "max_tokens", "must be 1 to"),
    (chat(max_tokens=CONTEXT), 400, "max_tokens", f"the context holds {CONTEXT}"),
    (chat(max_tokens=None, max_completion_tokens=-5), 400, "max_completion_tokens", "must be 1 to"),
    (chat(messages=[{"role": "user", "content": "x" * 5000}]), 400, "messages", f"context holds {CONTEXT}"),
    (chat(stop=[""]), 400, "stop", "0 characters"),
    (chat(stop=["a", "b", "c", "d", "e"]), 400, "stop", "at most 4"),
    (chat(stop=[1]), 400, "stop[0]", "expected str"),
    (chat(temperature=-1), 400, "temperature", "at least 0"),
    (chat(temperature=3), 400, "temperature", "at most 2"),
    (chat(top_p=0), 400, "top_p", "greater than 0"),
    (chat(n=0), 400, "n", "at least 1"),
    (chat(n=1000), 400, "n", "at most 64"),
    (chat(logit_bias={"x": 1}), 400, "logit_bias", "token ids, 0 to 256"),
    (chat(logit_bias={"300": 1}), 400, "logit_bias", "token ids, 0 to 256"),
    (chat(logit_bias={"3": 101}), 400, "logit_bias", "-100 to 100"),
    (chat(top_logprobs=3), 400, "top_logprobs", "needs logprobs"),
    (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "0 to 20"),
    (chat(min_tokens=5), 400, "min_tokens", "0 to max_tokens, here 4"),
    (chat(stop_token_ids=[999]), 400, "stop_token_ids", "999"),
    (chat(response_format={"type": "json_object"}), 400, "response_format", "only simulates"),
    (chat(response_format={"type": "xml"}), 400, "response_format.type", "'json_schema'"),
    (chat(tools=[{"type": "function"}]), 400, "tools", "not supported yet"),
    (chat(stream_options={"include_usage": True}), 400, "stream_options", "needs stream"),
]


@pytest.mark.parametrize(("body", "status", "param", "words"), BAD_CHATS)
async def test_a_wrong_chat_request_is_refused_with_words_that_help(
    front: RunningFront, body: Any, status: int, param: str | None, words: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with httpx.AsyncClient(verify=False) as client:
        response = await client.post(f"{front.url}/v1/chat/completions", content=content)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "\ud800"}, None),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": ["x"] * 33, "n": 2}, "n"),
    ],
)
async def test_a_wrong_completion_request_is_refused(
    front: RunningFront, fields: dict[str, Any], param: str | None
) -> None:
    async with httpx.AsyncClient(verify=False) as client:
        content = json.dumps({"model": "chat", **fields}).encode()
        response = await client.post(f"{front.url}/v1/completions", content=content)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_unknown_fields_are_ignored(front: RunningFront) -> None:
    async with httpx.AsyncClient(verify=False) as client:
        response = await client.post(
            f"{front.url}/v1/chat/completions", json=chat(store=True, metadata={"a": 1}, tools=[])
        )
    assert response.status_code == 200


async def test_a_wrong_method_is_told_the_right_one(front: RunningFront) -> None:
    async with httpx.AsyncClient(verify=False) as client:
        response = await client.get(f"{front.url}/v1/chat/completions")
        other = await client.delete(f"{front.url}/v1/models/chat")
    assert (response.status_code, response.headers["allow"]) == (405, "POST, OPTIONS")
    assert (other.status_code, other.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/9.9\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 40_000, 413),
        (b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 10_000 + b"\r\n", 413),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: 100001\r\n\r\n", 413),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: nine\r\n\r\n", 400),
        (
            b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
            + b"4000\r\n%b\r\n" % (b" " * 0x4000) * 7,
            413,
        ),
        (b"GET /health HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n", 400),
    ],
)
async def test_what_is_not_good_http_is_answered_and_closed(
    front: RunningFront, data: bytes, status: int
) -> None:
    answer = await front.exchange(data)
    assert status_of(answer) == status
    assert b"connection: close" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


async def test_pipelined_requests_are_answered_in_order(front: RunningFront) -> None:
    body = json.dumps({"model": "chat", "prompt": "x", "max_tokens": 5}).encode()
    post = b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    last = b"GET /version HTTP/1.1\r\nconnection: close\r\n\r\n"
    answer = await front.exchange(post + b"GET /health HTTP/1.1\r\n\r\n" * 20 + post + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 23
    assert answer.index(b"text_completion") < answer.index(b'"status":"ok"') < answer.index(b'"version"')


async def test_a_client_that_asks_to_continue_is_told_to(front: RunningFront) -> None:
    body = json.dumps({"model": "chat", "prompt": "x", "max_tokens": 1}).encode()
    reader, writer = await front.connect()
    head = b"POST /v1/completions HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(body))
    async with asyncio.timeout(5):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert status_of(await reader.readuntil(b"\r\n\r\n")) == 200
    writer.close()
    await writer.wait_closed()


async def test_an_http_1_0_client_gets_a_stream_without_chunks(front: RunningFront) -> None:
    body = json.dumps({"model": "chat", "prompt": "x", "max_tokens": 5, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body)
    answer = await front.exchange(head + body)
    assert b"chunked" not in answer
    assert answer.endswith(b"data: [DONE]\n\n")


async def start_stream(
    front: RunningFront, request_id: str, max_tokens: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    body = json.dumps({"model": "chat", "prompt": "x", "max_tokens": max_tokens, "stream": True}).encode()
    reader, writer = await front.connect()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nx-headrace-request-id: %b\r\ncontent-length: %d\r\n\r\n%b"
        % (request_id.encode(), len(body), body)
    )
    return reader, writer


async def wait_aborted(front: RunningFront, request_id: str) -> None:
    finished = await asyncio.to_thread(front.router.wait_finished, request_id)
    assert finished.state is TerminalState.ABORTED
    assert finished.num_output_tokens < 3000


async def test_a_client_that_leaves_during_its_stream_aborts_it(front: RunningFront) -> None:
    reader, writer = await start_stream(front, "leaves-during", 3900)
    async with asyncio.timeout(5):
        await reader.readuntil(b"text_completion")
    writer.close()
    await writer.wait_closed()
    await wait_aborted(front, "leaves-during")


async def test_a_client_that_leaves_before_its_first_token_aborts_it(front: RunningFront) -> None:
    _reader, writer = await start_stream(front, "leaves-before", 3900)
    raw = writer.get_extra_info("socket")
    await writer.drain()
    # Linger of zero seconds: the close is a reset.
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    await wait_aborted(front, "leaves-before")
