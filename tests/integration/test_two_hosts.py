"""A replica on another host than its gateway: reports through a tunnel, requests over mutual TLS."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import hashlib
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.integration.front_process import RunningFront, running_front
from tests.integration.gateway_rig import Gateway, HttpAnswer, running_gateway, wait_for

from headrace.api.messages import EndpointRule, TenantRule
from headrace.cluster_tls import client_context
from headrace.fabric.cluster_identity import make_secret, write_identity
from headrace.fabric.tunnel import TunnelHost

pytestmark = pytest.mark.slow
SEVERAL_CHECKS_S = 3.0
"""HAProxy looks at each server once a second; one that misses two checks gets nothing."""
CHAT = json.dumps(
    {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
).encode()
STREAM = json.dumps({**json.loads(CHAT), "stream": True}).encode()
ENDPOINT = EndpointRule("chat", "simulated", 64, 30.0)


@dataclass
class TwoHosts:
    gateway: Gateway
    front: RunningFront
    tunnel: TunnelHost
    """Of the gateway's host."""
    identity: Path


@contextlib.asynccontextmanager
async def two_hosts(directory: Path, **gateway_settings: object) -> AsyncIterator[TwoHosts]:
    """The gateway's run directory and the front's are two; what joins them is the cluster's secret."""
    identity = directory / "cluster.pem"
    write_identity(make_secret(), identity)
    ours, theirs = TunnelHost(identity), TunnelHost(identity)
    router_here = str(directory / "router-g1.sock")
    try:
        async with running_gateway(ENDPOINT, identity=str(identity), **gateway_settings) as gateway:
            address = await ours.start("127.0.0.1")
            ours.offer("g1/router", gateway.paths.router_socket)
            await theirs.reach("g1/router", router_here, address)
            with running_front(
                extra_sockets=[router_here],
                identity=str(identity),
                needs_gateway=bool(gateway_settings),
            ) as front:
                await wait_for(lambda: gateway.is_serving("chat-1"), "the replica serves")
                yield TwoHosts(gateway, front, ours, identity)
    finally:
        await theirs.close()
        await ours.close()


async def chat(hosts: TwoHosts, body: bytes = CHAT, **headers: str) -> HttpAnswer:
    return await hosts.gateway.request("POST", "/v1/chat/completions", body, headers)


async def ask_directly(front: RunningFront, context: ssl.SSLContext | None) -> bytes:
    """Return the start of what the front's TCP address answers; empty: the connection was refused."""
    host, _, port = front.address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        data = await reader.read(64)
        writer.transport.abort()
        return data
    except OSError:
        return b""


@pytest.mark.parametrize("protocol", ["h2", "http1"])
async def test_a_replica_of_another_host_serves_over_tls_and_passes_haproxys_checks(
    tmp_path: Path, protocol: str
) -> None:
    async with two_hosts(tmp_path, replica_protocol=protocol) as hosts:
        gateway = hosts.gateway
        num_asked, end_s = 0, asyncio.get_running_loop().time() + SEVERAL_CHECKS_S
        while asyncio.get_running_loop().time() < end_s:
            answer = await chat(hosts, body=STREAM if num_asked % 2 else CHAT)  # short streams go over HTTP/2
            assert answer.status == 200, answer.body
            assert answer.headers["x-headrace-replica"] == "chat-1"
            num_asked += 1
            await asyncio.sleep(0.1)
        await wait_for(lambda: gateway.endpoint().finished == num_asked, "the router heard of their ends")


async def test_short_streams_reach_another_host_on_http2_and_its_checks_pass(tmp_path: Path) -> None:
    stream = json.dumps({**json.loads(CHAT), "stream": True}).encode()
    async with two_hosts(tmp_path, replica_protocol="h2") as hosts:
        for _ in range(3):
            answer = await hosts.gateway.request("POST", "/v1/chat/completions", stream, {})
            assert answer.status == 200
        await asyncio.sleep(SEVERAL_CHECKS_S)
        server = await server_stats(hosts.gateway, "ep-chat_h2", "chat-1")
        assert (server["stot"], server["status"], server["check_status"]) == ("3", "UP", "L7OK"), server


async def server_stats(gateway: Gateway, backend: str, server: str) -> dict[str, str]:
    """What HAProxy says of one of its servers."""
    reader, writer = await asyncio.open_unix_connection(gateway.paths.runtime_socket)
    writer.write(b"show stat\n")
    rows = csv.DictReader((await reader.read()).decode().removeprefix("# ").splitlines())
    writer.close()
    return next(row for row in rows if (row["pxname"], row["svname"]) == (backend, server))


async def test_only_who_has_the_clusters_key_gets_through_to_a_front(tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    write_identity(make_secret(), other)
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    async with two_hosts(tmp_path) as hosts:
        assert (await ask_directly(hosts.front, client_context(hosts.identity))).startswith(b"HTTP/1.1 200")
        assert not (await ask_directly(hosts.front, None)).startswith(b"HTTP")
        assert await ask_directly(hosts.front, client_context(other)) == b""
        assert await ask_directly(hosts.front, stranger) == b""
        assert (await chat(hosts)).status == 200


async def test_tenants_are_believed_across_hosts(tmp_path: Path) -> None:
    key = "hr-key"
    hashed = hashlib.sha256(key.encode()).hexdigest()
    async with two_hosts(tmp_path, tenants=[TenantRule("acme")], keys={hashed: "acme"}) as hosts:
        answer = await chat(hosts, authorization=f"Bearer {key}")
        assert answer.status == 200, answer.body
        request_id = answer.headers["x-request-id"]
        assert hosts.front.router.wait_finished(request_id).tenant == "acme"


async def test_haproxy_that_is_started_again_reaches_the_other_host_from_its_config(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        gateway = hosts.gateway
        await wait_for(
            lambda: f"ssl crt {hosts.identity}" in Path(gateway.paths.config).read_text(),
            "written to its config",
        )
        await gateway.kill("haproxy")
        gateway.start_process("haproxy")
        await gateway.wait_until_haproxy_answers()
        assert (await chat(hosts)).status == 200


async def test_requests_wait_while_a_tunnel_is_cut_and_none_is_lost(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        hosts.tunnel.forget("g1/router")
        await wait_for(lambda: not hosts.gateway.is_serving("chat-1"), "the router misses its reports")
        answers = asyncio.gather(*(chat(hosts) for _ in range(8)))
        await wait_for(lambda: hosts.gateway.endpoint().num_held == 8, "they are held")
        hosts.tunnel.offer("g1/router", hosts.gateway.paths.router_socket)
        assert [answer.status for answer in await answers] == [200] * 8
