"""The further hosts of a reservation, each with one process: ranks of a replica whose front is on the first.

Owns their start, and notices when one is lost, which loses all. They end with the reservation. Must not know:
Ray, or what the processes do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from headrace.api.messages import LauncherError, NodeNeeds, ProcessSpec, StartProcess
from headrace.clock import Clock
from headrace.fabric.cluster import Cluster, ClusterUnavailable, HostLost, HostSilent
from headrace.fabric.host_keys import further_keys
from headrace.fabric.host_messages import HostEvents, HostReport, Membership

POLL_S = 1.0
SILENT_AFTER_S = 2.0
LOST_AFTER_S = 10.0
"""As for the first host (`host_link`)."""
START_LIMIT_S = 60.0
COMMAND_LIMIT_S = 10.0


class RankHosts:
    """The hosts behind the first. `run` starts and watches them; without `start` before it, it takes those
    over that are there."""

    def __init__(self, key: str, cluster: Cluster, clock: Clock, on_lost: Callable[[str], None]) -> None:
        """key: the reservation's. on_lost: called once, with the reason, when one of them is no longer."""
        self._keys = further_keys(key)
        self._cluster = cluster
        self._clock = clock
        self._on_lost = on_lost
        self._specs: Sequence[ProcessSpec] = ()

    def __repr__(self) -> str:
        return f"RankHosts({self._keys})"

    async def start(
        self, specs: Sequence[ProcessSpec], needs: NodeNeeds | None, membership: Membership
    ) -> None:
        """Start as many hosts as there are specs; their processes follow in `run`. Raises
        ClusterUnavailable."""
        assert len(specs) == len(self._keys), f"{len(specs)} processes for {self._keys}"
        self._specs = specs
        for key in self._keys:
            await self._cluster.start_host(key, needs, membership)

    async def run(self) -> None:
        """Return once one is lost; never, if there are none to lose."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for rank, key in enumerate(self._keys, 1):
                    tasks.create_task(self._live(rank, key))
                await asyncio.Event().wait()
        except* (HostLost, ClusterUnavailable) as errors:
            self._on_lost(str(errors.exceptions[0]))

    async def _live(self, rank: int, key: str) -> None:
        try:
            report = await self._describe(key)
            if self._specs:
                message = msgspec.msgpack.encode(StartProcess(self._specs[rank - 1]))
                await self._cluster.call(key, "obey", message, limit_s=COMMAND_LIMIT_S)
            await self._follow(key, report.sequence)
        except (HostLost, HostSilent) as error:
            raise HostLost(f"the host of rank {rank} is lost: {error}") from error

    async def _describe(self, key: str) -> HostReport:
        answer = await self._cluster.call(key, "describe", limit_s=START_LIMIT_S)
        report = msgspec.msgpack.decode(answer, type=HostReport)
        if report.error:
            raise HostLost(f"node {report.node_id[:8]}: {report.error}")
        return report

    async def _follow(self, key: str, sequence: int) -> None:
        """Raise HostLost when it is; what its keeper starts again is not."""
        heard_s = self._clock.now_s()
        while True:
            try:
                answer = await self._cluster.call(key, "poll", sequence, POLL_S, limit_s=SILENT_AFTER_S)
            except HostSilent:
                silent_s = self._clock.now_s() - heard_s
                if silent_s >= LOST_AFTER_S:
                    raise HostLost(f"it has not answered for {silent_s:.0f} s") from None
                continue
            heard_s = self._clock.now_s()
            told = msgspec.msgpack.decode(answer, type=HostEvents)
            sequence = told.sequence
            for event in told.events:
                if isinstance(event, LauncherError):
                    raise HostLost(event.error)
