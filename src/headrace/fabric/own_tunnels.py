"""The tunnels of the controller's machine, held by the controller itself while no keeper of a gateway or a
replica is there to hold them: others must reach it all the same.

Owns the one HostTunnels of this process. Must not know when it is needed (the launcher says so).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from headrace.fabric.host_messages import SetTunnels, TunnelsOpened
from headrace.fabric.host_tunnels import HostTunnels


class OwnTunnels:
    """Holds this machine's tunnels, or leaves them to others. Of one event loop."""

    def __init__(self, run_directory: Path | None, bind_host: str, on_change: Callable[[str], None]) -> None:
        """run_directory: None: never held. on_change: called with a problem, or nothing, when it changed."""
        self._run_directory = run_directory
        self._bind_host = bind_host
        self._on_change = on_change
        self._tunnels: HostTunnels | None = None
        self._holding: asyncio.Task[None] | None = None
        self.address = ""
        """Where they are; empty: not held here."""

    def __repr__(self) -> str:
        return f"OwnTunnels({self.address or 'not held'})"

    def set(self, wished: SetTunnels | None) -> None:
        """Offer and reach this from now on. None: another one of this machine does, or nobody has to."""
        if wished is None or self._run_directory is None:
            if self._holding is not None:
                self.close()
                self._on_change("")
            return
        if self._tunnels is None:
            self._tunnels = HostTunnels(self._run_directory, self._on_opened)
            self._holding = asyncio.create_task(self._tunnels.run(self._bind_host))
            self._holding.add_done_callback(self._on_done)
        self._tunnels.set(wished)

    def close(self) -> None:
        """Let go of them; the next one of this machine that waits for them takes over."""
        if self._holding is not None:
            self._holding.cancel()
        self._tunnels = self._holding = None
        self.address = ""

    def _on_opened(self, opened: TunnelsOpened) -> None:
        self.address = opened.address
        self._on_change(opened.error)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():  # our own bug; told, and tried again with the next plan
            self.close()
            self._on_change(f"the tunnels broke: {task.exception()!r}")
