"""A real HAProxy, a real router, mock fronts: relaying, and answers that need no replica."""

from __future__ import annotations

import pytest

from tests.integration.gateway_rig import running_gateway

pytestmark = pytest.mark.slow


async def test_a_request_is_relayed_to_a_replica_and_its_stream_comes_back_whole() -> None:
    async with running_gateway() as gateway:
        await gateway.add_front("chat-1")
        answer = await gateway.chat(events=3, gap_s=0.01)
        assert answer.status == 200
        assert answer.body == b"data: 0\n\ndata: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
        assert answer.headers["x-replica"] == "chat-1"
