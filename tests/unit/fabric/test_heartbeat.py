"""Who touches his file is well; who does not for long hangs, unless nobody looked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.fabric.heartbeat import FIRST_BEAT_LIMIT_S, SILENCE_LIMIT_S, Heartbeats, beat


class Watch:
    """One process, looked after each half second of a clock that tests turn."""

    def __init__(self, path: Path) -> None:
        self.path, self.now_s, self.num_beats = path, 100.0, 0
        path.touch()
        self.heartbeats = Heartbeats()
        self.heartbeats.watch("controller", path, self.now_s)

    def beat(self) -> None:
        self.num_beats += 1
        os.utime(self.path, ns=(self.num_beats, self.num_beats))

    def look(self, seconds: float) -> dict[str, float]:
        """What is found during so many seconds."""
        for _ in range(int(seconds / Heartbeats.LOOK_S)):
            self.now_s += Heartbeats.LOOK_S
            if found := self.heartbeats.hung(self.now_s):
                return found
        return {}


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path / "beat")


def test_silence_after_a_beat_is_found_within_its_limit(watch: Watch) -> None:
    for _ in range(40):
        watch.beat()
        assert watch.look(1.0) == {}
    assert watch.look(SILENCE_LIMIT_S - 1.5) == {}
    assert watch.look(2.0)["controller"] > SILENCE_LIMIT_S


def test_the_first_beat_may_take_long(watch: Watch) -> None:
    assert watch.look(FIRST_BEAT_LIMIT_S) == {}
    assert watch.look(1.0)["controller"] > FIRST_BEAT_LIMIT_S


def test_one_that_is_started_again_begins_anew(watch: Watch) -> None:
    watch.beat()
    watch.look(2.0)
    watch.heartbeats.forget("controller")
    assert watch.look(60.0) == {}
    watch.heartbeats.watch("controller", watch.path, watch.now_s)
    assert watch.look(60.0) == {}


def test_who_did_not_look_himself_blames_nobody(watch: Watch) -> None:
    watch.beat()
    watch.look(2.0)
    watch.now_s += 60.0
    assert watch.look(SILENCE_LIMIT_S) == {}
    assert watch.look(1.0)


def test_a_file_that_cannot_be_asked_condemns_nobody(watch: Watch) -> None:
    watch.beat()
    watch.look(2.0)
    watch.path.unlink()
    beat(watch.path)  # fails silently
    assert watch.look(60.0) == {}


def test_a_beat_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "beat"
    path.touch()
    os.utime(path, ns=(1, 1))
    beat(path)
    assert path.stat().st_mtime_ns > 1
