"""HTTP/1.1 parsing of front and relay under any bytes in any pieces: no exception gets out, the connection
ends or answers, and every byte that was reserved is given back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import strategies as st
from tests.fuzz.fuzzing import CUTS, fuzz, mutations, pieces
from tests.unit.replica.test_http_connection import MESSAGES, MemoryTransport, Wire, post

from headrace.api.messages import RelaySpec
from headrace.clock import VirtualClock
from headrace.replica.relay import Relay
from headrace.replica.relay_connection import RelayConnection

pytestmark = pytest.mark.slow
VALID = st.sampled_from(
    [
        *MESSAGES,
        b"GET /wait HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n",
        b"POST /x HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\nab",
        b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"POST /x HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\na: b\r\n\r\n",
        post(b"/v1/completions", b'{"model":"chat"}', b"x-request-id: a\r\n"),
        post(b"/v1/completions", b'{"prompt":"' + b"y" * 700 + b'","model":"chat"}'),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
)
STREAMS = st.lists(st.one_of(VALID, mutations(VALID), st.binary(max_size=60)), max_size=6).map(b"".join)


def test_a_front_survives_any_bytes_in_any_pieces() -> None:
    def target(data: bytes, cuts: list[int], answers_late: bool, leaves_early: bool) -> None:
        wire = Wire(max_body_bytes=600, max_head_bytes=500, max_receiving_bytes=900, max_queued=2)
        for piece in pieces(data, cuts):
            wire.send(piece)
            assert 0 <= wire.owner.num_receiving <= 900
            if answers_late and wire.owner.waiting:
                wire.owner.waiting.pop(0).send(200, b"late")
        if leaves_early:
            wire.connection.connection_lost(None)
        for responder in wire.owner.waiting:
            responder.send(200, b"at last")
        if not leaves_early:
            for seconds in (1000.0, 1000.0, 1000.0):  # head, body, keep-alive, linger
                wire.pass_time(seconds)
            transport = wire.transport
            assert transport.is_closed or transport.is_aborted, "no connection is open for ever"
            wire.connection.connection_lost(None)
        assert wire.owner.num_receiving == 0
        assert wire.owner.num_left == 1

    fuzz(target, STREAMS, CUTS, st.booleans(), st.booleans())


def test_a_relay_survives_any_bytes_in_any_pieces(tmp_path: Path) -> None:
    spec = RelaySpec(str(tmp_path / "r"), str(tmp_path / "nobody"), max_body_bytes=600, max_total_bytes=900)
    loop = asyncio.new_event_loop()

    async def feed(data: bytes, cuts: list[int]) -> None:
        clock = VirtualClock(100.0)
        relay = Relay(spec, clock)
        connection, transport = RelayConnection(relay), MemoryTransport()
        connection.connection_made(transport)
        for piece in pieces(data, cuts):
            connection.data_received(piece)
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
            clock.advance(1000.0)
            connection.check_time_limits(clock.now_s())
        assert transport.is_closed or transport.is_aborted, "no connection is open for ever"
        connection.connection_lost(None)
        await asyncio.sleep(0)
        assert repr(relay) == "<Relay 0 requests, 0 bytes>"

    def target(data: bytes, cuts: list[int]) -> None:
        loop.run_until_complete(feed(data, cuts))

    try:
        fuzz(target, STREAMS, CUTS)
    finally:
        loop.close()
