"""A front whose own work breaks leaves as failed: one that nobody hears of would be of no use."""

from __future__ import annotations

import asyncio
from typing import Any

from headrace.api.messages import EngineSpec, ReplicaSpec
from headrace.clock import SystemClock
from headrace.replica.front_life import FrontLife, FrontParts


class Part:
    """Whatever a front is made of besides: it does what it is asked, and nothing comes of it."""

    address = socket_path = ""
    has_left = False

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: None

    async def listen(self, *arguments: object) -> str:
        return "127.0.0.1:1"

    async def listen_unix(self, path: str) -> None:
        """Nobody connects."""

    async def leave(self) -> None:
        self.has_left = True


class BrokenReporter(Part):
    async def run(self) -> None:
        raise RuntimeError("a fault of our own")


async def test_a_front_whose_reports_break_leaves_as_failed() -> None:
    front: Any = Part()
    part: Any = Part()
    reporter: Any = BrokenReporter()
    spec = ReplicaSpec("chat-1", "chat", EngineSpec(kind="simulated", model="m"), "", [])
    life = FrontLife(front, FrontParts(spec, SystemClock(), part, reporter, part, part, part, part, None))
    async with asyncio.timeout(10):
        assert await life.run() == 1
    assert front.has_left
