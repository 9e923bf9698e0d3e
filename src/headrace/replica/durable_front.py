"""A durable front: a front apart from engines. Puts its parts together, and starts, serves and drains.

Owns the process's life: a replica's front is `headrace.replica.front`.
Must not know how its parts do their work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys

from headrace.api.messages import LeaveBy, ReplicaSpec, SetSleep, Siblings
from headrace.api.run_paths import front_socket_path
from headrace.clock import Clock
from headrace.errors import ConfigError, ModelError
from headrace.observability.front_metrics import FrontMetrics
from headrace.observability.line_log import BackgroundLog
from headrace.policy.resumption import Limits
from headrace.replica.answer import AnswerServices
from headrace.replica.departure import Departure
from headrace.replica.durable_view import DurableView
from headrace.replica.generation import Generator
from headrace.replica.grammar_checker import GrammarChecker
from headrace.replica.http_messages import AnswerHeads, HttpLimits
from headrace.replica.http_server import HttpServer
from headrace.replica.ledger import Ledger
from headrace.replica.local_siblings import local_siblings
from headrace.replica.notice import NoticeWatcher
from headrace.replica.notice_url import notice_sources
from headrace.replica.peer_link import PeerPool
from headrace.replica.prompt_caching import PromptCaching, shared_prefix_tokens
from headrace.replica.remote_engine import NoEngine, RemoteEngine, no_own_engine
from headrace.replica.report import Reporter
from headrace.replica.resumption import StreamKeeper
from headrace.replica.routes import Routes
from headrace.replica.self_view import FrontTraits, fingerprint_of, headers_of
from headrace.replica.served_models import ServedModels
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
        self._encoder: PromptEncoder | None = None
        self._grammars = None if is_simulated else GrammarChecker(f"headrace: grammars {spec.replica_id}")
        self._stop_requested = asyncio.Event()

    def __repr__(self) -> str:
        return f"DurableFront({self.view!r})"

    def has_model(self) -> bool:
        """Whether text can become tokens and back."""
        return self._generator.has_model()

    def _on_order(self, order: SetSleep | Siblings | LeaveBy) -> None:
        if isinstance(order, Siblings):  # there is nothing here that could sleep
            self.engine.set_siblings(local_siblings(order.siblings, self._spec.run_dir))
        elif isinstance(order, LeaveBy):
            self._on_notice(order.left_s)

    def _on_notice(self, left_s: float) -> None:
        self.departure.leave_by_s = self._clock.now_s() + left_s
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
        _log.info("%s listens on %s", self._spec.replica_id, self.view.address)
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
            if self.view.socket_path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.view.socket_path)
            self._access_log.close()
        return 0

    async def _listen(self) -> None:
        """Serve on TCP, and the gateway, which is on this machine, on a UNIX socket. Raises OSError and
        ConfigError."""
        spec = self._spec
        try:
            self.view.address = await self._server.listen(spec.host, spec.port, spec.identity)
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
            _log.warning("no UNIX socket: %s; gateways use %s", error, self.view.address)
        else:
            self.view.socket_path = path

    async def _load_model(self) -> None:
        spec = self._spec
        try:
            model = await asyncio.to_thread(load_text_model, spec.engine)
        except ModelError as error:
            self.view.error = str(error)
        except Exception as error:
            _log.exception("the model's tokenizer could not be loaded")
            self.view.error = f"the model's tokenizer could not be loaded: {type(error).__name__}: {error}"
        else:
            self._encoder = PromptEncoder(model.tokenizer)
            shared = await shared_prefix_tokens(spec.shared_prefix, model, self._encoder)
            caching = PromptCaching(spec.endpoint, None, shared)
            self._generator.set_model(model, self._encoder, caching, self._grammars)
        self._reporter.notify()

    async def _leave(self) -> None:
        """Be released, let the streams end within the grace, exit."""
        departure = self.departure
        self._reporter.ask_release(self.view.next_sequence)
        await departure.wait_for_release()
        self._generator.is_closed = True
        self._server.close_idle()
        await departure.wait_for_streams(lambda: self.ledger.num_open)
        self._generator.fail_open()
        await departure.wait_for_last(lambda: self.ledger.num_open == 0, _LAST_MOMENTS_S)
        self.keeper.close()
        self._peers.close()
        await self._server.close()
        await departure.wait_for_last(self._reporter.has_told_all, _LAST_MOMENTS_S)
        if self._encoder is not None:
            self._encoder.close()
        if self._grammars is not None:
            await self._grammars.close()
