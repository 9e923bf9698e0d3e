"""The front of a simulated replica: the real engine client, stream keeper, guests, standby and departure.

Stands for `replica.front`. Must not know what gateways decide.
"""

from __future__ import annotations

from headrace.api.messages import GenerationRequest, LeaveBy, ReplicaSpec, SetSleep, Siblings
from headrace.api.run_paths import CONTROLLER_SOCKET, front_socket_path, peer_socket_path
from headrace.policy.resumption import Limits
from headrace.replica.departure import Departure
from headrace.replica.engine_streams import EngineStreams
from headrace.replica.peer_link import PeerPool
from headrace.replica.peer_server import PeerServer
from headrace.replica.prefix_digest import PrefixDigest
from headrace.replica.prompt_caching import PromptCaching
from headrace.replica.resumption import StreamKeeper
from headrace.replica.self_view import FrontTraits, SelfView
from headrace.replica.standby import Standby
from headrace.sim.engine_link import EngineLink
from headrace.sim.engines import EngineBehaviour
from headrace.sim.front_base import LAST_REPORTS_S, ServingFront
from headrace.sim.machine import Host, Registry
from headrace.sim.network import End, Weather
from headrace.sim.process_loop import Pipe
from headrace.sim.reporting import ReportSink
from headrace.sim.streams import FrontStream

ENGINE_STOP_S = 2.0


class FrontProcess(ServingFront):
    """One front process, started with the spec that the controller made."""

    def __init__(
        self,
        registry: Registry,
        host: Host,
        spec: ReplicaSpec,
        weather: Weather,
        behaviour: EngineBehaviour,
        busy_interval_s: float,
    ) -> None:
        super().__init__(registry, host, spec, weather)
        traits = FrontTraits(self.pid, 0, speaks_h2=False, busy_interval_s=busy_interval_s)
        self.view = SelfView(spec, self, self.metrics, traits)
        self.digest = PrefixDigest()
        self.caching = PromptCaching(spec.endpoint, self.digest)
        self.engine = EngineLink(
            self,
            weather,
            spec.engine,
            behaviour,
            self.digest,
            self.reporter.notify,
            lambda: self.keeper.are_others_catching_up(),
        )
        self.peers = PeerPool(host)
        limits = Limits(spec.resume_attempts, spec.resume_limit_s)
        self.keeper: StreamKeeper = StreamKeeper(
            self.engine, self.peers, self.view.own_engine, limits, self.metrics, host
        )
        self.guests = PeerServer(self.engine, self.view.why_no_guest, self.reporter.notify, self.digest)
        streams = EngineStreams(self.engine, self.keeper, lambda: 0)
        self.standby = Standby(
            self.engine,
            streams,
            lambda: self.reporter.ask_release(self.view.next_sequence),
            self.reporter.is_released,
            self.reporter.notify,
        )
        self.departure = Departure(host, self.reporter, streams, spec.handover_after_s, spec.drain_grace_s)
        self.refuses_until_s = 0.0
        """It refuses what comes until then, as one does that takes its leaving siblings for better places."""
        self.sleep_wish = 0
        """What the controller or the user asked for last."""

    def begin(self) -> None:
        """What the program does first."""
        self.after(self.random.uniform(0.1, 0.6), self._listen, "front start")

    def _listen(self) -> None:
        view, spec = self.view, self.spec
        view.address = f"127.0.0.1:{20_000 + self.pid}"
        view.socket_path = front_socket_path(spec.run_dir, spec.replica_id)
        view.peer_path = peer_socket_path(spec.run_dir, spec.replica_id)
        self.listen(view.socket_path)
        self.listen(view.peer_path)
        self.guests.beat()
        for path in spec.report_sockets:
            digest = None if path.endswith(CONTROLLER_SOCKET) else self.digest
            sink = ReportSink(self, self.weather, path, view.make_report, view.report_interval_s, digest)
            sink.on_message = self._on_order
            self.reporter.sinks.append(sink)
        self.engine.start()
        self.after(self.random.uniform(0.05, 0.5), self._load_model, "front start")

    # ---- what others ask

    def accept(self, address: str, connection: object) -> None:
        assert isinstance(connection, End)
        if address == self.view.peer_path:
            Pipe(connection, self.guests.make_connection())
        else:
            connection.on_message = lambda message: self._on_request(message, connection)

    def set_sleep(self, level: int) -> None:
        """Wish for a depth of sleep."""
        self.sleep_wish = level
        self.standby.set_level(level)

    def _on_order(self, order: object) -> None:
        """The controller speaks on the connection of the reports."""
        if isinstance(order, SetSleep):
            self.set_sleep(order.level)
        elif isinstance(order, Siblings | LeaveBy):
            self.view.follow(order)

    # ---- requests

    def _submit(self, generation: GenerationRequest, stream: FrontStream) -> None:
        self.keeper.submit(generation, stream)

    def _why_refused(self) -> str:
        if self.timeline.now_s < self.refuses_until_s:
            return "this replica is leaving"
        if self.has_failed_open or (self.is_closed and not self.keeper.may_hold(True)):
            return "this replica is leaving"
        can_wait = self.is_closed or self.keeper.may_hold(False)
        if not (self.engine.state == "ready" or can_wait) or not self._has_model:
            return f"the engine is {self.engine.state}"
        if self.ledger.num_open > self.spec.max_open + self.spec.max_surplus:
            return "too many are open"
        return ""

    # ---- the end

    @property
    def is_listening(self) -> bool:
        return bool(self.view.address)

    async def _leave(self) -> None:
        """Be released, hand over what stays open, free the engine, relay to the end, exit."""
        departure = self.departure
        await self.standby.stop()
        self.reporter.ask_release(self.view.next_sequence)
        await departure.wait_for_release()
        self.is_closed = True
        if await departure.free_engine():
            await self.engine.stop(ENGINE_STOP_S)
            await departure.wait_for_streams(lambda: self.ledger.num_open)
        self._fail_open()
        self.guests.close()
        self.keeper.close()
        self.peers.close()
        await self.engine.stop(ENGINE_STOP_S)
        await self._wait_until(self.reporter.has_told_all, LAST_REPORTS_S)
        self.exit(0)

    def died(self, code: int) -> None:
        """Its engine dies with it."""
        engine = self.engine.child
        if engine is not None:
            engine.kill()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every request is counted, and is where it is said to be."""
        self.view.check_integrity()
        super().check_integrity()
