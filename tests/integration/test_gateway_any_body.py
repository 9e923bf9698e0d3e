"""A real HAProxy, router and relay, mock fronts, two endpoints: bodies whose model lies beyond the head."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway_rig import Client, Gateway, HttpAnswer, running_gateway, wait_for

from headrace.api.messages import EndpointRule, TenantRule

pytestmark = pytest.mark.slow
TWO_ENDPOINTS = (EndpointRule("chat", "mock", 1024, 30.0), EndpointRule("other", "mock", 8, 5.0))
MB = 1_000_000


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway(*TWO_ENDPOINTS) as gateway:
        yield gateway


def sdk_body(size: int, model: Any = "chat", **mock: Any) -> bytes:
    """A body in the order of OpenAI's Python SDK: `messages` first."""
    text = "The quick brown fox jumps over the lazy dog. " * (size // 45 + 1)
    tree = {"messages": [{"role": "user", "content": text}], "mock": mock, "model": model}
    return json.dumps(tree).encode()


async def ask(gateway: Gateway, body: bytes, headers: dict[str, str] | None = None) -> HttpAnswer:
    return await gateway.request("POST", "/v1/chat/completions", body, headers)


def chunked(body: bytes, size: int = 65_536) -> bytes:
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


async def start_chunked(gateway: Gateway, body: bytes) -> Client:
    client = await gateway.connect()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n"
    client.writer.write(head + chunked(body))
    return client


async def test_a_long_prompt_in_the_sdks_order_is_served_and_counted_once(gateway: Gateway) -> None:
    front, other = await gateway.add_front("chat-1"), await gateway.add_front("other-1", "other")
    body = sdk_body(MB)
    headers = {"x-request-id": "mine", "x-session-id": "s1", "x-headrace-tenant": "rich"}
    answer = await ask(gateway, body, headers)
    assert (answer.status, answer.is_whole, answer.body[-14:]) == (200, True, b"data: [DONE]\n\n")
    assert answer.headers["x-request-id"] == "mine"
    assert front.body_hashes == [hashlib.sha256(body).digest()]
    seen = front.headers_seen[0]
    assert seen["x-session-id"] == "s1"
    assert seen["x-headrace-request-id"].startswith("hr-")
    assert {name for name in seen if name.startswith("x-headrace-")} == {"x-headrace-request-id"}

    body = sdk_body(20 * MB, "other")
    assert (await ask(gateway, body)).headers["x-replica"] == "other-1"
    assert other.body_hashes == [hashlib.sha256(body).digest()]
    await wait_for(lambda: gateway.endpoint("other").finished == 1, "both are counted")
    await wait_for(lambda: gateway.endpoint().finished == 1, "both are counted")
    for demand in (gateway.endpoint(), gateway.endpoint("other")):
        assert (demand.arrived, demand.num_in_flight, demand.num_held) == (1, 0, 0)


async def test_a_tenant_keeps_its_identity_and_its_endpoints_on_the_way() -> None:
    keys = {hashlib.sha256(name.encode()).hexdigest(): name for name in ("acme", "tiny")}
    tenants = [TenantRule("acme"), TenantRule("tiny", endpoints=["chat"])]
    async with running_gateway(*TWO_ENDPOINTS, tenants=tenants, keys=keys) as gateway:
        chat, other = await gateway.add_front("chat-1"), await gateway.add_front("other-1", "other")
        acme, tiny = ({"authorization": f"Bearer {name}"} for name in ("acme", "tiny"))
        assert (await ask(gateway, sdk_body(MB))).status == 401
        assert (await ask(gateway, sdk_body(MB, "other"), acme)).status == 200
        assert other.headers_seen[0]["x-headrace-tenant"] == "acme"
        assert "authorization" not in other.headers_seen[0]
        assert (await ask(gateway, sdk_body(MB, "nope"), acme)).status == 404
        # The tenant with one endpoint needs no relay: that endpoint's front reads the model.
        assert (await ask(gateway, sdk_body(MB), {**tiny, "x-headrace-tenant": "acme"})).status == 200
        assert chat.headers_seen[0]["x-headrace-tenant"] == "tiny"


async def test_a_chunked_body_needs_no_length(gateway: Gateway) -> None:
    front = await gateway.add_front("chat-1")
    body = sdk_body(3 * MB)
    client = await start_chunked(gateway, body)
    assert (await client.receive()).status == 200
    assert front.body_hashes == [hashlib.sha256(body).digest()]
    assert front.headers_seen[0]["content-length"] == str(len(body))


async def test_a_body_beyond_the_limit_gets_413_with_and_without_a_length(gateway: Gateway) -> None:
    front = await gateway.add_front("chat-1")
    body = sdk_body(40 * MB)
    answer = await ask(gateway, body)
    assert (answer.status, answer.error()["code"]) == (413, "payload_too_large")
    client = await start_chunked(gateway, body)
    async with asyncio.timeout(10):
        answer = await client.receive()
    assert (answer.status, answer.error()["code"]) == (413, "payload_too_large")
    assert front.served == []
    assert (await ask(gateway, sdk_body(MB))).status == 200


def request_records(gateway: Gateway) -> list[dict[str, Any]]:
    path = Path(gateway.paths.request_log)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


WRONG = [
    (b'{"messages": "' + b"x" * 200_000 + b'"}', 400, "model_required"),
    (sdk_body(200_000, 7), 400, "model_required"),
    (sdk_body(200_000, None), 400, "model_required"),
    (b"[" + b"1," * 100_000 + b"1]", 400, "model_required"),
    (b"x" * 200_000, 400, "invalid_json"),
    (sdk_body(200_000)[:-1], 400, "invalid_json"),
    (b'{"messages":' + b"[" * 200_000, 400, "invalid_json"),
    (sdk_body(200_000, "nope"), 404, "model_not_found"),
    (sdk_body(200_000, "a\r\nx-headrace-tenant: rich\r\n"), 404, "model_not_found"),
    (sdk_body(200_000, "é模\U0001f600%41\x00"), 404, "model_not_found"),
    (sdk_body(200_000, "chat" * 10_000), 404, "model_not_found"),
    (sdk_body(200_000, ""), 404, "model_not_found"),
]


async def test_a_long_body_without_a_good_model_is_refused_in_openais_shape(gateway: Gateway) -> None:
    front = await gateway.add_front("chat-1")
    request_ids = []
    for body, status, code in WRONG:
        answer = await ask(gateway, body)
        assert (answer.status, answer.error()["code"]) == (status, code), (body[:30], body[-60:], answer.body)
        request_ids.append(answer.headers["x-request-id"])
    answer = await ask(gateway, b'{"messages": []}', {"x-headrace-model": "chat"})
    assert (answer.status, answer.error()["code"]) == (400, "model_required")
    assert front.served == []
    assert (await ask(gateway, sdk_body(200_000))).status == 200
    request_ids.append(front.served[0])

    def has_a_line_each() -> bool:
        counts = Counter(record["id"] for record in request_records(gateway))
        assert max(counts.values(), default=0) <= 1, "one request is one line, whatever way it took"
        return set(request_ids) <= counts.keys()

    await wait_for(has_a_line_each, "the request log has them all")


async def test_an_adapter_is_reached_by_its_name_wherever_that_is_in_the_body() -> None:
    chat = EndpointRule("chat", "mock", 64, 30.0, adapters=["poet"])
    async with running_gateway(chat, TWO_ENDPOINTS[1]) as gateway:
        await gateway.add_front("chat-1")
        for size in (10, MB):
            answer = await ask(gateway, sdk_body(size, "poet"))
            assert (answer.status, answer.headers["x-replica"]) == (200, "chat-1")
            missing = await ask(gateway, sdk_body(size, "painter"))
            assert missing.status == 404
            assert "Known models: chat, poet, other." in missing.error()["message"]
        listed = await gateway.request("GET", "/v1/models")
        assert [card["id"] for card in json.loads(listed.body)["data"]] == ["chat", "poet", "other"]
        assert (await ask(gateway, sdk_body(10))).status == 200
        await wait_for(lambda: gateway.endpoint().finished == 3, "all are the endpoint's")
        asked = [("", ""), ("", ""), ("chat", "chat"), ("chat", "poet"), ("chat", "poet")]

        def are_told() -> bool:
            records = request_records(gateway)
            told = [(r["endpoint"], r["model"]) for r in records if r["path"] != "/v1/models"]
            return sorted(told) == asked

        await wait_for(are_told, "the request log tells which was asked for")


async def test_an_answer_through_the_relay_comes_as_it_is_made(gateway: Gateway) -> None:
    await gateway.add_front("chat-1")
    client = await gateway.connect()
    client.send("POST", "/v1/chat/completions", sdk_body(MB, events=5, gap_s=0.1))
    assert (await client.receive_head()).status == 200
    clock = asyncio.get_running_loop().time
    arrivals = []
    for number in range(5):
        await client.reader.readuntil(b"data: %d" % number)
        arrivals.append(clock())
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert min(gaps) > 0.05, f"events arrive together: {gaps}"


async def test_a_client_that_leaves_is_noticed_while_held_and_while_streaming(gateway: Gateway) -> None:
    client = await gateway.connect()
    client.send("POST", "/v1/chat/completions", sdk_body(MB))
    await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == 1, "it is held")
    client.close()
    await wait_for(lambda: gateway.endpoint().num_held == 0, "its leaving is noticed", 3.0)
    await wait_for(lambda: gateway.endpoint().aborted == 1, "counted as aborted")

    front = await gateway.add_front("chat-1")
    client = await gateway.connect()
    client.send("POST", "/v1/chat/completions", sdk_body(MB, events=1000, gap_s=0.02))
    await client.reader.readuntil(b"data: 2")
    client.close()
    await wait_for(lambda: not front.open_requests, "the front's stream ends", 3.0)
    await wait_for(lambda: gateway.endpoint().aborted == 2, "counted as aborted")
    demand = gateway.endpoint()
    assert demand.arrived == 2
    assert demand.num_in_flight == 0


