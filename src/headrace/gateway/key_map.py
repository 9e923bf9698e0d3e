"""The valid keys in HAProxy's memory and in its file, kept equal to those of the newest spec.

The file is written first, so that a HAProxy that starts or reloads at any moment has them; then the running
one is told over its runtime API, and again until it has them. Open streams are not touched: a key counts when
a request begins. Must not know where keys come from, or anything but their hashes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from headrace.errors import HeadraceError
from headrace.gateway.files import write_files
from headrace.gateway.haproxy_identity import parse_key_map, render_key_map
from headrace.gateway.haproxy_runtime import HaproxyRefused, HaproxyRuntime
from headrace.gateway.rounds import repeat_rounds

logger = logging.getLogger(__name__)


class KeyChanges(NamedTuple):
    """Steps towards the wanted keys, in their order: whoever lost a key is shut out first."""

    removed: list[str]
    added: dict[str, str]


def plan_key_changes(wanted: Mapping[str, str], actual: Mapping[str, str]) -> KeyChanges:
    """Return what to do so that HAProxy's map holds exactly `wanted`. A key that changed hands is both."""
    removed = [key for key, tenant in actual.items() if wanted.get(key) != tenant]
    added = {key: tenant for key, tenant in wanted.items() if actual.get(key) != tenant}
    return KeyChanges(removed, added)


class KeyMap:
    """Keeps keys.map. Until it is told keys, those that the file holds count."""

    def __init__(self, path: str, runtime: HaproxyRuntime) -> None:
        self._path = path
        self._runtime = runtime
        self._wanted = read_key_map(path)
        """None: not known yet, and HAProxy's keys are left as they are."""
        self._is_file_due = False
        self._has_map = False
        self._wake = asyncio.Event()
        self.num_failures = 0
        self.last_error = ""

    def __repr__(self) -> str:
        return f"<KeyMap keys={len(self._wanted or ())} error={self.last_error!r}>"

    def want(self, keys: Mapping[str, str] | None, has_map: bool) -> None:
        """Set the valid keys (None: as before), SHA-256 -> tenant, and whether HAProxy's config has the map
        at all: without tenants it has not."""
        if keys is not None and keys != self._wanted:
            self._wanted = dict(keys)
            self._is_file_due = True
            self._write()  # at once: the caller may reload HAProxy next
        self._has_map = has_map
        self._wake.set()

    async def run(self) -> None:
        """Run for ever. Cancel it to stop."""
        await repeat_rounds(self.run_round, self._wake, None)

    async def run_round(self) -> bool:
        """Compare and change once. True if nothing is left to do."""
        self._write()
        wanted = self._wanted
        if not self._has_map or wanted is None:
            return not self._is_file_due
        try:
            changes = plan_key_changes(wanted, await self._runtime.show_map(self._path))
            await self._runtime.delete_from_map(self._path, changes.removed)
            await self._runtime.add_to_map(self._path, changes.added)
            await self._tell_old_workers(wanted)
        except HeadraceError as error:
            self._note_failure(error)
            return False
        if changes.removed or changes.added:
            logger.info("keys: %d removed, %d added", len(changes.removed), len(changes.added))
        if not self._is_file_due:
            self.last_error = ""
        return not self._is_file_due and wanted is self._wanted

    async def _tell_old_workers(self, wanted: Mapping[str, str]) -> None:
        """Take revoked keys from processes that a reload left to finish their streams: each of their
        connections may still begin one more request. New keys are of no use there."""
        for worker in await self._runtime.old_workers():
            try:
                actual = await self._runtime.show_map(self._path, worker)
            except HaproxyRefused:
                continue  # it has just ended, or is from before there were tenants
            removed = plan_key_changes(wanted, actual).removed
            await self._runtime.delete_from_map(self._path, removed, worker)

    def _write(self) -> None:
        if not self._is_file_due or self._wanted is None:
            return
        try:
            write_files({self._path: render_key_map(self._wanted)})
        except OSError as error:
            self._note_failure(error)
        else:
            self._is_file_due = False

    def _note_failure(self, error: Exception) -> None:
        self.num_failures += 1
        if str(error) != self.last_error:
            self.last_error = str(error)
            logger.warning("keys: %s", error)


def read_key_map(path: str) -> dict[str, str] | None:
    """Return the keys of a file that `KeyMap` or the gateway's preparation wrote; None if there is none."""
    try:
        return parse_key_map(Path(path).read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("%s: cannot be read: %s", path, error)
        return None
