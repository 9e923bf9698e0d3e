"""An id is not used again while the engine may still speak of the request that had it."""

from __future__ import annotations

from typing import Any

from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams
from headrace.clock import VirtualClock
from headrace.replica.aborted_ids import MAX_REMEMBERED, AbortedIds
from headrace.replica.engine_client import EngineClient


class Deaf:
    """An engine process that says nothing."""

    def send(self, command: Any) -> None:
        pass


class Stream:
    """One that only wants to know of its end."""

    def on_engine_lost(self, reason: str) -> None:
        self.reason = reason


async def test_an_aborted_id_counts_as_used_until_the_engine_is_gone() -> None:
    client = EngineClient(EngineSpec("simulated", "m"), "engine", VirtualClock(), lambda: None)
    client.state, client._process = "ready", Deaf()  # type: ignore[assignment]
    client.submit(GenerationRequest("r", [1], SamplingParams()), Stream())  # type: ignore[arg-type]
    assert client.has_request("r")
    client.abort("r")
    assert client.num_requests == 0
    assert client.has_request("r"), "the running step may still give its token"
    client.on_lost("gone")
    assert not client.has_request("r")


def test_the_newest_are_remembered_and_no_more() -> None:
    ids = AbortedIds()
    for number in range(MAX_REMEMBERED + 2):
        ids.add(f"r{number}")
    assert "r0" not in ids
    assert "r1" not in ids
    assert "r2" in ids
    assert f"r{MAX_REMEMBERED + 1}" in ids
