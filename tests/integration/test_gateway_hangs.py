"""A real HAProxy that hangs is told from one that is full."""

from __future__ import annotations

import signal

import psutil
import pytest
from tests.integration.gateway_rig import running_gateway, wait_for

from headrace.control.probe import keeps_silent, probe_gateway

pytestmark = pytest.mark.slow


async def test_a_full_haproxy_speaks_at_its_runtime_api_and_a_stopped_one_nowhere() -> None:
    # As if the second passes and probes had no room beyond the clients.
    edits = {"  maxconn 17\n": "  maxconn 16\n"}
    async with running_gateway(max_connections=16, config_edits=edits) as gateway:
        assert await probe_gateway(gateway.paths.alive_socket)
        assert not await keeps_silent(gateway.paths.runtime_socket)
        clients = [await gateway.connect() for _ in range(16)]
        for client in clients:
            client.send("GET", "/health")
            assert (await client.receive()).status == 200
        assert not await probe_gateway(gateway.paths.alive_socket)
        assert not await keeps_silent(gateway.paths.runtime_socket)
        for client in clients:
            client.close()
        [worker] = psutil.Process(gateway.processes["haproxy"].pid).children()
        worker.send_signal(signal.SIGSTOP)
        await wait_for(lambda: worker.status() == psutil.STATUS_STOPPED, "the worker is stopped")
        assert not await probe_gateway(gateway.paths.alive_socket)
        assert await keeps_silent(gateway.paths.runtime_socket)
        await gateway.kill("haproxy")
        assert not await keeps_silent(gateway.paths.runtime_socket), "dead is not silent"
