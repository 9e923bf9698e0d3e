"""A real HAProxy, a real router, mock fronts: relaying, and answers that need no replica."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat

import pytest
from tests.integration.gateway_rig import running_gateway, wait_for

from headrace.api.messages import EndpointRule
from headrace.errors import ConfigError
from headrace.gateway.process import prepare

pytestmark = pytest.mark.slow

TWO_ENDPOINTS = (
    EndpointRule("chat", "mock", 1024, 30.0),
    EndpointRule("org/other_model:v1.0-x", "mock", 8, 5.0),
)
LARGE = 1_000_000


async def test_a_stream_is_relayed_whole_with_the_ids_that_belong_to_it() -> None:
    async with running_gateway() as gateway:
        front = await gateway.add_front("chat-1")
        answer = await gateway.chat(events=3, gap_s=0.01)
        assert answer.status == 200
        assert answer.body == b"data: 0\n\ndata: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
        assert answer.headers["x-replica"] == "chat-1"
        assert answer.headers["x-request-id"] == front.headers_seen[0]["x-headrace-request-id"]

        forged = {"x-headrace-request-id": "forged", "X-Headrace-Tenant": "rich", "x-request-id": "mine-42"}
        answer = await gateway.chat(headers=forged)
        seen = front.headers_seen[1]
        assert answer.headers["x-request-id"] == "mine-42"
        assert seen["x-request-id"] == "mine-42"
        assert seen["x-headrace-request-id"] not in ("forged", front.headers_seen[0]["x-headrace-request-id"])
        assert "x-headrace-tenant" not in seen

        await gateway.chat(headers={"x-request-id": "x" * 129})
        await gateway.chat(headers={"x-request-id": 'a"b'})
        assert "x-request-id" not in front.headers_seen[2]
        assert "x-request-id" not in front.headers_seen[3]
        await wait_for(lambda: gateway.endpoint().finished == 4, "all four are counted as finished")


async def test_the_first_event_arrives_before_the_last_is_made() -> None:
    async with running_gateway() as gateway:
        await gateway.add_front("chat-1")
        client = await gateway.connect()
        body = {"model": "chat", "mock": {"events": 2, "gap_s": 0.3}}
        client.send("POST", "/v1/chat/completions", json.dumps(body).encode())
        assert (await client.receive_head()).status == 200
        started_s = asyncio.get_running_loop().time()
        await client.reader.readuntil(b"data: 0")
        assert asyncio.get_running_loop().time() - started_s < 0.55, "the relay buffers events"
        await client.reader.readuntil(b"[DONE]")
        client.close()


async def test_requests_without_a_replica_get_openai_shaped_answers() -> None:
    async with running_gateway(*TWO_ENDPOINTS, max_body_bytes=LARGE) as gateway:
        models = json.loads((await gateway.get("/v1/models")).body)
        assert [model["id"] for model in models["data"]] == ["chat", "org/other_model:v1.0-x"]
        for path in ("/v1/models/org/other_model:v1.0-x", "/v1/models/org%2Fother_model:v1.0-x"):
            assert json.loads((await gateway.get(path)).body)["id"] == "org/other_model:v1.0-x"
        assert (await gateway.get("/health")).status == 200
        assert "version" in json.loads((await gateway.get("/version")).body)
        wrong = {
            ("GET", "/v1/models/nope", b""): (404, "model_not_found", "nope"),
            ("GET", "/v1/chat/completions", b""): (405, "method_not_allowed", "POST"),
            ("POST", "/v1/models", b""): (405, "method_not_allowed", "GET"),
            ("POST", "/v1/embeddings", b"{}"): (404, "not_found", "/v1/chat/completions"),
            ("POST", "/v1/completions", b'{"model":"gpt-4"}'): (
                404,
                "model_not_found",
                "org/other_model:v1.0-x",
            ),
            ("POST", "/v1/completions", b'{"model":"a\\"b\\nc%d"}'): (404, "model_not_found", 'a"b\nc%d'),
            ("POST", "/v1/completions", b'{"model":7}'): (404, "model_not_found", "7"),
            ("POST", "/v1/completions", b"{}"): (400, "model_required", "model"),
            ("POST", "/v1/completions", b"not json"): (400, "model_required", "model"),
            ("POST", "/v1/completions", b"x" * (LARGE + 1)): (413, "payload_too_large", str(LARGE)),
        }
        for (method, path, body), (status, code, text) in wrong.items():
            answer = await gateway.request(method, path, body)
            assert (answer.status, answer.error()["code"]) == (status, code), (path, answer.body)
            assert text in answer.error()["message"]
            assert answer.headers["content-type"] == "application/json"
        answer = await gateway.request("GET", "/health", headers={"x-long": "y" * 40_000})
        assert (answer.status, answer.error()["code"]) == (413, "payload_too_large")
        answer = await gateway.request("GET", "/health", headers={"x-long": "y" * 400_000})
        assert answer.status == 400  # beyond HAProxy's buffer: it speaks for itself


async def test_the_model_of_a_long_body_is_found_in_its_head_and_beyond_it() -> None:
    long = "x" * 300_000
    async with running_gateway(*TWO_ENDPOINTS) as gateway:
        front = await gateway.add_front("chat-1")
        body = json.dumps({"messages": "y" * 60_000, "model": "chat", "more": long}).encode()
        assert (await gateway.request("POST", "/v1/completions", body)).status == 200
        body = json.dumps({"messages": long, "model": "chat"}).encode()
        assert (await gateway.request("POST", "/v1/completions", body)).status == 200
        assert len(front.served) == 2
    async with running_gateway() as gateway:  # one endpoint: nothing to choose
        await gateway.add_front("chat-1")
        body = json.dumps({"messages": long, "model": "chat"}).encode()
        assert (await gateway.request("POST", "/v1/completions", body)).status == 200


async def test_a_client_that_sends_half_a_body_or_nonsense_harms_nobody() -> None:
    async with running_gateway() as gateway:
        await gateway.add_front("chat-1")
        client = await gateway.connect()
        client.writer.write(
            b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"model":'
        )
        broken = await gateway.connect()
        broken.writer.write(b"\x00\x01\x02 nonsense\r\n\r\n")
        assert (await broken.receive()).status == 400
        assert (await gateway.chat()).status == 200
        client.close()
        broken.close()
        await wait_for(lambda: gateway.endpoint().finished == 1, "the good one finished")


async def test_requests_spread_over_replicas_and_keep_to_their_endpoint() -> None:
    async with running_gateway(*TWO_ENDPOINTS) as gateway:
        for number in range(4):
            await gateway.add_front(f"chat-{number}")
        other = await gateway.add_front("org/other_model:v1.0-x-1", "org/other_model:v1.0-x")
        answers = await asyncio.gather(*(gateway.chat(gap_s=0.2) for _ in range(40)))
        assert {answer.status for answer in answers} == {200}
        assert [len(front.served) for front in gateway.fronts[:4]] == [10] * 4
        assert (await gateway.chat("org/other_model:v1.0-x")).headers["x-replica"] == other.replica_id


async def test_sockets_and_files_are_for_their_owner_only() -> None:
    async with running_gateway() as gateway:
        for entry in os.scandir(gateway.run_dir):
            if not entry.is_dir() and entry.name != "controller.sock":  # that one is the test's own
                assert stat.S_IMODE(entry.stat().st_mode) == 0o600, entry.name


async def test_a_port_in_use_is_said_with_its_owner_and_what_to_do() -> None:
    async with running_gateway() as gateway:
        with pytest.raises(
            ConfigError, match=r"127\.0\.0\.1:\d+ is in use by .*another: --set gateway\.bind="
        ):
            prepare(gateway.spec)


async def test_metrics_of_router_and_haproxy_come_from_one_port() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with running_gateway(metrics_bind=f"127.0.0.1:{port}") as gateway:
        await gateway.add_front("chat-1")
        await gateway.chat()
        await wait_for(lambda: gateway.endpoint().finished == 1, "it is counted")
        gateway.port = port
        text = (await gateway.get("/metrics")).body.decode()
        assert 'headrace_router_ended_requests_total{endpoint="chat",state="finished"} 1.0' in text
        assert 'headrace_router_replica_serving{replica="chat-1"} 1.0' in text
        assert b"haproxy_process_current_connections" in (await gateway.get("/metrics/haproxy")).body
        assert (await gateway.get("/other")).status == 404


async def test_the_reasons_of_a_placement_come_back_to_who_asks() -> None:
    async with running_gateway() as gateway:
        for number in (1, 2):
            await gateway.add_front(f"chat-{number}")
        assert "x-headrace-route" not in (await gateway.chat()).headers
        answer = await gateway.chat(headers={"x-headrace-route": "1"})
        line = answer.headers["x-headrace-route"]
        fields = dict(part.split("=", 1) for part in line.split("; "))
        assert fields["replica"] == answer.headers["x-replica"]
        assert fields["reason"] in ("least_loaded", "spread")
        assert fields["alternatives"].startswith("chat-")
        assert not any("x-headrace-route" in seen for front in gateway.fronts for seen in front.headers_seen)


async def test_requests_of_one_prompt_or_session_go_to_one_replica() -> None:
    async with running_gateway() as gateway:
        for number in range(4):
            await gateway.add_front(f"chat-{number}")
        text = "the same long beginning " * 40
        body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": text}]}).encode()
        replicas, reasons = set(), []
        for _ in range(6):
            answer = await gateway.request("POST", "/v1/chat/completions", body, {"x-headrace-route": "1"})
            replicas.add(answer.headers["x-replica"])
            reasons.append(answer.headers["x-headrace-route"].split("; ")[1])
        assert len(replicas) == 1
        assert reasons == ["reason=least_loaded"] + ["reason=prefix"] * 5
        by_session = {
            (await gateway.chat(headers={"x-session-id": session})).headers["x-replica"]
            for session in ["joe"] * 6
        }
        assert len(by_session) == 1
