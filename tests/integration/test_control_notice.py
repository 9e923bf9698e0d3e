"""A whole system on a machine that is about to go away: its replica leaves, and no other is started."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import headrace

pytestmark = pytest.mark.slow
LIMIT_S = 30.0


def test_a_machine_with_a_notice_gets_no_replica_again_and_status_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    notice = tmp_path / "notice"
    tree = {
        "endpoints": {"chat": {"model": "simulated", "engine": "simulated"}},
        "gateway": {"bind": "127.0.0.1:0"},
        "notice_file": str(notice),
    }
    with headrace.serve(tree) as system:
        system.wait_until_ready(LIMIT_S)
        (replica,) = system.status().replicas
        notice.write_text(json.dumps({"deadline_s": time.time() + 60}))
        limit_s = time.monotonic() + LIMIT_S
        while system.status().replicas:
            assert time.monotonic() < limit_s, "it did not leave"
            time.sleep(0.05)
        status, watched_until_s = system.status(), time.monotonic() + 1.5  # of a restart every 0.1 s before
        while time.monotonic() < watched_until_s:
            status = system.status()
            assert status.replicas == [], f"after {replica.pid}"
            time.sleep(0.05)
        (warning,) = status.warnings
        assert warning.startswith("chat: this machine goes away by a notice; nothing is started for ")
        assert status.endpoints[0].eta_s > 50
        assert not status.is_ready
