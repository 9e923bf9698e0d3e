"""The processes that must always run: router, HAProxy, relay. Decides when each is started or killed. Pure.

They are never given up: the back-off only slows the attempts down.
Must not know: what the processes do, sockets, launchers.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.api.messages import ProcessState
from headrace.control.slots import HEALTHY_AFTER_S, MAX_FAST_FAILURES, restart_delay_s

GATEWAY_GRACE_S = 2.0
"""For routers, relays and HAProxies that have nothing open: nothing that they hold can still succeed."""
HUNG_AFTER_S = 10.0
"""A live process that has not answered for this long is killed and started again."""
STOOD_STILL_S = 2.0
"""Between two ticks: a controller that did not run for longer has heard nobody."""


@dataclass(slots=True)
class Essential:
    """One process: dead and due, dead and backing off, or alive and last heard of."""

    name: str
    pid: int = 0
    is_alive: bool = False
    is_stopping: bool = False
    started_s: float = 0.0
    heard_s: float = 0.0
    due_s: float = 0.0
    failures: int = 0
    num_starts: int = 0
    last_error: str = ""

    @property
    def state(self) -> str:
        if self.is_alive:
            return "stopping" if self.is_stopping else "running"
        if self.failures >= MAX_FAST_FAILURES:
            return "failing"
        return "restarting" if self.failures else "pending"

    def is_due(self, now_s: float) -> bool:
        """Whether to start it now."""
        return not self.is_alive and now_s >= self.due_s

    def is_hung(self, now_s: float) -> bool:
        """Whether to kill it now."""
        return self.is_alive and not self.is_stopping and now_s - self.heard_s > HUNG_AFTER_S

    def on_adopted(self, process: ProcessState, now_s: float) -> None:
        """It was running before this controller."""
        self.pid = process.pid
        self.is_alive = True
        self.started_s = self.heard_s = now_s
        self.num_starts = 1

    def on_start(self, now_s: float) -> None:
        self.is_alive = True
        self.is_stopping = False
        self.started_s = self.heard_s = now_s
        self.num_starts += 1

    def forgive(self) -> None:
        """It ended because it was to end: start it as if it were the first time."""
        self.failures, self.due_s, self.last_error = 0, 0.0, ""

    def on_ended(self, now_s: float, error: str) -> None:
        """It ended, or could not be started."""
        is_healthy = self.is_alive and now_s - self.started_s >= HEALTHY_AFTER_S
        self.failures = 1 if is_healthy else self.failures + 1
        self.is_alive = self.is_stopping = False
        self.pid = 0
        self.due_s = (
            now_s + restart_delay_s(self.failures) - (restart_delay_s(1) if self.failures == 1 else 0)
        )
        self.last_error = error
