"""The further hosts of a reservation, each with one process: ranks of a replica whose front is on the first.

Owns their start, and notices when one is lost, which loses all. They end with the reservation. Must not know:
Ray, or what the processes do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from headrace.api.messages import LauncherError, NodeNeeds, ProcessSpec, ProcessStarted, StartProcess
from headrace.clock import Clock
from headrace.fabric.cluster import (
    Cluster,
    ClusterUnavailable,
    HostGivenUp,
    HostLost,
    HostSilent,
    HostUnavailable,
)
from headrace.fabric.host_keys import further_keys
from headrace.fabric.host_messages import HostEvents, HostReport, Membership
from headrace.fabric.silence import Silence

POLL_S = 1.0
SILENT_AFTER_S = 2.0
LOST_AFTER_S = 10.0
"""As for the first host (`host_link`)."""
START_LIMIT_S = 60.0
COMMAND_LIMIT_S = 10.0


@dataclass(slots=True)
class _RankHost:
    """What is known of one."""

    rank: int
    key: str
    node_id: str = ""
    address: str = ""
    silence: Silence | None = None
    """None: it answered when it was asked last."""


class RankHosts:
    """The hosts behind the first. `run` starts and watches them; without `start` before it, it takes those
    over that are there."""

    def __init__(
        self,
        key: str,
        cluster: Cluster,
        clock: Clock,
        on_lost: Callable[[str], None],
        can_reach: Callable[[str], Awaitable[bool]],
        on_unavailable: Callable[[str, str], None],
    ) -> None:
        """key: the reservation's. on_lost: called once, with the reason, when one of them is no longer.
        can_reach, on_unavailable: as in `host_link.Surroundings`."""
        self._hosts = [_RankHost(rank, each) for rank, each in enumerate(further_keys(key), 1)]
        self._cluster = cluster
        self._clock = clock
        self._on_lost = on_lost
        self._can_reach = can_reach
        self._on_unavailable = on_unavailable
        self._specs: Sequence[ProcessSpec] = ()

    def __repr__(self) -> str:
        return f"RankHosts({len(self._hosts)}, {self.explain_silence() or 'none is silent'})"

    def silent_nodes(self) -> set[str]:
        """Return the nodes of those that do not answer."""
        return {host.node_id for host in self._hosts if host.silence is not None}

    def explain_silence(self) -> str:
        """Return for how long one has not answered; empty: all do."""
        now_s = self._clock.now_s()
        silent = (host for host in self._hosts if host.silence is not None)
        return next((_explain(host, now_s) for host in silent), "")

    async def start(
        self, specs: Sequence[ProcessSpec], needs: NodeNeeds | None, membership: Membership
    ) -> None:
        """Start as many hosts as there are specs; their processes follow in `run`. Raises
        ClusterUnavailable."""
        assert len(specs) == len(self._hosts), f"{len(specs)} processes for {self._hosts}"
        self._specs = specs
        for host in self._hosts:
            await self._cluster.start_host(host.key, needs, membership)

    async def run(self) -> None:
        """Return once one is lost; never, if there are none to lose."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for host in self._hosts:
                    tasks.create_task(self._live(host))
                await asyncio.Event().wait()
        except* (HostLost, ClusterUnavailable) as errors:
            self._on_lost(str(errors.exceptions[0]))

    async def _live(self, host: _RankHost) -> None:
        try:
            report = await self._describe(host)
            if self._specs:
                await self._start_process(host, self._specs[host.rank - 1])
            await self._follow(host, report.sequence)
        except HostLost as error:
            if isinstance(error, HostUnavailable | HostGivenUp) and host.address:
                self._on_unavailable(host.node_id, host.address)
            raise HostLost(f"the host of rank {host.rank} is lost: {error}") from error

    async def _describe(self, host: _RankHost) -> HostReport:
        try:
            answer = await self._cluster.call(host.key, "describe", limit_s=START_LIMIT_S)
        except HostSilent as error:
            raise HostLost(str(error)) from None
        report = msgspec.msgpack.decode(answer, type=HostReport)
        if report.error:
            raise HostLost(f"node {report.node_id[:8]}: {report.error}")
        host.node_id, host.address = report.node_id, report.address
        return report

    async def _start_process(self, host: _RankHost, spec: ProcessSpec) -> None:
        """Tell it to, again while it is silent: one that has heard of it twice starts it once."""
        command = msgspec.msgpack.encode(StartProcess(spec))
        heard_s = self._clock.now_s()
        while True:
            try:
                await self._cluster.call(host.key, "obey", command, limit_s=COMMAND_LIMIT_S)
            except HostSilent:
                await self._note_silence(host, heard_s)
            else:
                return

    async def _follow(self, host: _RankHost, sequence: int) -> None:
        """Raise HostLost when it is; what its keeper starts again is not."""
        has_started = not self._specs
        heard_s = self._clock.now_s()
        while True:
            try:
                answer = await self._cluster.call(host.key, "poll", sequence, POLL_S, limit_s=SILENT_AFTER_S)
            except HostSilent:
                await self._note_silence(host, heard_s)
                continue
            host.silence, heard_s = None, self._clock.now_s()
            told = msgspec.msgpack.decode(answer, type=HostEvents)
            sequence = told.sequence
            for event in told.events:
                has_started |= isinstance(event, ProcessStarted)
                if isinstance(event, LauncherError) and not has_started:
                    raise HostLost(event.error)

    async def _note_silence(self, host: _RankHost, heard_s: float) -> None:
        """Take it that it did not answer, as for the first host. Raises HostGivenUp."""
        if host.silence is None:
            host.silence = Silence(heard_s, LOST_AFTER_S)
        host.silence.note_probe(await self._can_reach(host.address))
        now_s = self._clock.now_s()
        if host.silence.is_given_up(now_s):
            raise HostGivenUp(f"it has not answered for {host.silence.lasts_s(now_s):.0f} s")


def _explain(host: _RankHost, now_s: float) -> str:
    assert host.silence is not None
    silent_s = host.silence.lasts_s(now_s)
    return f"the host of rank {host.rank} on node {host.node_id[:8]} has not answered for {silent_s:.1f} s"
