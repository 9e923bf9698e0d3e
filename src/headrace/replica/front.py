"""The front of one replica: puts its parts together, and starts, serves and drains.

Owns the process's life. Everything is built here, once.
Must not know how its parts do their work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from dataclasses import dataclass, field

from headrace.api.messages import ReplicaSpec
from headrace.api.run_paths import front_socket_path, peer_socket_path
from headrace.clock import Clock
from headrace.errors import ConfigError, ModelError
from headrace.observability.front_metrics import FrontMetrics
from headrace.observability.line_log import BackgroundLog
from headrace.policy.resumption import Limits
from headrace.replica.answer import AnswerServices
from headrace.replica.departure import Departure
from headrace.replica.engine_client import EngineClient
from headrace.replica.engine_silence import EngineTimeLimits
from headrace.replica.engine_streams import EngineStreams
from headrace.replica.generation import Generator
from headrace.replica.grammar_checker import GrammarChecker
from headrace.replica.http_messages import AnswerHeads, HttpLimits
from headrace.replica.http_server import HttpServer
from headrace.replica.ledger import Ledger
from headrace.replica.notice import NoticeWatcher
from headrace.replica.notice_url import notice_sources
from headrace.replica.peer_link import PeerPool
from headrace.replica.peer_server import PeerServer
from headrace.replica.prefix_digest import PrefixDigest
from headrace.replica.prompt_caching import PromptCaching, shared_prefix_tokens
from headrace.replica.report import Reporter
from headrace.replica.restart import RestartPolicy
from headrace.replica.resumption import StreamKeeper
from headrace.replica.routes import Routes
from headrace.replica.self_view import FrontTraits, SelfView, fingerprint_of, headers_of
from headrace.replica.served_models import ServedModels
from headrace.replica.standby import Standby
from headrace.replica.text_model import PromptEncoder, TextModel, load_text_model

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
        is_simulated = spec.engine.kind == "simulated"
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
        self._encoder: PromptEncoder | None = None
        self._grammars = None if is_simulated else GrammarChecker(f"headrace: grammars {spec.replica_id}")
        self._stop_requested = asyncio.Event()

    def __repr__(self) -> str:
        return f"Front({self.view!r})"

    def has_model(self) -> bool:
        """Whether text can become tokens and back."""
        return self._generator.has_model()

    def on_notice(self, left_s: float) -> None:
        """Its machine goes away in so many seconds: leave."""
        self.departure.leave_by_s = self._clock.now_s() + left_s
        self._stop_requested.set()

    # ---- life

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT and drained; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_requested.set)
        try:
            self.view.address = await self._server.listen(
                self._spec.host, self._spec.port, self._spec.identity
            )
        except (OSError, ConfigError) as error:
            where, why = f"{self._spec.host}:{self._spec.port}", getattr(error, "strerror", "") or error
            print(f"front: cannot listen on {where}: {why}", file=sys.stderr)
            self._access_log.close()
            return 2
        await self._listen_unix()
        if self._spec.needs_gateway and not (self.view.socket_path or self._spec.identity):
            # Nobody could be served: without the socket there is no telling a gateway from anybody else.
            print(f"front: cannot listen on a UNIX socket in {self._spec.run_dir}", file=sys.stderr)
            self._access_log.close()
            return 2
        await self._listen_peers()
        _log.info("%s listens on %s", self._spec.replica_id, self.view.address)
        reporting = asyncio.create_task(self._reporter.run())
        self.engine.start()
        tasks = [reporting, loading := asyncio.create_task(self._load_model())]
        for source in notice_sources(self._spec):
            watcher = NoticeWatcher(source, self._clock, self.on_notice)
            tasks.append(asyncio.create_task(watcher.run()))
        try:
            await self._stop_requested.wait()
            await self._leave()
        finally:
            for task in tasks:
                if task is not loading:
                    task.cancel()
            await asyncio.wait(tasks, timeout=_ENGINE_STOP_S)
            if self.view.socket_path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.view.socket_path)
            self._access_log.close()
        return 0

    async def _listen_unix(self) -> None:
        """Serve gateways of this machine on a UNIX socket, too. Without one they use the TCP address."""
        path = front_socket_path(self._spec.run_dir, self._spec.replica_id)
        if not path:
            return
        try:
            await self._server.listen_unix(path)
        except OSError as error:
            _log.warning("cannot listen on %s: %s; gateways use %s", path, error, self.view.address)
        else:
            self.view.socket_path = path

    async def _listen_peers(self) -> None:
        """Offer the engine to siblings. Without this socket they go elsewhere."""
        path = peer_socket_path(self._spec.run_dir, self._spec.replica_id)
        if not path:
            return
        try:
            await self.guests.listen(path)
        except OSError as error:
            _log.warning("cannot listen on %s: %s; this engine takes no guests", path, error)
        else:
            self.view.peer_path = path

    async def _load_model(self) -> None:
        try:
            model: TextModel = await asyncio.to_thread(load_text_model, self._spec.engine)
        except ModelError as error:
            self.engine.fail(str(error))
        except Exception as error:
            _log.exception("the model's tokenizer could not be loaded")
            self.engine.fail(f"the model's tokenizer could not be loaded: {type(error).__name__}: {error}")
        else:
            self._encoder = PromptEncoder(model.tokenizer)
            shared = await shared_prefix_tokens(self._spec.shared_prefix, model, self._encoder)
            caching = PromptCaching(self._spec.endpoint, self._digest, shared)
            self._generator.set_model(model, self._encoder, caching, self._grammars)
            self._reporter.notify()

    async def _leave(self) -> None:
        """Be released, hand over what stays open, free the engine, relay to the end, exit."""
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
        await self._server.close()
        await departure.wait_for_last(self._reporter.has_told_all, _LAST_REPORTS_S)
        if self._encoder is not None:
            self._encoder.close()
        if self._grammars is not None:
            await self._grammars.close()
