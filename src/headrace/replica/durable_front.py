"""A durable front: a front apart from engines. Puts its parts together, and starts, serves and drains.

Owns the process's life and what it says about itself: a replica's front is `headrace.replica.front`.
Must not know how its parts do their work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys

from headrace.api.messages import FinishedRequest, LoadReport, ReplicaSpec, ReplicaState, SetSleep, Siblings
from headrace.api.openai import ModelCard
from headrace.api.run_paths import front_socket_path
from headrace.clock import Clock
from headrace.errors import ConfigError, ModelError
from headrace.observability.front_metrics import FrontMetrics
from headrace.observability.line_log import BackgroundLog
from headrace.policy.resumption import Limits
from headrace.replica.answer import AnswerServices
from headrace.replica.departure import Departure
from headrace.replica.generation import Generator
from headrace.replica.grammar_checker import GrammarChecker
from headrace.replica.http_messages import AnswerHeads, HttpLimits
from headrace.replica.http_server import HttpServer
from headrace.replica.ledger import Ledger
from headrace.replica.local_siblings import local_siblings
from headrace.replica.notice import NoticeWatcher
from headrace.replica.notice_url import notice_sources
from headrace.replica.peer_link import PeerPool
from headrace.replica.prefix_digest import PrefixNews
from headrace.replica.prompt_caching import PromptCaching, shared_prefix_tokens
from headrace.replica.remote_engine import NoEngine, RemoteEngine, no_own_engine
from headrace.replica.report import BUSY_INTERVAL_S, Reporter
from headrace.replica.resumption import StreamKeeper
from headrace.replica.routes import Routes
from headrace.replica.self_view import fingerprint_of, headers_of
from headrace.replica.served_models import ServedModels
from headrace.replica.stream_class import text_class_of
from headrace.replica.text_model import PromptEncoder, load_text_model

_LAST_MOMENTS_S = 2.0
"""For ending what a drain left, and for the last reports."""
_log = logging.getLogger(__name__)


class DurableFront:
    """One durable front's process. `run` is its whole life."""

    def __init__(self, spec: ReplicaSpec, clock: Clock, limits: HttpLimits) -> None:
        self._spec = spec
        self._clock = clock
        is_simulated = spec.engine.kind == "simulated"
        self._metrics = FrontMetrics(spec.endpoint, spec.replica_id)
        self._access_log = BackgroundLog(sys.stderr.buffer, "access-log")
        self._reporter = Reporter(
            spec.report_sockets, self._make_report, self._report_interval_s, on_order=self._on_order
        )
        self._ledger = Ledger(self._metrics, self._access_log, clock, self._reporter)
        self._peers = PeerPool(clock)
        no_engine = NoEngine()
        self._keeper = StreamKeeper(
            no_engine,
            self._peers,
            no_own_engine,
            Limits(spec.resume_attempts, spec.resume_limit_s),
            self._metrics,
            clock,
        )
        self._engine = RemoteEngine(spec.engine, self._keeper)
        self._departure = Departure(clock, self._reporter, no_engine, 0.0, spec.drain_grace_s)
        services = AnswerServices(self._engine, self._ledger, self._metrics)
        self._generator = Generator(
            ServedModels(spec.endpoint, spec.engine.lora),
            spec.max_open,
            fingerprint_of(spec),
            services,
            self._engine,
            clock,
        )
        self._generator.remote = self._engine
        self._routes = Routes(self, self._generator, self._metrics, spec.needs_gateway)
        heads = AnswerHeads(headers_of(spec), clock.wall_s)
        self._server = HttpServer(self._routes.handle, limits, heads, clock)
        self._encoder: PromptEncoder | None = None
        self._grammars = None if is_simulated else GrammarChecker(f"headrace: grammars {spec.replica_id}")
        self._address = self._socket_path = self._error = ""
        self._created = int(clock.wall_s())
        self._sequence = 0
        self._stop_requested = asyncio.Event()

    def __repr__(self) -> str:
        return f"DurableFront({self._spec.replica_id}, {self.state()}, {self._ledger.num_open} open)"

    # ---- what others ask

    def state(self) -> ReplicaState:
        """Return its own state: replicas may be there or not."""
        if self._departure.has_begun:
            return "draining"
        if self._error:
            return "failed"
        return "ready" if self._generator.has_model() else "starting"

    def why_not_ready(self) -> str:
        match self.state():
            case "draining":
                return "this front is leaving"
            case "failed":
                return self._error
            case "starting":
                return "the model's tokenizer is being loaded"
        return ""

    def model_card(self) -> ModelCard:
        info, spec = self._engine.info, self._spec
        limit = None if info is None else info.max_context_tokens
        return ModelCard(spec.endpoint, "model", self._created, "headrace", spec.engine.model, limit)

    def update_metrics(self) -> FrontMetrics:
        metrics = self._metrics
        metrics.num_open = self._ledger.num_open
        metrics.is_ready = self.state() == "ready"
        metrics.num_hosted, metrics.num_stranded = self._keeper.num_hosted, self._keeper.num_waiting
        self._ledger.check_integrity()
        self._keeper.check_integrity()
        return metrics

    def _make_report(self, finished: list[FinishedRequest], _prefixes: PrefixNews) -> LoadReport:
        self._sequence += 1
        spec = self._spec
        return LoadReport(
            replica_id=spec.replica_id,
            endpoint=spec.endpoint,
            model=spec.engine.model,
            address=self._address,
            pid=os.getpid(),
            sequence=self._sequence,
            lease_s=spec.lease_s,
            state=self.state(),
            num_open=self._ledger.num_open,
            max_open=spec.max_open,
            last_error=self._error,
            is_retryable=not self._error,
            finished=finished,
            generation=spec.generation,
            socket_path=self._socket_path,
            # By gateway alone: tenants' requests are counted where they are computed.
            open_by_gateway=self._ledger.open_by_gateway(),
            speaks_h2=True,
            num_hosted=self._keeper.num_hosted,
            leave_by_s=self._departure.left_s(),
            gateway_id=spec.gateway_id,
            text_class=text_class_of(spec.engine),
            moved=self._keeper.moves.recent(self._clock.now_s()),
        )

    def _report_interval_s(self) -> float:
        is_busy = self._ledger.num_open > 0 or self._departure.has_begun
        return BUSY_INTERVAL_S if is_busy else self._spec.lease_s / 3

    def _on_order(self, order: SetSleep | Siblings) -> None:
        if isinstance(order, Siblings):  # there is nothing here that could sleep
            self._engine.set_siblings(local_siblings(order.siblings, self._spec.run_dir))

    def _on_notice(self, left_s: float) -> None:
        self._departure.leave_by_s = self._clock.now_s() + left_s
        self._stop_requested.set()

    # ---- life

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT and drained; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_requested.set)
        try:
            await self._listen()
        except (OSError, ConfigError) as error:
            print(f"front: {error}", file=sys.stderr)
            self._access_log.close()
            return 2
        _log.info("%s listens on %s", self._spec.replica_id, self._address)
        tasks = [asyncio.create_task(self._reporter.run()), asyncio.create_task(self._load_model())]
        for source in notice_sources(self._spec):
            watcher = NoticeWatcher(source, self._clock, self._on_notice)
            tasks.append(asyncio.create_task(watcher.run()))
        try:
            await self._stop_requested.wait()
            await self._leave()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=_LAST_MOMENTS_S)
            if self._socket_path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._socket_path)
            self._access_log.close()
        return 0

    async def _listen(self) -> None:
        """Serve on TCP, and the gateway, which is on this machine, on a UNIX socket. Raises OSError and
        ConfigError."""
        spec = self._spec
        try:
            self._address = await self._server.listen(spec.host, spec.port, spec.identity)
        except OSError as error:
            raise OSError(f"cannot listen on {spec.host}:{spec.port}: {error.strerror or error}") from error
        path = front_socket_path(spec.run_dir, spec.replica_id)
        try:
            if not path:
                raise OSError(f"the path of {spec.run_dir} is too long for sockets")
            await self._server.listen_unix(path)
        except OSError as error:
            if spec.needs_gateway:  # there would be no telling a gateway from anybody else
                raise OSError(f"cannot listen on a UNIX socket: {error.strerror or error}") from error
            _log.warning("no UNIX socket: %s; gateways use %s", error, self._address)
        else:
            self._socket_path = path

    async def _load_model(self) -> None:
        spec = self._spec
        try:
            model = await asyncio.to_thread(load_text_model, spec.engine)
        except ModelError as error:
            self._error = str(error)
        except Exception as error:
            _log.exception("the model's tokenizer could not be loaded")
            self._error = f"the model's tokenizer could not be loaded: {type(error).__name__}: {error}"
        else:
            self._encoder = PromptEncoder(model.tokenizer)
            shared = await shared_prefix_tokens(spec.shared_prefix, model, self._encoder)
            caching = PromptCaching(spec.endpoint, None, shared)
            self._generator.set_model(model, self._encoder, caching, self._grammars)
        self._reporter.notify()

    async def _leave(self) -> None:
        """Be released, let the streams end within the grace, exit."""
        departure = self._departure
        self._reporter.ask_release(self._sequence + 1)
        await departure.wait_for_release()
        self._generator.is_closed = True
        self._server.close_idle()
        await departure.wait_for_streams(lambda: self._ledger.num_open)
        self._generator.fail_open()
        await departure.wait_for_last(lambda: self._ledger.num_open == 0, _LAST_MOMENTS_S)
        self._keeper.close()
        self._peers.close()
        await self._server.close()
        await departure.wait_for_last(self._reporter.has_told_all, _LAST_MOMENTS_S)
        if self._encoder is not None:
            self._encoder.close()
        if self._grammars is not None:
            await self._grammars.close()
