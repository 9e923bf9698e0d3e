"""What a restarted controller starts from, in the run directory: the applied config, the rollouts, and
whether the system was told to end.

Owns these files, which are whole after a crash at any moment. Must not know what is in them.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from pydantic import ValidationError

from headrace.api.config import Config
from headrace.api.config_loader import parse_config
from headrace.control.rollouts import KeptRollout, Rollouts
from headrace.control.specs import CONFIG_FILE, ENDING_FILE, ROLLOUTS_FILE
from headrace.errors import ConfigError


def write_config(run_directory: Path, config: Config) -> None:
    """Write the applied config. Raises OSError and leaves the file before it."""
    _write(run_directory / CONFIG_FILE, config.model_dump_json().encode())


def read_config(run_directory: Path) -> Config:
    """Read the applied config. Raises ConfigError."""
    path = run_directory / CONFIG_FILE
    try:
        return Config.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{path}: cannot be used: {error}") from error


def parse_applied(text: str) -> Config:
    """Read a config that was sent. Raises ConfigError."""
    try:
        tree = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"the config that was sent is not JSON: {error}") from error
    return parse_config(tree, source="applied config")


def keep_ending(run_directory: Path) -> str:
    """Keep that the system was told to end. Returns why that cannot be; empty: it is kept."""
    try:
        _write(run_directory / ENDING_FILE, b"")
    except OSError as error:
        return f"a restarted controller will not know of this: {ENDING_FILE}: {error}"
    return ""


def is_ending(run_directory: Path) -> bool:
    """Whether an earlier controller was told to end the system."""
    return (run_directory / ENDING_FILE).exists()


class RolloutsFile:
    """Keeps what outlives a controller of its rollouts."""

    def __init__(self, run_directory: Path, rollouts: Rollouts) -> None:
        self._path = run_directory / ROLLOUTS_FILE
        self._rollouts = rollouts
        self._revision = rollouts.revision

    def __repr__(self) -> str:
        return f"RolloutsFile({self._path}, revision {self._revision})"

    def restore(self, now_s: float) -> str:
        """Go on with what an earlier controller kept. Returns why that cannot be; empty: it can, or there
        was nothing."""
        try:
            kept = msgspec.json.decode(self._path.read_bytes(), type=list[KeptRollout])
            self._rollouts.restore(kept, now_s)
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as error:  # msgspec's and pydantic's errors are ValueErrors
            return f"{self._path}: rollouts do not go on, and cannot be undone: {error}"
        return ""

    def keep(self) -> str:
        """Write the rollouts if they changed. Returns why that failed; the next call tries again."""
        revision = self._rollouts.revision
        if revision == self._revision:
            return ""
        try:
            _write(self._path, msgspec.json.encode(self._rollouts.keep()))
        except OSError as error:
            return f"a restarted controller will not know of this: {ROLLOUTS_FILE}: {error}"
        self._revision = revision
        return ""


def _write(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
