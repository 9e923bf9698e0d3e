"""Processes that serve start without the library of the config tree, which is slow to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

SLOW = ("pydantic", "headrace.api.config")


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "headrace.engine.process",
        "headrace.fabric.keeper",
        "headrace.gateway.process",
        "headrace.replica.front",
        "headrace.replica.relay",
    ],
)
def test_a_process_that_serves_does_not_import_the_config_tree(module: str) -> None:
    program = f"import {module}, sys; print([name for name in sys.modules if name in {SLOW}])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
