"""All child processes of one process: started, stopped with a deadline, killed with their groups, reaped.

Owns the children and their deadlines. The process that holds them has one thread (`headrace.fabric.child`).
Must not know: who asks, or what happens after an end.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Callable

from headrace.api.messages import ProcessSpec, ProcessState
from headrace.fabric.child import Child

_REAP_LIMIT_S = 5.0


class Children:
    """Child processes by name. `on_ended` is called with each that ended, after it was reaped."""

    def __init__(self, on_ended: Callable[[ProcessState], None]) -> None:
        self._on_ended = on_ended
        self._children: dict[str, Child] = {}
        self._kills: dict[str, asyncio.TimerHandle] = {}

    def __repr__(self) -> str:
        return f"Children({', '.join(self._children) or 'none'})"

    def __len__(self) -> int:
        return len(self._children)

    def __contains__(self, name: str) -> bool:
        return name in self._children

    def names(self) -> list[str]:
        return list(self._children)

    def states(self) -> list[ProcessState]:
        return [child.state() for child in self._children.values()]

    def start(self, spec: ProcessSpec) -> ProcessState:
        """Start a process of a name that none has. Raises OSError."""
        assert spec.name not in self._children
        child = Child(spec)
        self._children[spec.name] = child
        asyncio.get_running_loop().add_reader(child.pidfd, self._on_exit, child)
        return child.state()

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a process, if it is there."""
        if name in self._children:
            self._children[name].signal(number)

    def kill(self, name: str) -> None:
        """Kill a process with its group, if it is there."""
        if name in self._children:
            self._children[name].kill_group()

    def stop(self, name: str, grace_s: float) -> bool:
        """Signal a child and set its deadline; again: only an earlier one counts. False: no such child."""
        child = self._children.get(name)
        if child is None:
            return False
        loop = asyncio.get_running_loop()
        pending = self._kills.get(name)
        if pending is None:
            child.signal(child.spec.stop_signal)
        elif pending.when() <= loop.time() + grace_s:
            return True
        else:
            pending.cancel()
        if grace_s <= 0:
            child.kill_group()
        self._kills[name] = loop.call_later(max(grace_s, 0), child.kill_group)
        return True

    def kill_all_and_reap(self) -> None:
        """The last resort: nothing may outlive the process that holds them. `on_ended` is not called."""
        loop = asyncio.get_running_loop()
        for child in self._children.values():
            loop.remove_reader(child.pidfd)
            child.kill_group()
        deadline_s = time.monotonic() + _REAP_LIMIT_S
        while self._children and time.monotonic() < deadline_s:
            by_fd = {child.pidfd: name for name, child in self._children.items()}
            poll = select.poll()
            for fd in by_fd:
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll(100):
                self._children.pop(by_fd[fd]).reap()
        for handle in self._kills.values():
            handle.cancel()
        self._kills.clear()

    def _on_exit(self, child: Child) -> None:
        asyncio.get_running_loop().remove_reader(child.pidfd)
        pending = self._kills.pop(child.spec.name, None)
        if pending is not None:
            pending.cancel()
        del self._children[child.spec.name]
        self._on_ended(child.reap())
