"""The front of one replica: puts its parts together, and starts, serves and drains.

Owns the process's life. Everything is built here, once.
Must not know how its parts do their work.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field

from headrace.api.messages import ReplicaSpec
from headrace.api.run_paths import peer_socket_path
from headrace.clock import Clock
from headrace.observability.front_metrics import FrontMetrics
from headrace.observability.line_log import BackgroundLog
from headrace.policy.resumption import Limits
from headrace.replica.answer import AnswerServices
from headrace.replica.departure import Departure
from headrace.replica.engine_client import EngineClient
from headrace.replica.engine_silence import EngineTimeLimits
from headrace.replica.engine_streams import EngineStreams
from headrace.replica.front_life import FrontLife, FrontParts
from headrace.replica.generation import Generator
from headrace.replica.http_messages import AnswerHeads, HttpLimits
from headrace.replica.http_server import HttpServer
from headrace.replica.ledger import Ledger
from headrace.replica.peer_link import PeerPool
from headrace.replica.peer_server import PeerServer
from headrace.replica.prefix_digest import PrefixDigest
from headrace.replica.report import Reporter
from headrace.replica.restart import RestartPolicy
from headrace.replica.resumption import StreamKeeper
from headrace.replica.routes import Routes
from headrace.replica.self_view import FrontTraits, SelfView, fingerprint_of, headers_of
from headrace.replica.served_models import ServedModels
from headrace.replica.standby import Standby

_ENGINE_STOP_S = 2.0
_LAST_REPORTS_S = 0.5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FrontLimits:
    """Time limits that tests shorten."""

    http: HttpLimits = field(default_factory=HttpLimits)
    engine: EngineTimeLimits = field(default_factory=EngineTimeLimits)


class Front:
    """One front process. `run` is its whole life."""

    def __init__(self, spec: ReplicaSpec, clock: Clock, limits: FrontLimits) -> None:
        self._spec = spec
        self._clock = clock
        self._metrics = FrontMetrics(spec.endpoint, spec.replica_id)
        self._access_log = BackgroundLog(sys.stderr.buffer, "access-log")
        self._digest = PrefixDigest()
        traits = FrontTraits(os.getpid(), int(clock.wall_s()))
        self.view = SelfView(spec, self, self._metrics, traits)
        self._reporter = Reporter(
            spec.report_sockets,
            self.view.make_report,
            self.view.report_interval_s,
            self._digest,
            self.view.follow,
        )
        self.ledger = Ledger(self._metrics, self._access_log, clock, self._reporter)
        self.engine = EngineClient(
            spec.engine,
            f"headrace: engine {spec.replica_id}",
            clock,
            self._reporter.notify,
            limits.engine,
            RestartPolicy(),
            self._digest,
            lambda: self.keeper.are_others_catching_up(),
        )
        self._peers = PeerPool(clock)
        limits_of_streams = Limits(spec.resume_attempts, spec.resume_limit_s)
        self.keeper: StreamKeeper = StreamKeeper(
            self.engine, self._peers, self.view.own_engine, limits_of_streams, self._metrics, clock
        )
        self.guests = PeerServer(self.engine, self.view.why_no_guest, self._reporter.notify, self._digest)
        streams = EngineStreams(self.engine, self.keeper, lambda: self._generator.num_preparing)
        self.standby = Standby(
            self.engine,
            streams,
            lambda: self._reporter.ask_release(self.view.next_sequence),
            self._reporter.is_released,
            self._reporter.notify,
        )
        self.departure = Departure(clock, self._reporter, streams, spec.handover_after_s, spec.drain_grace_s)
        services = AnswerServices(self.keeper, self.ledger, self._metrics)
        self._generator: Generator = Generator(
            ServedModels(spec.endpoint, spec.engine.lora),
            spec.max_open + spec.max_surplus,
            fingerprint_of(spec),
            services,
            self.engine,
            clock,
        )
        self._generator.may_hold = self.keeper.may_hold
        self._routes = Routes(self.view, self._generator, self._metrics, spec.needs_gateway)
        heads = AnswerHeads(headers_of(spec), clock.wall_s)
        self._server = HttpServer(self._routes.handle, limits.http, heads, clock)
        self._life = FrontLife(
            self,
            FrontParts(
                spec,
                clock,
                self.view,
                self._reporter,
                self.departure,
                self._generator,
                self._server,
                self._access_log,
                self._digest,
            ),
        )

    def __repr__(self) -> str:
        return f"Front({self.view!r})"

    def has_model(self) -> bool:
        """Whether text can become tokens and back."""
        return self._generator.has_model()

    def on_notice(self, left_s: float) -> None:
        """Its machine goes away in so many seconds: leave."""
        self._life.on_notice(left_s)

    # ---- life

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT and drained; return the exit status."""
        return await self._life.run()

    async def listen(self) -> None:
        """Offer the engine to siblings. Without this socket they go elsewhere."""
        spec = self._spec
        if spec.needs_gateway and not (self.view.socket_path or spec.identity):
            # Nobody could be served: without the socket there is no telling a gateway from anybody else.
            raise OSError(f"cannot listen on a UNIX socket in {spec.run_dir}")
        path = peer_socket_path(spec.run_dir, spec.replica_id)
        if not path:
            return
        try:
            await self.guests.listen(path)
        except OSError as error:
            _log.warning("cannot listen on %s: %s; this engine takes no guests", path, error)
        else:
            self.view.peer_path = path

    def start(self) -> None:
        self.engine.start()

    def fail_text(self, reason: str) -> None:
        self.engine.fail(reason)

    async def leave(self) -> None:
        """Be released, hand over what stays open, free the engine, relay to the end."""
        departure = self.departure
        await self.standby.stop()
        self._reporter.ask_release(self.view.next_sequence)  # a release from an earlier sleep does not count
        await departure.wait_for_release()
        self._generator.is_closed = True
        self._server.close_idle()
        if await departure.free_engine():
            # Its memory is free from here on; what siblings continue goes on through this front.
            await self.engine.stop(_ENGINE_STOP_S)
            await departure.wait_for_streams(lambda: self.ledger.num_open)
        self._generator.fail_open()
        await departure.wait_for_last(lambda: self.ledger.num_open == 0, _ENGINE_STOP_S)
        self.guests.close()
        self.keeper.close()
        self._peers.close()
        await self.engine.stop(_ENGINE_STOP_S)
        await self._life.end(_LAST_REPORTS_S)
