"""Whether a system is still on its cluster, as whoever holds it from outside sees it.

Owns what is said of a cluster that does not answer, and when nobody waits for it any more. Must not know Ray,
or where it is said.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from headrace.clock import Clock
from headrace.fabric.cluster import ClusterUnavailable
from headrace.units import format_seconds

LOOK_PERIOD_S = 1.0
WITHOUT_HEAD_S = 60.0
"""For so long Ray's nodes and whoever is connected to them try to reach its head; then they end."""
LIMIT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Where Ray takes another limit from, in whole seconds."""
_SPEAKS_BEFORE_RATIO = 0.8
"""The rest is for saying so before Ray ends this process."""
_NUM_MISSES = 2
"""Looks in a row that find nothing of the system: one may fall into the moment in which Ray starts again."""


class Held(Protocol):
    """A system, from outside."""

    @property
    def address(self) -> str:
        """Of its cluster."""
        ...

    async def look(self) -> bool:
        """Whether its controller has a host. Raises ClusterUnavailable, within seconds."""
        ...


class ClusterWatch:
    """What looks at one system found, one after the other. `say` gets what is worth telling."""

    def __init__(self, address: str, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        """address: of the cluster. environment: this process's."""
        self._address, self._say = address, say
        limit = environment.get(LIMIT_VARIABLE, "")
        self._without_head_s = float(limit) if limit.isdecimal() else WITHOUT_HEAD_S
        self._lost_s: float | None = None
        self._num_misses = 0

    def __repr__(self) -> str:
        return f"ClusterWatch({self._address}{', which does not answer' * self.is_lost})"

    @property
    def is_lost(self) -> bool:
        """Whether the cluster did not answer when it was asked last."""
        return self._lost_s is not None

    def on_answer(self, now_s: float, *, is_held: bool) -> str:
        """Take that the cluster answered, and whether it has the system. Returns why it is over; empty: it
        is not."""
        if self._lost_s is not None:
            self._say(f"the Ray cluster answers again, after {format_seconds(now_s - self._lost_s)}")
            self._lost_s = None
        self._num_misses = 0 if is_held else self._num_misses + 1
        if self._num_misses < _NUM_MISSES:
            return ""
        return (
            f"the system is no longer on the Ray cluster at {self._address}: it was ended from elsewhere, or "
            "the cluster was started anew. Start it again with: headrace up --launcher ray CONFIG.yaml"
        )

    def on_silence(self, now_s: float, reason: str) -> str:
        """Take that the cluster did not answer. Returns why nobody waits any more; empty: somebody does."""
        self._num_misses = 0
        if self._lost_s is None:
            self._lost_s = now_s
            self._say(f"{reason}. What runs serves on for now, and it is tried again")
        silent_s = now_s - self._lost_s
        if silent_s < self._without_head_s * _SPEAKS_BEFORE_RATIO:
            return ""
        return (
            f"the Ray cluster at {self._address} has not answered for {format_seconds(silent_s)}. Without "
            f"its head Ray's nodes end after {format_seconds(self._without_head_s)}, and what runs on them. "
            "Start Ray and headrace again; if the head comes back in time and still knows its nodes, "
            "headrace status shows what runs"
        )


async def watch_cluster(system: Held, watch: ClusterWatch, clock: Clock) -> str:
    """Look at a system until it is over, or its cluster is; return why."""
    while True:
        try:
            over = watch.on_answer(clock.now_s(), is_held=await system.look())
        except ClusterUnavailable as error:
            over = watch.on_silence(clock.now_s(), str(error))
        if over:
            return over
        await asyncio.sleep(LOOK_PERIOD_S)
