"""Leaving: released first, then streams go to siblings, all before the machine does."""

from __future__ import annotations

import asyncio
import time

import pytest

from headrace.clock import SystemClock
from headrace.replica import departure
from headrace.replica.departure import Departure


class World:
    """Routers and streams as a departure sees them."""

    def __init__(self, handover_after_s: float = 0.05, grace_s: float = 5.0) -> None:
        self.has_routers = True
        self.released = True
        self.num_streams = 0
        self.has_sibling = False
        self.log: list[str] = []
        self.departure = Departure(SystemClock(), self, self, handover_after_s, grace_s)

    def has_router(self) -> bool:
        return self.has_routers

    def is_released(self) -> bool:
        return self.released

    def notify(self) -> None:
        self.log.append("notify")

    def num_in_engine(self) -> int:
        return self.num_streams

    def can_hand_over(self) -> bool:
        return self.has_sibling

    def hand_over(self) -> int:
        self.log.append("hand over")
        if self.has_sibling:
            self.num_streams = 0
        return self.num_streams


async def test_what_is_open_after_the_pause_is_handed_over() -> None:
    world = World()
    world.num_streams, world.has_sibling = 2, True
    await world.departure.wait_for_release()
    released_s = time.monotonic()
    assert await world.departure.free_engine()
    assert time.monotonic() - released_s >= 0.05
    assert world.log == ["notify", "hand over"]


async def test_what_ends_in_time_is_not_moved() -> None:
    world = World(handover_after_s=5.0)
    world.num_streams = 1
    await world.departure.wait_for_release()
    asyncio.get_running_loop().call_later(0.05, setattr, world, "num_streams", 0)
    assert await world.departure.free_engine()
    assert world.log == ["notify"]


async def test_without_siblings_streams_stay_until_the_grace_is_over() -> None:
    world = World(grace_s=0.2)
    world.num_streams = 1
    await world.departure.wait_for_release()
    assert not await world.departure.free_engine()
    assert world.log.count("hand over") >= 2, "a sibling may come in the meantime"


async def test_a_sibling_that_comes_late_takes_them() -> None:
    world = World()
    world.num_streams = 1
    await world.departure.wait_for_release()
    asyncio.get_running_loop().call_later(0.15, setattr, world, "has_sibling", True)
    assert await world.departure.free_engine()


async def test_streams_elsewhere_are_relayed_until_the_grace_is_over() -> None:
    world = World(grace_s=0.1)
    await world.departure.wait_for_release()
    began_s = time.monotonic()
    await world.departure.wait_for_streams(lambda: 1)
    assert 0.05 < time.monotonic() - began_s < 2.0


async def test_a_notice_shortens_every_wait() -> None:
    world = World(handover_after_s=60.0, grace_s=60.0)
    world.released, world.num_streams = False, 1
    began_s = time.monotonic()
    world.departure.leave_by_s = SystemClock().now_s() + departure.LAST_MOMENTS_S + 0.6
    await world.departure.wait_for_release()
    assert time.monotonic() - began_s < 0.5, "a third of the time is for the release"
    assert not await world.departure.free_engine()
    assert "hand over" in world.log
    await world.departure.wait_for_streams(lambda: 1)
    assert time.monotonic() - began_s < 2.0
    assert 0 < world.departure.left_s() <= departure.LAST_MOMENTS_S


async def test_a_deadline_in_the_past_leaves_at_once() -> None:
    world = World(handover_after_s=60.0, grace_s=60.0)
    world.released, world.num_streams = False, 1
    world.departure.leave_by_s = SystemClock().now_s() - 100.0
    began_s = time.monotonic()
    await world.departure.wait_for_release()
    await world.departure.free_engine()
    await world.departure.wait_for_streams(lambda: 1)
    assert time.monotonic() - began_s < 0.5
    assert world.departure.left_s() == 0.0


async def test_routers_that_do_not_answer_are_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departure, "RELEASE_LIMIT_S", 0.1)
    world = World()
    world.released = False
    await world.departure.wait_for_release()
    alone = World()
    alone.has_routers = False
    await alone.departure.wait_for_release()
    assert world.departure.has_begun
    assert world.departure.left_s() == -1.0
