"""Guests over a real socket: their tokens arrive, and whoever lies, hangs or dies harms itself alone."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
from tests.unit.replica.fake_streams import FakeEngine, FakeStream

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import (
    Abort,
    EngineFailed,
    GenerationRequest,
    PeerEvent,
    Placed,
    SamplingParams,
    StepBatch,
    StepOutput,
    Submit,
    Wake,
)
from headrace.clock import SystemClock
from headrace.replica import peer_link, peer_server
from headrace.replica.peer_link import PeerPool
from headrace.replica.peer_server import PeerServer

pytestmark = pytest.mark.slow


class Host:
    """A host with an engine that does as it is told, and a front that uses it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.engine = FakeEngine()
        self.refusal = ""
        self.num_changes = 0
        self.expected: list[tuple[str, list[int], int]] = []
        self.server = PeerServer(self.engine, lambda _: self.refusal, self._on_change, self)
        self.pool = PeerPool(SystemClock())

    def _on_change(self) -> None:
        self.num_changes += 1

    def expect(self, request: GenerationRequest, hashes: Sequence[int], num_bytes: int) -> None:
        self.expected.append((request.request_id, list(hashes), num_bytes))

    def send(self, name: str, placed: Placed | None = None, tenant: str = "") -> FakeStream:
        stream = FakeStream(name)
        stream.request = msgspec.structs.replace(stream.request, placed=placed, tenant=tenant)
        self.pool.submit(self.path, stream.request, stream)
        return stream

    def guest(self, name: str) -> str:
        """The engine's id of a guest."""
        [found] = [each for each in self.engine.streams if each.endswith(f":{name}")]
        return found

    async def wait(self, condition: Callable[[], object], limit_s: float = 10.0) -> None:
        deadline_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline_s, f"{self.server}, {self.pool}, {self.engine.streams}"
            await asyncio.sleep(0.002)

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.path)


@asynccontextmanager
async def running() -> AsyncIterator[Host]:
    with tempfile.TemporaryDirectory(prefix="headrace-peer-") as folder:
        host = Host(str(Path(folder) / "peer.sock"))
        await host.server.listen(host.path)
        try:
            yield host
            host.server.check_integrity()
        finally:
            host.pool.close()
            host.server.close()


def submit(name: str, num_tokens: int = 1) -> bytes:
    return encode_frame(Submit(GenerationRequest(name, [1] * num_tokens, SamplingParams())))


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def read_events(reader: asyncio.StreamReader, limit_s: float = 10.0) -> list[PeerEvent]:
    """All events until the host closes the connection."""
    async with asyncio.timeout(limit_s):
        data = await reader.read(-1)
    decoder: FrameDecoder[PeerEvent] = FrameDecoder(PeerEvent)
    return list(decoder.feed(data))


async def test_a_guests_tokens_come_back_under_its_own_id_one_batch_per_step() -> None:
    async with running() as host:
        assert stat.S_IMODE(os.stat(host.path).st_mode) == 0o600
        first, second = host.send("a"), host.send("b")
        await host.wait(lambda: host.server.num_guests == 2)
        for guest in list(host.engine.streams):
            host.engine._streams[guest].on_output(StepOutput(guest, [5, 6]), 0.0)
        next(iter(host.engine.streams.values())).flush()
        await host.wait(lambda: second.token_ids)
        assert (first.token_ids, second.token_ids) == ([5, 6], [5, 6])
        assert (first.num_flushes, second.num_flushes) == (1, 1)
        host.engine.give(host.guest("a"), StepOutput(host.guest("a"), [7], "length", engine_ns=9))
        await host.wait(lambda: first.finish_reason)
        assert (first.finish_reason, first.engine_ns) == ("length", 9)
        assert host.server.num_guests == 1
        assert host.pool.num_streams == 1


async def test_an_abort_reaches_the_engine_and_its_late_tokens_nobody() -> None:
    async with running() as host:
        stream = host.send("a")
        await host.wait(lambda: host.server.num_guests == 1)
        guest = host.guest("a")
        host.engine.give(guest, StepOutput(guest, [1]))
        host.pool.abort(host.path, "a")
        await host.wait(lambda: host.engine.aborted == [guest])
        assert (host.server.num_guests, stream.token_ids) == (0, [])
        assert not stream.lost


async def test_what_a_host_does_not_take_comes_back() -> None:
    async with running() as host:
        host.refusal = "it is full"
        stream = host.send("a")
        await host.wait(lambda: stream.lost)
        assert stream.lost == ["given back: it is full"]
        host.refusal, host.engine.state = "", "starting"
        stream = host.send("b")
        await host.wait(lambda: stream.lost)
        assert stream.lost == ["given back: the engine is starting"]
        assert host.server.num_guests == 0


