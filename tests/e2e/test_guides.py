"""The guide about tenants: its commands, run one after the other, print what stands under them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, RunningSystem, free_port

pytestmark = pytest.mark.slow
GUIDE = ROOT / "docs" / "guides" / "tenants.md"
UP = "headrace up"
EFFECT_LIMIT_S = 10.0
SIMULATED = ("endpoints.chat.engine=simulated", "endpoints.other.engine=simulated")
"""The guide is about who may ask, not about answers: no model computes here."""


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Return each bash block with the text block right under it, or with nothing."""
    pattern = r"```bash\n(.*?)```\n(?:```text\n(.*?)```)?"
    return [(match[1], match[2] or "") for match in re.finditer(pattern, text, flags=re.DOTALL)]


def matches(expected: str, printed: str) -> bool:
    """Whether `printed` is `expected`, whose `…` stand for anything within a line."""
    lines = [".*".join(map(re.escape, line.split("…"))) for line in expected.splitlines()]
    return re.fullmatch(r"\s*\n".join(lines), printed.strip()) is not None


class Shell:
    """One bash for all blocks, so that their variables stay."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._errors = directory / "errors.txt"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                ["bash", "-e"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=directory,
                env=environment,
                text=True,
            )

    def errors(self) -> str:
        return self._errors.read_text()

    def run(self, commands: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{commands}\necho; echo ==end==\n")
        self._process.stdin.flush()
        lines = []
        for line in self._process.stdout:
            if line == "==end==\n":
                return "".join(lines)
            lines.append(line)
        raise AssertionError(f"bash ended within {commands!r}: {self.errors()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


def run_block(shell: Shell, commands: str, expected: str) -> None:
    """Run a block. People are told to wait a second where a change takes effect; here what follows is asked
    again until it prints what it must."""
    before, pause, after = commands.partition("sleep 1\n")
    printed = shell.run(before)
    deadline_s = time.monotonic() + EFFECT_LIMIT_S
    while pause:
        rest = shell.run(after)
        if matches(expected, printed + rest) or time.monotonic() > deadline_s:
            printed += rest
            break
        time.sleep(0.05)
    assert matches(expected, printed), (commands, printed, shell.errors())


def test_the_guide_to_tenants_does_what_it_says(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("g")
    text = GUIDE.read_text()
    config = re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert config is not None
    (directory / "tenants.yaml").write_text(config[1])
    (directory / "bin").mkdir()
    (directory / "bin" / "headrace").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m headrace "$@"\n')
    (directory / "bin" / "headrace").chmod(0o755)
    blocks = blocks_of(text)
    assert sum(block.startswith(UP) for block, _ in blocks) == 1
    system: RunningSystem | None = None
    environment = RunningSystem.environment_of(directory)
    environment["PATH"] = f"{directory}/bin:{environment['PATH']}"
    admin = f"127.0.0.1:{free_port()}"
    settings = [word for set_ in (*SIMULATED, f"gateway.admin_bind={admin}") for word in ("--set", set_)]
    shell = Shell(directory, environment)
    try:
        for commands, expected in blocks:
            if commands.startswith(UP):
                system = RunningSystem(directory, str(directory / "tenants.yaml"), *settings)
                system.wait_ready()
            else:
                if system is not None:
                    here = [*settings, "--set", f"gateway.bind=127.0.0.1:{system.port}"]
                    commands = commands.replace("http://127.0.0.1:8000/v1", system.url)
                    commands = commands.replace("127.0.0.1:8001", admin)
                    commands = commands.replace("headrace apply", f"headrace apply {' '.join(here)}")
                run_block(shell, commands, expected)
    finally:
        shell.close()
        if system is not None:
            system.close()
