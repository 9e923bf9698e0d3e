"""A durable front: a front apart from engines. Puts its parts together, and starts, serves and drains.

Owns the process's life: a replica's front is `headrace.replica.front`.
Must not know how its parts do their work.
"""

from __future__ import annotations

import os
import sys

from headrace.api.messages import LeaveBy, ReplicaSpec, SetSleep, Siblings
from headrace.clock import Clock
from headrace.observability.front_metrics import FrontMetrics
from headrace.observability.line_log import BackgroundLog
from headrace.policy.resumption import Limits
from headrace.replica.answer import AnswerServices
from headrace.replica.departure import Departure
from headrace.replica.durable_view import DurableView
from headrace.replica.front_life import LAST_MOMENTS_S, FrontLife, FrontParts
from headrace.replica.generation import Generator
from headrace.replica.http_messages import AnswerHeads, HttpLimits
from headrace.replica.http_server import HttpServer
from headrace.replica.ledger import Ledger
from headrace.replica.local_siblings import local_siblings
from headrace.replica.peer_link import PeerPool
from headrace.replica.remote_engine import NoEngine, RemoteEngine, no_own_engine
from headrace.replica.report import Reporter
from headrace.replica.resumption import StreamKeeper
from headrace.replica.routes import Routes
from headrace.replica.self_view import FrontTraits, fingerprint_of, headers_of
from headrace.replica.served_models import ServedModels


class DurableFront:
    """One durable front's process. `run` is its whole life."""

    def __init__(self, spec: ReplicaSpec, clock: Clock, limits: HttpLimits) -> None:
        self._spec = spec
        self._clock = clock
        self._metrics = FrontMetrics(spec.endpoint, spec.replica_id)
        self._access_log = BackgroundLog(sys.stderr.buffer, "access-log")
        traits = FrontTraits(os.getpid(), int(clock.wall_s()))
        self.view = DurableView(spec, self, self._metrics, clock, traits)
        self._reporter = Reporter(
            spec.report_sockets, self.view.make_report, self.view.report_interval_s, on_order=self._on_order
        )
        self.ledger = Ledger(self._metrics, self._access_log, clock, self._reporter)
        self._peers = PeerPool(clock)
        no_engine = NoEngine()
        self.keeper = StreamKeeper(
            no_engine,
            self._peers,
            no_own_engine,
            Limits(spec.resume_attempts, spec.resume_limit_s),
            self._metrics,
            clock,
        )
        self.engine = RemoteEngine(spec.engine, self.keeper)
        self.departure = Departure(clock, self._reporter, no_engine, 0.0, spec.drain_grace_s)
        services = AnswerServices(self.engine, self.ledger, self._metrics)
        self._generator = Generator(
            ServedModels(spec.endpoint, spec.engine.lora),
            spec.max_open,
            fingerprint_of(spec),
            services,
            self.engine,
            clock,
        )
        self._generator.remote = self.engine
        self._routes = Routes(self.view, self._generator, self._metrics, spec.needs_gateway)
        heads = AnswerHeads(headers_of(spec), clock.wall_s)
        self._server = HttpServer(self._routes.handle, limits, heads, clock)
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
                None,
            ),
        )

    def __repr__(self) -> str:
        return f"DurableFront({self.view!r})"

    def has_model(self) -> bool:
        """Whether text can become tokens and back."""
        return self._generator.has_model()

    def _on_order(self, order: SetSleep | Siblings | LeaveBy) -> None:
        if isinstance(order, Siblings):  # there is nothing here that could sleep
            self.engine.set_siblings(local_siblings(order.siblings, self._spec.run_dir))
        elif isinstance(order, LeaveBy):
            self._life.on_notice(order.left_s)

    # ---- life

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT and drained; return the exit status."""
        return await self._life.run()

    async def listen(self) -> None:
        spec = self._spec
        if spec.needs_gateway and not self.view.socket_path:  # its gateway is on this machine
            raise OSError(f"cannot listen on a UNIX socket in {spec.run_dir}")

    def start(self) -> None:
        """Nothing: there is no engine."""

    def fail_text(self, reason: str) -> None:
        self.view.error = reason

    async def leave(self) -> None:
        """Be released, let the streams end within the grace."""
        departure = self.departure
        self._reporter.ask_release(self.view.next_sequence)
        await departure.wait_for_release()
        self._generator.is_closed = True
        self._server.close_idle()
        await departure.wait_for_streams(lambda: self.ledger.num_open)
        self._generator.fail_open()
        await departure.wait_for_last(lambda: self.ledger.num_open == 0, LAST_MOMENTS_S)
        self.keeper.close()
        self._peers.close()
        await self._life.end(LAST_MOMENTS_S)