async def test_a_host_tries_one_stream_at_a_time_that_may_break_engines_whoever_sent_it() -> None:
    async with running() as host:
        streams = [FakeStream(name) for name in ("a", "b")]
        for stream in streams:
            request = msgspec.structs.replace(stream.request, is_suspect=True)
            host.pool.submit(host.path, request, stream)
        innocent = host.send("c")
        await host.wait(lambda: streams[1].lost)
        assert streams[1].lost == ["given back: another stream that may break engines is tried here"]
        await host.wait(lambda: host.server.num_guests == 2)
        guest = host.guest("a")
        host.engine.give(guest, StepOutput(guest, [1]))
        host.pool.submit(host.path, msgspec.structs.replace(request, request_id="d"), FakeStream("d"))
        await host.wait(lambda: host.server.num_guests == 3)
        assert not innocent.lost


async def test_a_host_that_cannot_be_reached_gives_back_and_one_that_leaves_too() -> None:
    async with running() as host:
        stream = FakeStream("a")
        host.pool.submit(host.path + ".not", stream.request, stream)
        await host.wait(lambda: stream.lost)
        assert stream.lost == ["given back: it cannot be reached"]
        stream = host.send("b")
        await host.wait(lambda: host.server.num_guests == 1)
        host.server.close()
        await host.wait(lambda: stream.lost)
        assert stream.lost == ["given back: this replica is leaving"]
        assert host.engine.streams == {}


async def test_a_hosts_lost_engine_is_told_to_every_guest_once() -> None:
    async with running() as host:
        streams = [host.send(name) for name in "abc"]
        await host.wait(lambda: host.server.num_guests == 3)
        host.engine.die("SIGKILL")
        await host.wait(lambda: all(stream.lost for stream in streams))
        assert [stream.lost for stream in streams] == [["SIGKILL"]] * 3
        assert host.server.num_guests == 0
        host.engine.state = "ready"
        again = host.send("a")
        await host.wait(lambda: host.server.num_guests == 1)
        host.engine.give(host.guest("a"), StepOutput(host.guest("a"), [1], "stop"))
        await host.wait(lambda: again.finish_reason == "stop")


async def test_a_front_that_goes_away_has_its_guests_aborted() -> None:
    async with running() as host:
        other = host.send("other")
        _reader, writer = await host.raw()
        writer.write(submit("a") + submit("b"))
        await host.wait(lambda: host.server.num_guests == 3)
        writer.transport.abort()
        await host.wait(lambda: host.server.num_guests == 1)
        assert len(host.engine.aborted) == 2
        host.engine.give(host.guest("other"), StepOutput(host.guest("other"), [1]))
        await host.wait(lambda: other.token_ids)


@pytest.mark.parametrize(
    "lie",
    [
        b"\xff\xff\xff\xff",
        (peer_server.MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        b"\x00\x00\x00\x05hello",
        encode_frame(Wake()),
        submit("a"),
        encode_frame(StepBatch([], None)),  # type: ignore[arg-type]
    ],
    ids=["huge", "a little too long", "nonsense", "no business of a peer", "twice the same id", "an event"],
)
async def test_a_peer_that_lies_loses_its_own_guests_and_no_others(lie: bytes) -> None:
    async with running() as host:
        other = host.send("a")
        reader, writer = await host.raw()
        writer.write(submit("a"))
        await host.wait(lambda: host.server.num_guests == 2)
        writer.write(lie)
        assert await read_events(reader) == []
        assert host.server.num_guests == 1
        assert not other.lost
        host.engine.give(host.guest("a"), StepOutput(host.guest("a"), [1]))
        await host.wait(lambda: other.token_ids)
        await close(writer)


async def test_unknown_aborts_are_ignored() -> None:
    async with running() as host:
        _reader, writer = await host.raw()
        writer.write(encode_frame(Abort("nobody")) + submit("a") + encode_frame(Abort("b")))
        await host.wait(lambda: host.server.num_guests == 1)
        await close(writer)
        await host.wait(lambda: host.server.num_guests == 0)


async def test_a_peer_that_reads_nothing_is_cut_off_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_server, "MAX_UNSENT_BYTES", 100_000)
    async with running() as host:
        reader, writer = await host.raw()
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(submit("a"))
        await host.wait(lambda: host.server.num_guests == 1)
        guest = host.guest("a")
        num_steps = 0
        while host.engine.streams:
            host.engine.give(guest, StepOutput(guest, list(range(1000))))
            num_steps += 1
            assert num_steps < 1000
        assert host.engine.aborted == [guest]
        assert host.server.num_guests == 0
        writer.transport.abort()
        await asyncio.sleep(0)


