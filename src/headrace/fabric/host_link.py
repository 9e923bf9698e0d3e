"""One group of processes on a cluster, from the launcher's side: its place, its host, its events.

Owns the group's course: reserve a place, start the host, pass commands on, follow what happens, give the
place back. Must not know: Ray, or what the processes do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

import msgspec

import headrace
from headrace.api.messages import (
    LauncherError,
    LauncherEvent,
    NodeNeeds,
    Place,
    ProcessEnded,
    ProcessSpec,
    ProcessStarted,
    ProcessState,
    ProcessWaiting,
    StartProcess,
    StopProcess,
)
from headrace.clock import Clock
from headrace.fabric.cluster import (
    Cluster,
    ClusterUnavailable,
    HostGivenUp,
    HostLost,
    HostSilent,
    HostUnavailable,
)
from headrace.fabric.host_keys import group_of
from headrace.fabric.host_messages import (
    HostCommand,
    HostEvent,
    HostEvents,
    HostReport,
    SetTunnels,
    TunnelsOpened,
)
from headrace.fabric.host_routes import HostView
from headrace.fabric.place_search import WAITING_PERIOD_S, PlaceSearch, Seeker
from headrace.fabric.rank_hosts import RankHosts
from headrace.fabric.silence import Silence
from headrace.fabric.surroundings import Surroundings

POLL_S = 1.0
"""A host answers a poll after this long when nothing happens."""
SILENT_AFTER_S = 2.0
"""A host that has not answered a poll for so long is told of as silent. Its process may live on: it is not
ended yet, and routers leave it alone by themselves when its load reports stay away."""
LOST_AFTER_S = 10.0
"""A host that is silent for so long is given up, unless it came back (`Silence`)."""
HOST_START_LIMIT_S = 60.0
"""Ray starts a Python process and imports headrace; the first time on a node, from a cold disk."""
COMMAND_LIMIT_S = 10.0
RANK_LOSS_GRACE_S = 10.0
"""A replica that lost a rank's host cannot compute again; its streams may go on elsewhere for so long."""
_log = logging.getLogger(__name__)


