"""Notices: found, read again, and never what breaks a front."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from headrace.clock import VirtualClock
from headrace.replica import notice
from headrace.replica.notice import NoticeFile, NoticeWatcher, read_deadline, read_notice


@pytest.mark.parametrize(
    ("data", "deadline_s"),
    [
        (b'{"deadline_s": 1234.5}', 1234.5),
        (b'{"deadline_s": 0, "more": [1]}', 0.0),
        (b'{"deadline_s": -5}', None),
        (b'{"deadline_s": 1e999}', None),
        (b'{"deadline_s": NaN}', None),
        (b'{"deadline_s": "soon"}', None),
        (b'{"deadline_s": true}', None),
        (b"{}", None),
        (b"[]", None),
        (b"", None),
        (b"\xff\xfe", None),
        (b'{"deadline_s": 12', None),
    ],
)
def test_only_a_whole_number_of_seconds_is_a_deadline(data: bytes, deadline_s: float | None) -> None:
    assert read_deadline(data) == deadline_s


def test_whatever_lies_there_is_a_notice_and_nothing_is_none(tmp_path: Path) -> None:
    assert read_notice(str(tmp_path / "none")) is None
    assert read_notice(str(tmp_path / "no" / "such" / "folder")) is None
    assert read_notice(str(tmp_path)) == b"", "a directory"
    os.mkfifo(tmp_path / "pipe")
    assert read_notice(str(tmp_path / "pipe")) == b""
    (tmp_path / "large").write_bytes(b"x" * 100_000)
    assert len(read_notice(str(tmp_path / "large")) or b"") == 4096


async def test_a_notice_is_read_again_and_without_deadline_means_30_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notice, "CHECK_S", 0.005)
    path, clock, heard = tmp_path / "notice", VirtualClock(1000.0), list[float]()
    news = asyncio.Event()

    def on_notice(left_s: float) -> None:
        heard.append(left_s)
        news.set()

    async def next_one() -> float:
        for _ in range(2):  # the first may have been read before the change
            news.clear()
            async with asyncio.timeout(10):
                await news.wait()
        return heard[-1]

    watching = asyncio.create_task(NoticeWatcher(NoticeFile(str(path)), clock, on_notice).run())
    await asyncio.sleep(0.02)
    assert heard == []
    path.write_text("")
    assert await next_one() == 30.0
    clock.advance(5.0)
    assert await next_one() == 25.0
    path.write_text('{"deadline_s": 1100}')
    assert await next_one() == 95.0
    path.write_text('{"deadline_s": 900}')
    assert await next_one() == -105.0
    watching.cancel()
    await asyncio.wait([watching])


async def test_a_deadline_that_is_over_is_said_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, heard = tmp_path / "notice", asyncio.Queue[float]()
    path.write_text('{"deadline_s": 900}')
    watcher = NoticeWatcher(NoticeFile(str(path)), VirtualClock(1000.0), heard.put_nowait)
    watching = asyncio.create_task(watcher.run())
    async with asyncio.timeout(10):
        assert await heard.get() == -100.0
    watching.cancel()
    await asyncio.wait([watching])
    assert "its deadline was 100 s ago: leaving at once" in caplog.text