async def test_too_many_peers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_server, "MAX_PEERS", 2)
    async with running() as host:
        stream = host.send("a")
        await host.wait(lambda: host.server.num_guests == 1)
        _, second = await host.raw()
        reader, third = await host.raw()
        assert await read_events(reader) == []
        assert not stream.lost
        await close(second)
        await close(third)


async def test_a_host_that_says_nothing_is_lost_and_one_that_idles_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer_link, "SILENCE_LIMIT_S", 0.4)
    monkeypatch.setattr(peer_link, "_CHECK_S", 0.05)
    monkeypatch.setattr(peer_server, "HEARTBEAT_S", 0.1)
    async with running() as host:
        silent_path = host.path + ".silent"

        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(-1)
            writer.close()

        silent = await asyncio.start_unix_server(say_nothing, silent_path)
        stream, patient = FakeStream("a"), host.send("b")
        host.pool.submit(silent_path, stream.request, stream)
        await host.wait(lambda: stream.lost)
        assert stream.lost == ["it said nothing for 0.4 s"]
        assert not patient.lost
        silent.close()
        await asyncio.sleep(0.02)  # its connection sees the end


@pytest.mark.parametrize("nonsense", [b"\xff" * 8, encode_frame(Abort("a"))])
async def test_a_host_that_lies_loses_what_it_hosts(nonsense: bytes) -> None:
    async with running() as host:
        path = host.path + ".liar"

        async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(nonsense)
            await reader.read(-1)
            writer.close()

        liar = await asyncio.start_unix_server(lie, path)
        stream = FakeStream("a")
        host.pool.submit(path, stream.request, stream)
        await host.wait(lambda: stream.lost)
        assert "not of the contract" in stream.lost[0]
        liar.close()
        await asyncio.sleep(0.02)  # its connection sees the end


async def test_a_stream_with_a_bug_ends_alone() -> None:
    async with running() as host:
        broken, other = host.send("a"), host.send("b")
        await host.wait(lambda: host.server.num_guests == 2)
        broken.finish_reason = "makes the fake raise"
        for name in "ab":
            host.engine.give(host.guest(name), StepOutput(host.guest(name), [1]))
        await host.wait(lambda: other.token_ids)
        assert broken.is_broken
        await host.wait(lambda: host.server.num_guests == 1)


async def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_link, "IDLE_LIMIT_S", 0.1)
    monkeypatch.setattr(peer_link, "_CHECK_S", 0.05)
    async with running() as host:
        host.send("a")
        await host.wait(lambda: host.server.num_guests == 1)
        host.pool.abort(host.path, "a")
        await host.wait(lambda: "0 siblings" in repr(host.pool))


def test_a_lost_engine_is_told_as_such() -> None:
    assert EngineFailed("x").retryable


async def test_choices_that_a_router_placed_are_one_request_of_the_host() -> None:
    async with running() as host:
        placed = Placed("hr-g1-7", "chat-1", [11, 12], 600)
        host.send("hr-g1-7#0@1", placed, "acme")
        host.send("hr-g1-7#1@1", Placed("hr-g1-7", "chat-1"), "acme")
        host.send("guest")
        await host.wait(lambda: host.server.num_guests == 3)
        counts = host.server.placed
        assert (counts.num_requests, counts.num_streams) == (1, 2)
        assert (counts.by_gateway(), counts.by_tenant()) == ({"g1": 1}, {"acme": 1})
        assert host.expected == [
            (host.guest("hr-g1-7#0@1"), [11, 12], 600),
            (host.guest("hr-g1-7#1@1"), [], 0),
        ]
        assert all(request.placed is None for request in host.engine.requests.values()), (
            "engines see none of it"
        )
        first = host.guest("hr-g1-7#0@1")
        host.engine.give(first, StepOutput(first, [1], finish_reason="stop"))
        assert (counts.num_requests, counts.num_streams) == (1, 1)
        host.server.check_integrity()
        host.engine.die()
        assert (counts.num_requests, counts.num_streams, host.server.num_guests) == (0, 0, 0)


async def test_a_durable_front_that_goes_takes_its_requests_from_the_hosts_counts() -> None:
    async with running() as host:
        host.send("r@1", Placed("hr-g1-7", "chat-1"))
        await host.wait(lambda: host.server.placed.num_requests == 1)
        host.pool.close()
        await host.wait(lambda: host.server.num_guests == 0)
        assert host.server.placed.num_requests == 0
