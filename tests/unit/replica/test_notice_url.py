"""An address that is asked for notices: what its answers mean, and that nothing it does delays anything."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.replica.notice import Notice
from headrace.replica.notice_url import MAX_BYTES, NoticeUrl, Silence, read_answer

LIMIT_S = 0.15


@pytest.mark.parametrize(
    ("status", "body", "meaning"),
    [
        (200, b"TRUE", Notice(None)),
        (200, b" true\n", Notice(None)),
        (200, b"FALSE", None),
        (200, b"NONE\n", None),
        (404, b"TRUE", None),
        (200, b'{"action": "terminate", "time": "2033-05-18T03:33:20Z"}', Notice(2e9)),
        (200, b'{"action": "stop", "time": "2033-05-18T03:33:20"}', Notice(2e9)),
        (200, b'{"time": "2033-05-18T05:33:20+02:00"}', Notice(2e9)),
        (200, b'{"time": "1950-01-01T00:00:00Z"}', Notice(0.0)),
        (200, b'{"time": "0001-01-01T00:00:00+23:00"}', Notice(0.0)),
        (200, b'{"time": "soon"}', Notice(None)),
        (200, b'{"time": 5}', Notice(None)),
        (200, b'{"deadline_s": 12.5}', Notice(12.5)),
        (200, b'{"deadline_s": 12, "time": "2033-05-18T03:33:20Z"}', Notice(12.0)),
        (200, b'{"deadline_s": -1}', Notice(None)),
        (200, b'{"deadline_s": true}', Notice(None)),
        (200, b'{"deadline_s": null}', Notice(None)),
        (200, b'{"deadline_s": 1' + b"0" * 400 + b"}", Notice(None)),
    ],
)
def test_an_answer_means_leave_or_stay(status: int, body: bytes, meaning: Notice | None) -> None:
    assert read_answer(status, body) == meaning


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, b"", "neither TRUE"),
        (200, b"[1]", "neither TRUE"),
        (200, b"{}", "neither TRUE"),
        (200, b"<html>TRUE", "neither TRUE"),
        (200, b"[" * 60_000, "neither TRUE"),
        (200, b" " * MAX_BYTES + b"TRUE", "longer than 64 KiB"),
        (302, b"TRUE", "status 302"),
        (500, b"TRUE", "status 500"),
        (401, b"", "status 401"),
        (204, b"", "status 204"),
    ],
)
def test_anything_else_is_silence_with_its_reason(status: int, body: bytes, words: str) -> None:
    answer = read_answer(status, body)
    assert isinstance(answer, Silence)
    assert words in answer.reason


@given(st.integers(100, 599), st.binary(max_size=200))
def test_no_answer_is_an_error(status: int, body: bytes) -> None:
    answer = read_answer(status, body)
    assert answer is None or isinstance(answer, Notice | Silence)


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except OSError:
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()


def answering(*answers: bytes) -> tuple[Handler, list[bytes]]:
    """Answers in turn, the last one for ever, and keeps what was asked."""
    asked: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answers[min(len(asked), len(answers)) - 1])
        await writer.drain()

    return handle, asked


def http(status: int, body: bytes, headers: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body


async def test_it_asks_with_the_headers_and_hears_that_the_machine_stays_and_then_goes() -> None:
    handler, asked = answering(http(200, b"FALSE"), http(404, b""), http(200, b"TRUE"))
    async with server(handler) as url:
        source = NoticeUrl(f"{url}/a/b?c=d", {"Metadata-Flavor": "Google"})
        assert [await source.look() for _ in range(3)] == [None, None, Notice(None)]
    assert asked[0].startswith(b"GET /a/b?c=d HTTP/1.1\r\n")
    assert b"Metadata-Flavor: Google\r\n" in asked[0]


async def test_a_redirect_is_not_followed_and_what_is_not_heard_is_logged_once_per_change(
    caplog: pytest.LogCaptureFixture,
) -> None:
    other, asked_other = answering(http(200, b"TRUE"))
    async with server(other) as target:
        redirect = http(302, b"", f"location: {target}/\r\n")
        answers = redirect, redirect, http(500, b""), b"\0\0\0", http(200, b"FALSE")
        handler, _ = answering(*answers)
        async with server(handler) as url:
            source = NoticeUrl(f"{url}/x?key=hidden", {})
            assert [await source.look() for _ in range(6)] == [None] * 6
    assert asked_other == []
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert all(words in line for words, line in zip(("302", "500", "no HTTP", "again"), lines, strict=True))
    assert all(f"{url}/x" in line and "hidden" not in line for line in lines)


async def test_nobody_there_is_silence(caplog: pytest.LogCaptureFixture) -> None:
    async with server(answering(b"")[0]) as url:
        pass
    assert await NoticeUrl(url, {}).look() is None
    assert "refused" in caplog.text
    assert await NoticeUrl("https://127.0.0.1:1/", {}).look() is None


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drip_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 100 X\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


async def drip_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 60000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("behaviour", [hang, drip_head, drip_body])
@pytest.mark.slow
async def test_a_server_that_hangs_is_cut_and_asked_again(
    behaviour: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    is_well = False
    good, _ = answering(http(200, b'{"deadline_s": 7}'))

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (good if is_well else behaviour)(reader, writer)

    async with server(handle) as url:
        source = NoticeUrl(url, {}, LIMIT_S)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        assert await source.look() is None
        assert loop.time() - began_s < LIMIT_S + 1.0
        is_well = True
        async with asyncio.timeout(10):
            while (notice := await source.look()) is None:
                pass
        assert notice == Notice(7.0)
    assert "no answer within 0.15 s" in caplog.text
    assert sum(thread.name == "notice-url" for thread in threading.enumerate()) <= 1


async def test_an_endless_answer_is_read_no_further_than_its_bound(caplog: pytest.LogCaptureFixture) -> None:
    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with server(pour) as url:
        assert await NoticeUrl(url, {}).look() is None
    assert "longer than 64 KiB" in caplog.text
