"""What is said of a cluster that does not answer, and when nobody waits any more."""

from __future__ import annotations

import asyncio

import pytest

from headrace.clock import VirtualClock
from headrace.control import cluster_watch
from headrace.control.cluster_watch import LIMIT_VARIABLE, ClusterWatch, watch_cluster
from headrace.fabric.cluster import ClusterUnavailable

REASON = "the Ray cluster at 10.0.0.1:6379 does not answer: Connection refused"


def make_watch(limit: str = "") -> tuple[ClusterWatch, list[str]]:
    said: list[str] = []
    return ClusterWatch("10.0.0.1:6379", {LIMIT_VARIABLE: limit}, said.append), said


def test_a_cluster_that_does_not_answer_is_said_once_and_so_is_that_it_does_again() -> None:
    watch, said = make_watch()
    assert watch.on_answer(0.0, is_held=True) == ""
    assert said == []
    for now_s in (1.0, 2.0, 3.0):
        assert watch.on_silence(now_s, REASON) == ""
    assert watch.is_lost
    assert said == [f"{REASON}. What runs serves on for now, and it is tried again"]
    assert watch.on_answer(8.5, is_held=True) == ""
    assert not watch.is_lost
    assert said[1:] == ["the Ray cluster answers again, after 7.5 s"]
    assert watch.on_answer(9.0, is_held=True) == ""
    assert watch.on_silence(20.0, REASON) == ""
    assert len(said) == 3


@pytest.mark.parametrize(("limit", "last_s", "within"), [("", 47.9, "60.0 s"), ("10", 7.9, "10.0 s")])
def test_nobody_waits_longer_than_rays_nodes_do(limit: str, last_s: float, within: str) -> None:
    watch, _ = make_watch(limit)
    assert watch.on_silence(100.0, REASON) == ""
    assert watch.on_silence(100.0 + last_s, REASON) == ""
    over = watch.on_silence(100.2 + last_s, REASON)
    assert over.startswith(f"the Ray cluster at 10.0.0.1:6379 has not answered for {last_s + 0.2:.1f} s. ")
    assert f"Ray's nodes end after {within}" in over


@pytest.mark.parametrize("limit", ["soon", "-3", "1.5"])
def test_a_limit_that_is_none_of_rays_is_not_taken(limit: str) -> None:
    watch, _ = make_watch(limit)
    watch.on_silence(0.0, REASON)
    assert watch.on_silence(47.0, REASON) == ""


def test_a_system_that_is_missed_twice_in_a_row_is_over() -> None:
    watch, said = make_watch()
    assert watch.on_answer(0.0, is_held=False) == ""
    assert watch.on_answer(1.0, is_held=True) == ""
    assert watch.on_answer(2.0, is_held=False) == ""
    assert watch.on_silence(3.0, REASON) == ""
    assert watch.on_answer(4.0, is_held=False) == ""
    assert "no longer on the Ray cluster at 10.0.0.1:6379" in watch.on_answer(5.0, is_held=False)
    assert len(said) == 2


class Looks:
    """A system whose looks give these answers."""

    address = "10.0.0.1:6379"

    def __init__(self, *answers: bool | str) -> None:
        self._answers = list(answers)

    async def look(self) -> bool:
        answer = self._answers.pop(0)
        if isinstance(answer, str):
            raise ClusterUnavailable(answer)
        return answer


async def test_it_looks_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_watch, "LOOK_PERIOD_S", 0.0)
    watch, said = make_watch()
    async with asyncio.timeout(5.0):
        over = await watch_cluster(Looks(True, REASON, True, False, False), watch, VirtualClock())
    assert "no longer on the Ray cluster" in over
    assert len(said) == 2
