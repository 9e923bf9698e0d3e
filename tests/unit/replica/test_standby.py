"""The turn to standby: routers are asked first, open requests win, the newest wish counts."""

from __future__ import annotations

import asyncio

import pytest

from headrace.replica import standby
from headrace.replica.standby import Standby


class World:
    """An engine, routers and requests as a standby sees them."""

    def __init__(self) -> None:
        self.sleep_level = 0
        self.num_open = 0
        self.is_released = True
        self.error = ""
        self.has_sibling = False
        self.log: list[str] = []
        self.changed = asyncio.Event()
        self.standby = Standby(self, self, self._ask_release, lambda: self.is_released, self._on_change)

    def num_in_engine(self) -> int:
        return self.num_open

    def can_hand_over(self) -> bool:
        return self.has_sibling

    def hand_over(self) -> int:
        if self.has_sibling:
            self.log.append(f"hand over {self.num_open}")
            self.num_open = 0
        return self.num_open

    async def set_sleep(self, level: int) -> str:
        self.log.append(f"set {level}")
        await asyncio.sleep(0)
        if not self.error:
            self.sleep_level = level
        return self.error

    def _ask_release(self) -> None:
        self.log.append("ask")

    def _on_change(self) -> None:
        if self.standby.is_leaving:
            self.log.append("leaving")
        self.changed.set()

    async def done(self) -> None:
        turn = self.standby._turn
        assert turn is not None
        async with asyncio.timeout(10):
            await turn


async def test_routers_are_asked_before_the_engine_sleeps() -> None:
    world = World()
    world.is_released = False
    world.standby.set_level(1)
    await world.changed.wait()
    assert world.log == ["ask", "leaving"]
    world.is_released = True
    await world.done()
    assert (world.log[-1], world.sleep_level, world.standby.is_leaving) == ("set 1", 1, False)
    world.standby.set_level(2)  # nobody sends it anything: no need to ask again
    await world.done()
    world.standby.set_level(0)
    await world.done()
    assert world.log == ["ask", "leaving", "set 1", "set 2", "set 0"]
    assert world.standby.error == ""


async def test_open_requests_keep_it_awake_and_that_is_told() -> None:
    world = World()
    world.num_open = 2
    world.standby.set_level(1)
    await world.done()
    assert world.standby.error == "it cannot sleep: 2 requests are open"
    assert world.log == []


async def test_open_requests_go_to_siblings_after_the_routers_answered() -> None:
    world = World()
    world.num_open, world.has_sibling, world.is_released = 2, True, False
    world.standby.set_level(1)
    await world.changed.wait()
    assert world.log == ["ask", "leaving"]
    world.is_released = True
    await world.done()
    assert world.log[2:4] == ["hand over 2", "set 1"]
    assert (world.sleep_level, world.standby.error) == (1, "")


async def test_a_request_that_came_meanwhile_and_stays_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "RELEASE_LIMIT_S", 0.05)
    world = World()
    world.is_released = False
    world.standby.set_level(1)
    await world.changed.wait()
    world.num_open = 1
    await world.done()
    assert (world.sleep_level, world.standby.is_leaving) == (0, False)
    assert world.standby.error == "it cannot sleep: 1 requests are open"


async def test_a_router_that_never_answers_delays_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "RELEASE_LIMIT_S", 0.05)
    world = World()
    world.is_released = False
    world.standby.set_level(2)
    await world.done()
    assert world.sleep_level == 2


async def test_the_newest_wish_counts() -> None:
    world = World()
    world.is_released = False
    world.standby.set_level(2)
    await world.changed.wait()
    world.standby.set_level(0)
    world.is_released = True
    await world.done()
    assert world.log[-2:] == ["set 2", "set 0"]
    assert world.sleep_level == 0


async def test_an_engine_that_cannot_wake_is_told_and_may_be_asked_again() -> None:
    world = World()
    world.standby.set_level(1)
    await world.done()
    world.error = "no memory"
    world.standby.set_level(0)
    await world.done()
    assert (world.standby.error, world.sleep_level) == ("no memory", 1)
    world.error = ""
    world.standby.set_level(0)
    await world.done()
    assert (world.standby.error, world.sleep_level) == ("", 0)


async def test_stopping_ends_a_turn() -> None:
    world = World()
    await world.standby.stop()
    world.is_released = False
    world.standby.set_level(1)
    await world.changed.wait()
    await world.standby.stop()
    assert world.sleep_level == 0