class HostLink:
    """One group. `run` is its whole life; `on_event` gets what happens to its processes."""

    def __init__(
        self,
        key: str,
        cluster: Cluster,
        clock: Clock,
        on_event: Callable[[LauncherEvent], None],
        surroundings: Surroundings,
    ) -> None:
        self.key = key
        self.node_id = ""
        self.processes: dict[str, ProcessState] = {}
        """Started and not ended."""
        self.is_released = True
        """False after its end: its place could not be given back."""
        self.is_silent = False
        """It did not answer when it was polled last."""
        self.was_given_up = False
        """It ended, and what it held may live on: its place is still to be given back."""
        self.is_over = False
        """Nothing can be started here any more."""
        self.address = ""
        """Of its node; empty until its host was heard."""
        self.is_unheard = False
        """It was taken over, and has not said a word yet."""
        self.tunnels = ""
        """Address of its machine's tunnels, if its keeper holds them."""
        self._wished: SetTunnels | None = None
        self._is_wish_queued = False
        """The newest wish is the one that is sent."""
        self._waiting: dict[str, StartProcess] = {}
        """Told to start, not heard of."""
        self._cluster = cluster
        self._clock = clock
        self._on_event = on_event
        self._surroundings = surroundings
        self._commands: asyncio.Queue[HostCommand] = asyncio.Queue()  # bounded by who may be named in it
        self._search: PlaceSearch | None = None
        self._sequence = 0
        self._ranks = RankHosts(key, cluster, clock, surroundings, self._lose_rank)
        self._lost_rank = ""
        """Why a rank was lost, and with it everything here."""

    def __repr__(self) -> str:
        return f"HostLink({self.key}, {', '.join(self.names()) or 'empty'})"

    @property
    def liked_node_id(self) -> str:
        """Where its place was asked for, if not anywhere."""
        return self._search.liked_node_id if self._search else ""

    @property
    def group(self) -> str:
        return group_of(self.key)

    def silent_nodes(self) -> set[str]:
        """Return the nodes of its hosts that do not answer."""
        return self._ranks.silent_nodes() | ({self.node_id} if self.is_silent else set())

    def names(self) -> list[str]:
        return [*self.processes, *self._waiting]

    # ---- what is asked ----------------

    def start(self, spec: ProcessSpec) -> None:
        """Start a process of a name that none here has."""
        self._waiting[spec.name] = StartProcess(spec)
        self._commands.put_nowait(self._waiting[spec.name])

    def stop(self, name: str, grace_s: float) -> None:
        """Stop a process of this group. One that has no place yet simply is not started."""
        if self.node_id:
            self._commands.put_nowait(StopProcess(name, grace_s))
        elif self._waiting.pop(name, None) is not None:
            self._on_event(ProcessEnded(ProcessState(name, 0, False, last_output="it never had a place")))

    def views(self) -> list[HostView]:
        """What is known of its hosts, further ones of ranks included; those that were not heard are not."""
        if not self.address:
            return []
        return [HostView(self.group, self.address, self.tunnels), *self._ranks.views()]

    def set_tunnels(self, wishes: Mapping[str, SetTunnels]) -> None:
        """Tell its hosts what their machines' tunnels are to do, by address, unless they know."""
        self._ranks.set_tunnels(wishes)
        wished = wishes.get(self.address) or SetTunnels([], {})
        if self.address and wished != (self._wished or SetTunnels([], {})):
            self._wished = wished
            if not self._is_wish_queued:
                self._is_wish_queued = True
                self._commands.put_nowait(wished)

    # ---- its life ----------------

    async def adopt(self) -> None:
        """Take over a host that an earlier controller started. Raises HostLost or HostSilent."""
        report = await self._describe(COMMAND_LIMIT_S / 2)
        self._take(report)

    def assume(self) -> None:
        """Take it over unheard: it is silent now, and may hold what its group is named after."""
        self.processes[self.group] = ProcessState(self.group, 0, is_alive=True)
        self.is_unheard = True

    async def run(self, *, is_adopted: bool = False) -> None:
        """Live until no process is left, or the host is lost. Its place is given back, unless it
        `was_given_up`."""
        reason = "the launcher was closed"
        try:
            if not is_adopted and not await self._begin():
                return
            await self._follow()
            reason = ""
        except (HostLost, ClusterUnavailable) as error:
            reason = str(error)
            self.was_given_up = isinstance(error, HostGivenUp)
            if isinstance(error, HostUnavailable):
                self._surroundings.on_unavailable(self.node_id, self.address)
        finally:
            self.is_over = True
            if reason != "the launcher was closed":
                self._end_all(reason)
                if not self.was_given_up:
                    await self._give_back()

    async def _give_back(self) -> None:
        try:
            await self._cluster.release(self.key)
        except ClusterUnavailable:
            self.is_released = False

    async def _begin(self) -> bool:
        """Get a place and start the host there. False: nobody wants it any more."""
        if not self._waiting:
            return False  # it was stopped before its turn came
        spec = next(iter(self._waiting.values())).spec
        place = spec.place
        needs: NodeNeeds | None = None
        if place is not None:
            needs = await self._find_place(place)
            if needs is None:
                return False
        self.node_id = self.node_id or self._cluster.own_node_id
        await self._cluster.start_host(self.key, needs, self._surroundings.membership)
        await self._ranks.start(spec.companions, needs, self._surroundings.membership)
        self._take(await self._await_host())
        return True

    async def _await_host(self) -> HostReport:
        """Return the host's first word, and say meanwhile that it starts."""
        describing = asyncio.create_task(self._describe(HOST_START_LIMIT_S))
        try:
            while not (await asyncio.wait([describing], timeout=WAITING_PERIOD_S))[0]:
                self._tell_waiting(f"its host actor starts on node {self.node_id[:8]}")
            return describing.result()
        finally:
            describing.cancel()

    async def _find_place(self, place: Place) -> NodeNeeds | None:
        """Return what was had of `place`. None: nobody wants it any more."""
        around = self._surroundings
        seeker = Seeker(
            self.key,
            lambda: bool(self._waiting),
            lambda: around.count_family(self.group),
            lambda: around.count_asked(self.group),
            around.silent_nodes,
            self._tell_waiting,
        )
        self._search = PlaceSearch(seeker, self._cluster, self._clock, place)
        needs = await self._search.run()
        self.node_id = self._search.node_id
        return needs

    async def _describe(self, limit_s: float) -> HostReport:
        try:
            answer = await self._cluster.call(self.key, "describe", limit_s=limit_s)
        except HostSilent as error:
            raise HostLost(f"its host did not start within {limit_s:.0f} s: {error}") from None
        report = msgspec.msgpack.decode(answer, type=HostReport)
        if report.error:
            raise HostLost(f"node {report.node_id[:8]}: {report.error}")
        if report.version != headrace.__version__:
            raise HostLost(
                f"node {report.node_id[:8]} has headrace {report.version}, and the controller has "
                f"{headrace.__version__}; install the same version on all nodes"
            )
        return report

    def _take(self, report: HostReport) -> None:
        self.node_id = report.node_id
        self._sequence = report.sequence
        self._locate(report)
        self.processes = {state.name: self._located(state) for state in report.processes}

    def _locate(self, report: HostReport) -> None:
        self.address, self.tunnels, self.is_unheard = report.address, report.tunnels, False
        self._surroundings.on_tunnels()

    async def _follow(self) -> None:
        """Pass commands on and follow events until no process is left."""
        sender = asyncio.create_task(self._send_commands())
        watcher = asyncio.create_task(self._ranks.run())
        try:
            silence = Silence(self._clock.now_s(), LOST_AFTER_S)
            while self.processes or self._waiting:
                try:
                    await self._poll()
                    self.is_silent = False
                    silence = Silence(self._clock.now_s(), LOST_AFTER_S)
                    if said := self._ranks.explain_silence():
                        self._tell_waiting(said)
                except HostSilent:
                    self.is_silent = True
                    silence.note_probe(await self._surroundings.can_reach(self.address))
                    silent_s = silence.lasts_s(self._clock.now_s())
                    if silence.is_given_up(self._clock.now_s()):
                        raise HostGivenUp(f"{self._where()} has not answered for {silent_s:.0f} s") from None
                    self._tell_waiting(f"{self._where()} has not answered for {silent_s:.1f} s")
                for task in (sender, watcher):
                    if task.done():
                        task.result()
            self.is_over = True  # at once: what is to start from now on gets a place of its own
        finally:
            sender.cancel()
            watcher.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)

    async def _poll(self) -> None:
        answer = await self._cluster.call(self.key, "poll", self._sequence, POLL_S, limit_s=SILENT_AFTER_S)
        told = msgspec.msgpack.decode(answer, type=HostEvents)
        self._sequence = told.sequence
        for event in told.events:
            self._pass_on(event)
        if self.is_unheard:
            self._locate(await self._describe(COMMAND_LIMIT_S / 2))

    async def _send_commands(self) -> None:
        while True:
            command = await self._commands.get()
            if isinstance(command, StartProcess) and command.spec.name not in self._waiting:
                continue  # it was stopped before it had a place
            if isinstance(command, SetTunnels) and self._wished is not None:
                command, self._is_wish_queued = self._wished, False
            message = msgspec.msgpack.encode(command)
            while True:
                with contextlib.suppress(HostSilent):  # it is polled as well, and given up if it stays silent
                    await self._cluster.call(self.key, "obey", message, limit_s=COMMAND_LIMIT_S)
                    break

    # ---- what happens ----------------

    def _pass_on(self, event: HostEvent) -> None:
        match event:
            case ProcessStarted(state):
                self._waiting.pop(state.name, None)
                self.processes[state.name] = self._located(state)
                self._on_event(ProcessStarted(self.processes[state.name]))
            case ProcessEnded(state):
                self.processes.pop(state.name, None)
                if self._lost_rank:
                    state = msgspec.structs.replace(state, last_output=self._lost_rank)
                self._on_event(ProcessEnded(self._located(state)))
            case LauncherError(name):
                if name not in self.processes:
                    self._waiting.pop(name, None)
                self._on_event(event)
            case TunnelsOpened(address, error):
                self.tunnels = address
                if error:
                    _log.warning("%s: %s", self._where(), error)
                self._surroundings.on_tunnels()
            case _:
                pass

    def _lose_rank(self, reason: str) -> None:
        """What it computed with is gone for good: end all, with a moment to hand open streams over."""
        self._lost_rank = reason
        _log.warning("%s: %s; it ends", self.group, reason)
        self._tell_waiting(f"{reason}; it ends")
        for name in self.names():
            self.stop(name, RANK_LOSS_GRACE_S)

    def _end_all(self, reason: str) -> None:
        """The host is gone, and its processes with it."""
        for state in self.processes.values():
            ended = ProcessState(state.name, state.pid, False, None, reason, self.node_id)
            self._on_event(ProcessEnded(ended))
        for name in self._waiting:
            self._on_event(LauncherError(name, reason))
        self.processes.clear()
        self._waiting.clear()

    def _tell_waiting(self, reason: str) -> None:
        for name in self.names():
            self._on_event(ProcessWaiting(name, reason))

    def _located(self, state: ProcessState) -> ProcessState:
        return msgspec.structs.replace(state, node=self.node_id, node_address=self.address)

    def _where(self) -> str:
        return f"its host on node {self.node_id[:8]}"
