"""A real HAProxy, a real router, mock fronts: keys, tenants, what they may use, and keys that change."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tests.integration.gateway_rig import Gateway, HttpAnswer, running_gateway, wait_for

from headrace.api.messages import EndpointRule, TenantRule

pytestmark = pytest.mark.slow

ENDPOINTS = (EndpointRule("chat", "mock", 64, 30.0), EndpointRule("org/big_model", "mock", 64, 30.0))
TENANTS = [TenantRule("acme"), TenantRule("small", endpoints=["chat"])]
ACME, SMALL = "hr-acme-key", "hr-small-key"
EFFECTIVE_S = 1.0
"""Longest time until a change of keys counts."""


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = {hash_of(ACME): "acme", hash_of(SMALL): "small"}


def with_tenants(**settings: Any) -> Any:
    return running_gateway(*ENDPOINTS, **{"tenants": TENANTS, "keys": KEYS, **settings})


async def ask(gateway: Gateway, key: str, model: str = "chat", **mock: Any) -> HttpAnswer:
    return await gateway.chat(model, {"authorization": f"Bearer {key}"}, **mock)


async def get(gateway: Gateway, path: str, key: str) -> HttpAnswer:
    return await gateway.request("GET", path, headers={"authorization": f"Bearer {key}"})


async def wait_for_status(gateway: Gateway, key: str, status: int, limit_s: float = EFFECTIVE_S) -> None:
    """Ask with `key` until the answer is `status`."""
    end_s = asyncio.get_running_loop().time() + limit_s
    while (answer := await get(gateway, "/v1/models", key)).status != status:
        assert asyncio.get_running_loop().time() < end_s, f"after {limit_s} s still {answer.status}"
        await asyncio.sleep(0.01)


def num_workers(gateway: Gateway) -> int:
    return Path(gateway.specs["haproxy"].log_path).read_text().count("New worker")


async def test_a_key_is_a_tenant_and_neither_it_nor_a_claim_reaches_the_front() -> None:
    async with with_tenants() as gateway:
        front = await gateway.add_front("chat-1")
        for headers in (
            {"Authorization": f"Bearer {ACME}", "X-Headrace-Tenant": "small"},
            {"authorization": f"bearer {ACME}"},
            {"x-api-key": ACME},
            {"x-api-key": "hr-unknown", "authorization": f"Bearer {ACME}"},
            {"x-api-key": ACME, "authorization": "Basic bm9ib2R5Om5vdGhpbmc="},
        ):
            assert (await gateway.chat(headers=headers)).status == 200, headers
            seen = front.headers_seen.pop()
            assert seen["x-headrace-tenant"] == "acme"
            assert not {"authorization", "x-api-key"} & set(seen)


async def test_without_a_valid_key_there_is_401_in_openais_shape_and_the_key_is_not_shown() -> None:
    async with with_tenants() as gateway:
        front = await gateway.add_front("chat-1")
        unknown = "hr-very-secret-typo"
        for headers, words in (
            ({}, "No API key"),
            ({"authorization": "Basic bm9ib2R5Om5vdGhpbmc="}, "No API key"),
            ({"authorization": f"Bearer {unknown}"}, "not valid"),
            ({"authorization": f"Bearer {hash_of(ACME)}"}, "not valid"),
            ({"authorization": "Bearer "}, "API key"),
            ({"x-api-key": unknown}, "not valid"),
            ({"authorization": f"Bearer {unknown}", "x-api-key": ACME}, "not valid"),
            ({"x-headrace-tenant": "acme"}, "No API key"),
        ):
            answer = await gateway.chat(headers=headers)
            assert (answer.status, answer.error()["code"]) == (401, "invalid_api_key"), headers
            assert words in answer.error()["message"]
            assert answer.error()["type"] == "invalid_request_error"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert b"secret" not in answer.body
        assert front.headers_seen == []
        for path, status in (("/v1/models", 401), ("/v1/models/chat", 401), ("/nope", 404)):
            assert (await gateway.get(path)).status == status
        for path in ("/health", "/ready", "/version"):
            assert (await gateway.get(path)).status == 200


async def test_what_a_tenant_may_not_use_does_not_exist_for_it() -> None:
    async with with_tenants() as gateway:
        front = await gateway.add_front("chat-1")
        await gateway.add_front("big-1", "org/big_model")
        assert (await ask(gateway, ACME, "org/big_model")).status == 200
        hidden = await ask(gateway, SMALL, "org/big_model")
        unknown = await ask(gateway, SMALL, "org/nix_model")
        assert hidden.status == unknown.status == 404
        assert hidden.body == unknown.body.replace(b"nix", b"big")
        assert hidden.error()["code"] == "model_not_found"

        def listed(answer: HttpAnswer) -> list[str]:
            return [card["id"] for card in json.loads(answer.body)["data"]]

        assert listed(await get(gateway, "/v1/models", ACME)) == ["chat", "org/big_model"]
        assert listed(await get(gateway, "/v1/models", SMALL)) == ["chat"]
        assert (
            json.loads((await get(gateway, "/v1/models/org/big_model", ACME)).body)["id"] == "org/big_model"
        )
        assert (await get(gateway, "/v1/models/org/big_model", SMALL)).status == 404

        async def without_model(key: str) -> HttpAnswer:
            return await gateway.request("POST", "/v1/completions", b"{}", {"authorization": f"Bearer {key}"})

        assert (await without_model(ACME)).error()["code"] == "model_required"
        served = len(front.served)
        assert (await without_model(SMALL)).status == 200, "it has one model: nothing to choose"
        assert len(front.served) == served + 1


async def test_keys_come_and_go_within_a_second_without_a_reload() -> None:
    async with with_tenants() as gateway:
        await gateway.add_front("chat-1")
        new = "hr-new-key"
        assert (await ask(gateway, new)).status == 401
        gateway.send_spec(msgspec.structs.replace(gateway.spec, keys={**KEYS, hash_of(new): "small"}))
        await wait_for_status(gateway, new, 200)
        assert (await ask(gateway, new, "org/big_model")).status == 404
        moved = {**KEYS, hash_of(new): "acme"}
        gateway.send_spec(msgspec.structs.replace(gateway.spec, keys=moved))
        await wait_for(lambda: f"{hash_of(new)} acme" in keys_file(gateway).read_text(), "the file has it")
        await wait_for_list(gateway, new, 2)
        gateway.send_spec(gateway.spec)
        await wait_for_status(gateway, new, 401)
        assert (await ask(gateway, ACME)).status == 200
        assert num_workers(gateway) == 1, "HAProxy was reloaded"


def keys_file(gateway: Gateway) -> Path:
    return Path(gateway.paths.key_map)


async def wait_for_list(gateway: Gateway, key: str, count: int) -> None:
    end_s = asyncio.get_running_loop().time() + EFFECTIVE_S
    while len(json.loads((await get(gateway, "/v1/models", key)).body).get("data", [])) != count:
        assert asyncio.get_running_loop().time() < end_s
        await asyncio.sleep(0.01)


async def test_a_key_revoked_while_it_streams_finishes_that_stream_and_opens_no_other() -> None:
    async with with_tenants() as gateway:
        front = await gateway.add_front("chat-1")
        client = await gateway.connect()
        body = json.dumps({"model": "chat", "mock": {"events": 40, "gap_s": 0.02}}).encode()
        client.send("POST", "/v1/chat/completions", body, {"authorization": f"Bearer {ACME}"})
        await wait_for(lambda: front.open_requests, "the stream runs")
        gateway.send_spec(msgspec.structs.replace(gateway.spec, keys={hash_of(SMALL): "small"}))
        await wait_for_status(gateway, ACME, 401)
        assert front.open_requests, "the stream still runs"
        answer = await client.receive()
        assert answer.is_whole
        assert answer.body.endswith(b"data: 39\n\ndata: [DONE]\n\n")
        client.send("POST", "/v1/chat/completions", body, {"authorization": f"Bearer {ACME}"})
        assert (await client.receive()).status == 401, "the same connection, the next request"


async def test_keys_survive_a_haproxy_and_a_router_that_were_away_when_they_changed() -> None:
    async with with_tenants() as gateway:
        await gateway.add_front("chat-1")
        new = "hr-new-key"
        await gateway.kill("haproxy")
        changed = {hash_of(SMALL): "small", hash_of(new): "acme"}
        gateway.send_spec(msgspec.structs.replace(gateway.spec, keys=changed))
        await wait_for(lambda: hash_of(new) in keys_file(gateway).read_text(), "the file has the new key")
        gateway.start_process("haproxy")
        await gateway.wait_until_haproxy_answers()
        assert [(await get(gateway, "/v1/models", key)).status for key in (new, ACME)] == [200, 401]

        await gateway.kill("router")
        gateway.start_process("router")
        gateway.demand = None
        await wait_for(lambda: gateway.is_serving("chat-1"), "the new router works")
        await wait_for_status(gateway, new, 200)
        await wait_for_status(gateway, ACME, 401)
        assert (await ask(gateway, new)).status == 200


async def test_the_first_tenants_of_a_running_gateway_close_it_and_the_last_open_it() -> None:
    async with running_gateway(*ENDPOINTS) as gateway:
        await gateway.add_front("chat-1")
        assert (await gateway.chat()).status == 200
        gateway.send_spec(msgspec.structs.replace(gateway.spec, tenants=TENANTS, keys=KEYS))
        await wait_for_status(gateway, "hr-unknown", 401, 5.0)
        assert (await ask(gateway, ACME)).status == 200
        workers = num_workers(gateway)
        faster = [msgspec.structs.replace(TENANTS[0], weight=4.0, requests_per_minute=9), TENANTS[1]]
        gateway.send_spec(msgspec.structs.replace(gateway.spec, tenants=faster, keys={}))
        await wait_for_status(gateway, ACME, 401)
        assert num_workers(gateway) == workers, "limits do not need a reload"
        gateway.send_spec(gateway.spec)
        await wait_for_status(gateway, "hr-unknown", 200, 5.0)


async def test_hashes_are_for_the_owner_alone() -> None:
    async with with_tenants() as gateway:
        for path in keys_file(gateway).parent.glob("*.map"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        for process in gateway.processes.values():
            assert hash_of(ACME) not in " ".join(psutil.Process(process.pid).cmdline())


async def test_as_many_keys_as_there_may_be_change_within_seconds() -> None:
    many = {hash_of(str(number)): "acme" for number in range(20_000)}
    async with with_tenants(keys={**KEYS, **many}) as gateway:
        assert (await get(gateway, "/v1/models", "19999")).status == 200
        fewer = dict(list(many.items())[:10_000])
        gateway.send_spec(msgspec.structs.replace(gateway.spec, keys={**KEYS, **fewer}))
        await wait_for_status(gateway, "19999", 401, 5.0)
        gateway.send_spec(msgspec.structs.replace(gateway.spec, keys={**KEYS, **many}))
        await wait_for_status(gateway, "19999", 200, 5.0)


async def test_a_connection_that_outlived_a_reload_is_no_way_around_a_revocation() -> None:
    """The worker from before the reload keeps its streams, and does not hear of later changes of keys."""
    async with with_tenants() as gateway:
        front = await gateway.add_front("chat-1")
        client = await gateway.connect()
        body = json.dumps({"model": "chat", "mock": {"events": 100, "gap_s": 0.05}}).encode()
        client.send("POST", "/v1/chat/completions", body, {"authorization": f"Bearer {ACME}"})
        await wait_for(lambda: front.open_requests, "the stream runs")
        rules = [*ENDPOINTS, EndpointRule("more", "mock", 8, 30.0)]
        gateway.send_spec(msgspec.structs.replace(gateway.spec, endpoints=rules))
        await wait_for(lambda: num_workers(gateway) == 2, "HAProxy was reloaded")
        without_acme = {hash_of(SMALL): "small"}
        gateway.send_spec(msgspec.structs.replace(gateway.spec, endpoints=rules, keys=without_acme))
        await wait_for_status(gateway, ACME, 401, 5.0)
        assert front.open_requests, "the stream still runs"
        assert (await client.receive()).is_whole
        short = json.dumps({"model": "chat", "mock": {"events": 1}}).encode()
        client.send("POST", "/v1/chat/completions", short, {"authorization": f"Bearer {ACME}"})
        status = 0  # closing the connection is an answer, too
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            status = (await asyncio.wait_for(client.receive(), 5)).status
        assert status in (0, 401)
        assert len(front.served) == 1


async def test_a_connection_from_before_there_were_tenants_is_no_way_in_without_a_key() -> None:
    async with running_gateway(*ENDPOINTS) as gateway:
        front = await gateway.add_front("chat-1")
        client = await gateway.connect()
        running = json.dumps({"model": "chat", "mock": {"events": 40, "gap_s": 0.05}}).encode()
        client.send("POST", "/v1/chat/completions", running)
        await wait_for(lambda: front.open_requests, "the stream runs")
        spec = msgspec.structs.replace(gateway.spec, tenants=TENANTS, keys=KEYS)
        gateway.send_spec(spec)
        await wait_for(lambda: num_workers(gateway) == 2, "HAProxy was reloaded")
        assert (await client.receive()).is_whole
        short = json.dumps({"model": "chat", "mock": {"events": 1}}).encode()
        client.send("POST", "/v1/chat/completions", short)
        status = 0  # closing the connection is an answer, too
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            status = (await asyncio.wait_for(client.receive(), 5)).status
        assert status in (0, 401, 503)
        assert len(front.served) == 1
        assert (await ask(gateway, ACME)).status == 200
