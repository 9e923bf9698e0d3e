"""What an engine says goes to its log; where that has no room, the engine goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from headrace.engine.process import say


def test_a_line_for_which_there_is_no_room_is_lost_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("w") as log, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", log)
        say("ready")
    assert (tmp_path / "log").read_text() == "engine: ready\n"
    full = Path("/dev/full").open("w")  # noqa: SIM115, its close fails, as every write to it: ENOSPC
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        say("ready")
    with pytest.raises(OSError, match="No space left"):
        full.close()
