"""What replicas report, and what becomes of it: table, dispatcher, HAProxy's servers, releases.

Owns the order of these; the simulation's router runs this very code. Must not know sockets, SPOE or HAProxy's
words.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol, cast

from headrace.api.messages import EndpointRule, LoadReport, ReportAck
from headrace.errors import ProtocolError
from headrace.gateway.dispatcher import Dispatcher
from headrace.gateway.replicas import Replica, ReplicaTable
from headrace.gateway.report_checks import without_nonsense
from headrace.gateway.request_recorder import RequestRecorder
from headrace.gateway.servers import ServerKeeper

logger = logging.getLogger(__name__)
LEAVING = ("draining", "standby")
"""States in which a replica waits for the word that it is sent nothing more."""


class Reports(Protocol):
    """The connection that a replica reports over."""

    def acknowledge(self, ack: ReportAck) -> None: ...


class Membership:
    """The replicas of one router. `keeper` is set before the first report."""

    keeper: ServerKeeper

    def __init__(
        self,
        replicas: ReplicaTable,
        dispatcher: Dispatcher,
        recorder: RequestRecorder,
        now_s: Callable[[], float],
    ) -> None:
        self._replicas = replicas
        self._dispatcher = dispatcher
        self._recorder = recorder
        self._now_s = now_s
        self._seen_revision = 0

    def __repr__(self) -> str:
        return f"<Membership of {len(self._replicas.replicas)} replicas>"

    def take_report(self, connection: Reports, report: LoadReport) -> None:
        """Take a load report. What is impossible in it is counted, and costs nobody else."""
        now_s = self._now_s()
        report, num_impossible = without_nonsense(report)
        self._replicas.num_ignored_ends += num_impossible
        try:
            replica = self._replicas.observe(report, connection, now_s)
        except ProtocolError as error:
            self.ignore(error)
            return
        for finished in report.finished:
            self._recorder.front_finished(finished)
        self._dispatcher.take_report(report, replica, now_s)
        if replica is not None:
            self._dispatcher.replica_reported(replica, report, now_s)
            self.look()
            self._dispatcher.pump(replica.endpoint, now_s)
        if report.state in LEAVING:
            is_released = replica is None or self._is_released(replica)
            connection.acknowledge(ReportAck(report.sequence, is_released))

    def set_rules(self, rules: Iterable[EndpointRule]) -> None:
        """Take new rules: which endpoints are durable decides their servers, versions' parts who is bound."""
        rules = list(rules)
        self._dispatcher.set_rules(rules)
        self._replicas.set_durable(frozenset(rule.name for rule in rules if rule.is_durable))
        self.look()
        for rule in rules:
            self._dispatcher.pump(rule.name, self._now_s())

    def ignore(self, error: ProtocolError) -> None:
        """A report could not be taken, or not even be read."""
        self._replicas.num_ignored_reports += 1
        logger.warning("load report ignored: %s", error)

    def connection_lost(self, connection: Reports) -> None:
        """The connection that a replica reported over is closed."""
        self._replicas.connection_closed(connection, self._now_s())
        self.look()

    def expire(self, now_s: float) -> None:
        """Forget the replicas whose leases ended."""
        for replica in self._replicas.expire(now_s):
            self._dispatcher.replica_gone(replica)
        self.look()

    def look(self) -> None:
        """Tell the keeper which servers are wanted, if that may have changed."""
        if self._seen_revision == self._replicas.revision:
            return
        self._seen_revision = self._replicas.revision
        self._replicas.mark_serving(self.keeper.serving)
        self.keeper.want(self._replicas.wanted_servers(), self._replicas.known_paths)

    def servers_changed(self) -> None:
        """HAProxy has other servers now: bind what waits, release who leaves."""
        now_s = self._now_s()
        self._replicas.mark_serving(self.keeper.serving)
        for endpoint in list(self._dispatcher.endpoints):
            self._dispatcher.pump(endpoint, now_s)
        for replica in self._replicas.replicas.values():
            if replica.state in LEAVING and self._is_released(replica):
                # The table holds the connections that it was given, and asks nothing of them.
                cast(Reports, replica.connection).acknowledge(ReportAck(replica.sequence, is_released=True))

    def _is_released(self, replica: Replica) -> bool:
        return all(self.keeper.is_released(path) for path in replica.paths)
