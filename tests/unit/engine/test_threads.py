"""OpenMP's waiting: ours by default, the user's where set."""

from __future__ import annotations

import os

import pytest

from headrace.engine.threads import limit_spinning


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "3000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_spin_briefly_unless_the_user_decided(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: dict[str, str]
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        # Recorded first, so that monkeypatch restores what limit_spinning sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
        if name in before:
            monkeypatch.setenv(name, before[name])
    limit_spinning()
    found = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
    assert found == after
