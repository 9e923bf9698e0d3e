"""A real HAProxy, router and mock fronts behind TLS: HTTP/2, old protocols, and a changing certificate."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from tests.integration.gateway_rig import Gateway, running_gateway, wait_for

from headrace.gateway import certificate_keeper

pytestmark = pytest.mark.slow
AUTHORITY = trustme.CA()
QUESTION = {"model": "chat", "messages": [], "mock": {"events": 3}}


def write_pair(directory: Path) -> None:
    pair = AUTHORITY.issue_cert("localhost", "127.0.0.1")
    (directory / "c.pem").write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    (directory / "k.pem").write_bytes(pair.private_key_pem.bytes())


def context(**settings: Any) -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    for name, value in settings.items():
        setattr(context, name, value)
    return context


class TlsGateway:
    def __init__(self, gateway: Gateway, directory: Path) -> None:
        self.gateway, self.directory = gateway, directory
        self.url = f"https://localhost:{gateway.port}"

    def serial(self) -> str:
        """The serial number of the certificate that a new connection gets."""
        address = "127.0.0.1", self.gateway.port
        with (
            socket.create_connection(address, timeout=5) as raw,
            context().wrap_socket(raw, server_hostname="localhost") as secure,
        ):
            certificate = secure.getpeercert()
            assert certificate is not None
            return str(certificate["serialNumber"])

    async def problem(self) -> str:
        return self.gateway.demand.certificate_problem if self.gateway.demand else ""


@pytest.fixture
async def tls(tmp_path: Path) -> AsyncIterator[TlsGateway]:
    write_pair(tmp_path)
    pair = {"certificate": str(tmp_path / "c.pem"), "certificate_key": str(tmp_path / "k.pem")}
    async with running_gateway(**pair) as gateway:
        await gateway.add_front("chat-1")
        yield TlsGateway(gateway, tmp_path)


async def test_http_1_and_2_are_spoken_and_plain_text_and_old_tls_are_not(tls: TlsGateway) -> None:
    for speaks_http2, version in ((False, "HTTP/1.1"), (True, "HTTP/2")):
        async with httpx.AsyncClient(verify=context(), http2=speaks_http2) as client:
            answers = await asyncio.gather(
                *(client.post(f"{tls.url}/v1/chat/completions", json=QUESTION) for _ in range(8))
            )
            for answer in answers:
                assert (answer.status_code, answer.http_version) == (200, version)
                assert answer.text.endswith("data: [DONE]\n\n")
            refused = await client.post(f"{tls.url}/v1/chat/completions", json={"model": "nope"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    async with httpx.AsyncClient(verify=False) as client:
        with pytest.raises(httpx.HTTPError):
            await client.get(f"http://127.0.0.1:{tls.gateway.port}/health")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old = context(maximum_version=ssl.TLSVersion.TLSv1_1, minimum_version=ssl.TLSVersion.TLSv1)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", tls.gateway.port, ssl=old, server_hostname="localhost")
    assert stat.S_IMODE(os.stat(tls.gateway.paths.certificate).st_mode) == 0o600


async def test_a_new_certificate_is_used_without_a_restart_and_open_streams_go_on(tls: TlsGateway) -> None:
    first = await asyncio.to_thread(tls.serial)
    workers = tls.gateway.log("haproxy").count("New worker")
    async with httpx.AsyncClient(verify=context(), timeout=20) as client:
        question = {**QUESTION, "mock": {"events": 200, "gap_s": 0.02}}
        async with client.stream("POST", f"{tls.url}/v1/chat/completions", json=question) as stream:
            pieces = stream.aiter_text()
            await anext(pieces)
            # Half of a new pair: refused, said, and the old one stays.
            (tls.directory / "k.pem").write_bytes(AUTHORITY.issue_cert("x").private_key_pem.bytes())
            await wait_for(
                lambda: (
                    "is not the key of" in (tls.gateway.demand.certificate_problem or "")
                    if tls.gateway.demand
                    else False
                ),
                "the broken pair is said",
            )
            assert await asyncio.to_thread(tls.serial) == first
            assert "is not the key of" in tls.gateway.log("router")
            write_pair(tls.directory)
            await wait_for(
                lambda: tls.gateway.demand and not tls.gateway.demand.certificate_problem,
                "the new pair is taken",
            )
            second = await asyncio.to_thread(tls.serial)
            assert second != first
            text = "".join([piece async for piece in pieces])
            assert text.endswith("data: [DONE]\n\n")
    assert tls.gateway.log("haproxy").count("New worker") == workers
    await tls.gateway.kill("haproxy")
    tls.gateway.start_process("haproxy")
    end_s = asyncio.get_running_loop().time() + 5
    while True:
        try:
            assert await asyncio.to_thread(tls.serial) == second, "a restarted HAProxy has it, too"
            break
        except OSError:
            assert asyncio.get_running_loop().time() < end_s
            await asyncio.sleep(0.05)
    assert "PRIVATE KEY" not in tls.gateway.log("router") + tls.gateway.log("haproxy")


def test_the_files_are_looked_at_often_enough_to_mend_a_mistake() -> None:
    assert certificate_keeper.PERIOD_S <= 5
