"""The further hosts of a reservation, each with one process: ranks of a replica whose front is on the first.

Owns their start, and notices when one is lost, which loses all. They end with the reservation. Must not know:
Ray, or what the processes do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
from headrace.fabric.host_keys import further_keys, group_of
from headrace.fabric.host_messages import (
    HostCommand,
    HostEvents,
    HostReport,
    Membership,
    SetTunnels,
    TunnelsOpened,
)
from headrace.fabric.host_routes import HostView
from headrace.fabric.silence import Silence
from headrace.fabric.surroundings import Surroundings

POLL_S = 1.0
SILENT_AFTER_S = 2.0
LOST_AFTER_S = 10.0
"""As for the first host (`host_link`)."""
START_LIMIT_S = 60.0
COMMAND_LIMIT_S = 10.0
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _RankHost:
    key: str
    rank: int
    node_id: str = ""
    address: str = ""
    """Empty until it was heard."""
    tunnels: str = ""
    """Address of its machine's tunnels, if its keeper holds them."""
    wished: SetTunnels = field(default_factory=lambda: SetTunnels([], {}))
    is_changed: asyncio.Event = field(default_factory=asyncio.Event)
    """It was not told yet what is wished."""
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
        surroundings: Surroundings,
        on_lost: Callable[[str], None],
    ) -> None:
        """key: the reservation's. on_lost: called once, with the reason, when one of them is no longer."""
        self._group = group_of(key)
        self._hosts = [_RankHost(each, rank) for rank, each in enumerate(further_keys(key), 1)]
        self._cluster = cluster
        self._clock = clock
        self._surroundings = surroundings
        self._on_lost = on_lost
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
        assert len(specs) == len(self._hosts), f"{len(specs)} processes for {self!r}"
        self._specs = specs
        for host in self._hosts:
            await self._cluster.start_host(host.key, needs, membership)

    def views(self) -> list[HostView]:
        """Those that were heard."""
        return [
            HostView(self._group, host.address, host.tunnels, host.rank)
            for host in self._hosts
            if host.address
        ]

    def set_tunnels(self, wishes: Mapping[str, SetTunnels]) -> None:
        """Tell each what its machine's tunnels are to do, by address, unless it was told the same."""
        for host in self._hosts:
            wished = wishes.get(host.address) or SetTunnels([], {})
            if wished != host.wished:
                host.wished = wished
                host.is_changed.set()

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
        telling = asyncio.create_task(self._tell(host))
        try:
            report = await self._describe(host)
            host.node_id, host.address, host.tunnels = report.node_id, report.address, report.tunnels
            self._surroundings.on_tunnels()
            if self._specs:
                await self._start_process(host, self._specs[host.rank - 1])
            await self._follow(host, report.sequence)
        except HostLost as error:
            if isinstance(error, HostUnavailable | HostGivenUp):  # Ray may take its node for alive yet
                self._surroundings.on_unavailable(host.node_id, host.address)
            raise HostLost(f"the host of rank {host.rank} is lost: {error}") from error
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    async def _tell(self, host: _RankHost) -> None:
        """Pass wishes on. Ends when the host does, which is noticed where it is polled."""
        while True:
            await host.is_changed.wait()
            host.is_changed.clear()
            try:
                await self._obey(host, host.wished)
            except HostSilent:
                host.is_changed.set()

    async def _obey(self, host: _RankHost, command: HostCommand) -> None:
        message = msgspec.msgpack.encode(command)
        await self._cluster.call(host.key, "obey", message, limit_s=COMMAND_LIMIT_S)

    async def _describe(self, host: _RankHost) -> HostReport:
        try:
            answer = await self._cluster.call(host.key, "describe", limit_s=START_LIMIT_S)
        except HostSilent as error:
            raise HostLost(str(error)) from None
        report = msgspec.msgpack.decode(answer, type=HostReport)
        if report.error:
            raise HostLost(f"node {report.node_id[:8]}: {report.error}")
        return report

    async def _start_process(self, host: _RankHost, spec: ProcessSpec) -> None:
        """Tell it to, again while it is silent: one that has heard of it twice starts it once."""
        heard_s = self._clock.now_s()
        while True:
            try:
                await self._obey(host, StartProcess(spec))
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
                if isinstance(event, TunnelsOpened):
                    self._note_tunnels(host, event)

    async def _note_silence(self, host: _RankHost, heard_s: float) -> None:
        """Take it that it did not answer, as for the first host. Raises HostGivenUp."""
        if host.silence is None:
            host.silence = Silence(heard_s, LOST_AFTER_S)
        host.silence.note_probe(await self._surroundings.can_reach(host.address))
        now_s = self._clock.now_s()
        if host.silence.is_given_up(now_s):
            raise HostGivenUp(f"it has not answered for {host.silence.lasts_s(now_s):.0f} s")

    def _note_tunnels(self, host: _RankHost, opened: TunnelsOpened) -> None:
        host.tunnels = opened.address
        if opened.error:
            _log.warning("%s: the host of rank %d: %s", self._group, host.rank, opened.error)
        self._surroundings.on_tunnels()


def _explain(host: _RankHost, now_s: float) -> str:
    assert host.silence is not None
    silent_s = host.silence.lasts_s(now_s)
    return f"the host of rank {host.rank} on node {host.node_id[:8]} has not answered for {silent_s:.1f} s"
