"""HAProxy's certificate kept equal to the user's files: looked at every few seconds, no restart.

Owns the decision when a new pair is taken, and the last reason why not. A pair that cannot be used changes
nothing: the old one stays. Must not know what makes a pair usable (`certificate`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from headrace.clock import Clock
from headrace.errors import ConfigError, HeadraceError
from headrace.gateway.certificate import load_certificate, valid_until
from headrace.gateway.files import write_files
from headrace.gateway.haproxy_runtime import HaproxyRuntime, HaproxyUnavailable

logger = logging.getLogger(__name__)

PERIOD_S = 3.0
EXPIRY_WARNING_S = 7 * 86_400.0
_Signature = tuple[tuple[int, int, int], ...]


class CertificateKeeper:
    """Watches one pair of files. Streams that are open keep the certificate that they began with."""

    def __init__(
        self,
        certificate: str,
        key: str,
        target: str,
        runtime: HaproxyRuntime,
        clock: Clock,
    ) -> None:
        self._certificate = certificate
        self._key = key
        self._target = target
        self._runtime = runtime
        self._clock = clock
        self._seen: _Signature | None = None
        self._valid_until_s = 0.0
        self._error = ""

    def __repr__(self) -> str:
        return f"<CertificateKeeper {self._certificate} {self.problem or 'in use'}>"

    @property
    def problem(self) -> str:
        """What somebody should look at; empty: nothing."""
        if self._error:
            return f"{self._error} (the earlier certificate stays in use)"
        left_s = self._valid_until_s - self._clock.wall_s()
        if self._valid_until_s and left_s < EXPIRY_WARNING_S:
            return (
                f"gateway.tls.certificate: {self._certificate} expires in {max(left_s, 0) / 86_400:.1f} days"
            )
        return ""

    async def run(self) -> None:
        """Run for ever. Cancel it to stop."""
        while True:
            await self.look()
            await asyncio.sleep(PERIOD_S)

    async def look(self) -> None:
        """Compare once, and change HAProxy's certificate if the files hold another good one."""
        signature = _signature(self._certificate, self._key)
        if signature == self._seen:
            return
        before = self._error
        try:
            pem = load_certificate(self._certificate, self._key, self._clock.wall_s())
            if pem != _read(self._target):
                await self._runtime.set_certificate(self._target, pem)
                write_files({self._target: pem})  # what a restarted HAProxy begins with
                logger.info("certificate %s: a new one is in use", self._certificate)
        except HaproxyUnavailable:
            return  # tried again: it restarts with the old one
        except (HeadraceError, OSError) as error:
            # Half of a pair may just have been replaced; the other half changes the signature again.
            prefix = "" if isinstance(error, ConfigError) else "gateway.tls: "
            self._error = f"{prefix}{error}"
        else:
            self._error = ""
            self._valid_until_s = valid_until(pem)
        self._seen = signature
        if self._error and self._error != before:
            logger.warning("%s", self.problem)


def _signature(*paths: str) -> _Signature:
    """Return what changes when a file does. A missing file has a signature, too."""
    found = []
    for path in paths:
        try:
            status = os.stat(path)
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