async def test_a_full_queue_refuses_through_the_relay_while_the_body_is_on_its_way() -> None:
    async with running_gateway(EndpointRule("chat", "mock", 0, 30.0), TWO_ENDPOINTS[1]) as gateway:
        answer = await ask(gateway, sdk_body(20 * MB))
        assert (answer.status, answer.error()["code"]) == (503, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        await wait_for(lambda: gateway.endpoint().refused == 1, "counted once")
        assert gateway.endpoint().arrived == 1


async def test_a_stream_whose_replica_dies_is_visibly_cut(gateway: Gateway) -> None:
    front = await gateway.add_front("chat-1")
    task = asyncio.create_task(ask(gateway, sdk_body(MB, events=100, gap_s=0.02)))
    await wait_for(lambda: front.open_requests, "the stream runs")
    await asyncio.sleep(0.1)
    await front.kill()
    answer = await task
    assert not answer.is_whole
    assert b"[DONE]" not in answer.body
    await wait_for(lambda: gateway.endpoint().failed == 1, "counted as failed")


async def served_again(gateway: Gateway) -> None:
    """Wait until a relayed request is served; until then each must get 503."""
    end_s = asyncio.get_running_loop().time() + 10
    while (answer := await ask(gateway, sdk_body(MB))).status != 200:
        assert answer.status == 503
        assert asyncio.get_running_loop().time() < end_s, "the relay is not used again"
        await asyncio.sleep(0.05)


async def test_a_killed_relay_costs_its_own_requests_alone(gateway: Gateway) -> None:
    front = await gateway.add_front("chat-1")
    client = await gateway.connect()
    client.send("POST", "/v1/chat/completions", sdk_body(MB, events=1000, gap_s=0.02))
    first = await client.reader.readuntil(b"data: ")
    assert first.startswith(b"HTTP/1.1 200"), "the stream has begun"
    direct = asyncio.create_task(gateway.chat(events=20, gap_s=0.02))
    await wait_for(lambda: len(front.open_requests) == 2, "both streams run")
    await gateway.kill("relay")
    async with asyncio.timeout(10):
        rest = await client.reader.read()
    assert not rest.endswith(b"\r\n0\r\n\r\n"), "a stream that was cut is visibly cut"
    await wait_for(lambda: len(front.open_requests) <= 1, "the front is told")
    answer = await ask(gateway, sdk_body(MB))
    assert (answer.status, answer.error()["type"]) == (503, "server_error")
    assert int(answer.headers["retry-after"]) >= 1
    gateway.start_process("relay")
    await served_again(gateway)
    assert (await direct).is_whole


async def test_a_stopped_relay_is_noticed_within_seconds(gateway: Gateway) -> None:
    await gateway.add_front("chat-1")
    gateway.signal("relay", signal.SIGSTOP)
    try:
        answer, direct = await asyncio.gather(ask(gateway, sdk_body(MB)), gateway.chat())
        assert answer.status in (502, 503)
        assert answer.error()["type"] == "server_error"
        assert direct.status == 200
        assert (await ask(gateway, sdk_body(MB))).status == 503
    finally:
        gateway.signal("relay", signal.SIGCONT)
    await served_again(gateway)
