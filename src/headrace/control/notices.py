"""Which machines are about to go away, and whether that keeps the controller from starting replicas. Pure.

A replica that is started on a machine with a notice leaves again at once. Owns for how long nothing is
started, always bounded: a machine may stay after all. Must not know what is wanted, or who starts replicas.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

SETTLE_S = 10.0
"""After a deadline, and after the last word of a leaving replica, starts are tried again so much later."""
MAX_SETTLE_S = 300.0
"""A notice that stays on a machine that stays makes each trial wait twice as long, up to this."""
MAX_NOTICE_S = 3600.0
"""A deadline that is further away counts as this far."""
FORGET_S = 600.0
"""So long after the last trial a notice is a new one."""
MAX_MACHINES = 1000
"""Remembered ones; beyond them those whose time is over first are forgotten."""


class HoldOff(NamedTuple):
    """Nothing is started now."""

    reason: str
    """For people; the same words for as long as it lasts."""
    left_s: float


@dataclass(slots=True)
class _Window:
    """A time without starts."""

    since_s: float = -math.inf
    until_s: float = -math.inf
    settle_s: float = SETTLE_S

    def extend(self, left_s: float, now_s: float) -> None:
        if now_s > self.until_s:  # the first word, or one after a trial
            is_new = now_s > self.until_s + FORGET_S
            self.settle_s = SETTLE_S if is_new else min(2 * self.settle_s, MAX_SETTLE_S)
            self.since_s = now_s
        self.until_s = now_s + left_s + self.settle_s


@dataclass(slots=True)
class _Machine:
    window: _Window = field(default_factory=_Window)
    returns: dict[str, _Window] = field(default_factory=dict)
    """By endpoints that got a replica here again after the notice was known."""


class MachineNotices:
    """What leaving replicas say of their machines. `note` hears them, `hold_off` answers."""

    def __init__(self) -> None:
        self._machines: dict[str, _Machine] = {}

    def __repr__(self) -> str:
        return f"MachineNotices({', '.join(map(repr, self._machines)) or 'none'})"

    def note(self, node: str, endpoint: str, leave_by_s: float, started_s: float, now_s: float) -> None:
        """A replica of `endpoint` on `node` (empty: this machine) says that it leaves within leave_by_s by a
        notice. started_s: when it was told to start; infinite, negative: not known."""
        if node not in self._machines and len(self._machines) >= MAX_MACHINES:
            oldest = min(self._machines, key=lambda name: self._machines[name].window.until_s)
            del self._machines[oldest]
        machine = self._machines.setdefault(node, _Machine())
        is_sane = 0.0 <= leave_by_s <= MAX_NOTICE_S
        machine.window.extend(leave_by_s if is_sane else MAX_NOTICE_S, now_s)
        for name in [n for n, window in machine.returns.items() if now_s > window.until_s + FORGET_S]:
            del machine.returns[name]
        if started_s >= machine.window.since_s or endpoint in machine.returns:
            machine.returns.setdefault(endpoint, _Window()).extend(0.0, now_s)

    def hold_off(self, endpoint: str, nodes: Collection[str], now_s: float) -> HoldOff | None:
        """Return why no replica of `endpoint` is started now; None: it may be. nodes: ids of the cluster's
        live nodes; empty: there is this machine only.

        In a cluster the launcher avoids nodes with notices (`avoided`), and what waits for another node is
        what makes the cluster add one: starts are held off only for a while after one leaves all the same.
        """
        if not nodes:
            return _hold_off("this machine goes away by a notice", self._windows([""]), now_s)
        returns = [m.returns[endpoint] for m in self._machines.values() if endpoint in m.returns]
        last = sorted(returns, key=lambda window: window.until_s)[-1:]
        return _hold_off("its last replica got a node that goes away by a notice", last, now_s)

    def hold_off_at(self, node: str, now_s: float) -> HoldOff | None:
        """Return why nothing that belongs on `node` alone is started now; None: it may be."""
        return _hold_off("its gateway's machine goes away by a notice", self._windows([node]), now_s)

    def avoided(self, now_s: float) -> dict[str, float]:
        """Return the cluster's nodes where nothing is to be started, and for how many seconds more."""
        left = {node: machine.window.until_s - now_s for node, machine in self._machines.items() if node}
        return {node: left_s for node, left_s in left.items() if left_s > 0}

    def _windows(self, nodes: Collection[str]) -> list[_Window]:
        return [self._machines[node].window for node in nodes if node in self._machines]


def _hold_off(reason: str, windows: list[_Window], now_s: float) -> HoldOff | None:
    left_s = min((window.until_s for window in windows), default=-math.inf) - now_s
    return HoldOff(reason, left_s) if left_s > 0 else None
