"""HAProxy's servers kept equal to the replicas that may serve.

`plan_changes` is the pure diff; `ServerKeeper` runs it: every failed command is simply planned again in the
next round, so HAProxy may die, restart or refuse at any point. Owns haproxy.cfg on disk and the reloads.
Must not know load or requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from headrace.api.messages import GatewaySpec
from headrace.api.run_paths import front_socket_path
from headrace.errors import HeadraceError
from headrace.gateway.files import write_files
from headrace.gateway.haproxy_config import render_files
from headrace.gateway.haproxy_runtime import (
    HaproxyGone,
    HaproxyRefused,
    HaproxyRuntime,
    HaproxyUnavailable,
    ServerState,
)
from headrace.gateway.names import ENDPOINT_PREFIX, decode_name, endpoint_of_backend, is_shared_backend
from headrace.gateway.rounds import repeat_rounds
from headrace.gateway.server import UNIX_ADDRESS, Server

logger = logging.getLogger(__name__)

VERIFY_PERIOD_S = 1.0
"""How often HAProxy is compared with what is wanted when nothing seems to have changed."""
ABSENT_AFTER_S = 2.0
"""HAProxy counts as gone when it gave no answer for this long."""
GONE_ROUNDS = 2
"""When nobody listens on its socket in so many rounds in a row, it sends nobody a request."""
RELOAD_PAUSE_S = 5.0
"""Between two tries of a reload that HAProxy refuses or does not answer."""
ADOPTION_S = 5.0
"""After the router's start, servers that HAProxy has and nobody reported yet are left alone for this long:
their replicas need a moment to find the new router."""


@dataclass(frozen=True, slots=True)
class ServerChange:
    """One step towards the wanted servers."""

    kind: Literal["add", "enable", "disable", "delete"]
    path: str
    server: Server | None = None


def plan_changes(wanted: Iterable[Server], actual: Mapping[str, ServerState]) -> list[ServerChange]:
    """Return what to do so that HAProxy's endpoint backends hold exactly `wanted`.

    A server whose address changed is taken away first; the next round adds it again.
    """
    changes: list[ServerChange] = []
    by_path = {server.path: server for server in wanted}
    for path, server in by_path.items():
        state = actual.get(path)
        if state is None:
            changes += [ServerChange("add", path, server), ServerChange("enable", path, server)]
        elif state.address != server.shown_address:
            changes += _removal(state)
        elif state.is_in_maintenance:
            changes.append(ServerChange("enable", path, server))
    for path, state in actual.items():
        if path not in by_path and path.startswith(ENDPOINT_PREFIX):
            changes += _removal(state)
    return changes


def _removal(state: ServerState) -> list[ServerChange]:
    delete = ServerChange("delete", state.path)
    return [delete] if state.is_in_maintenance else [ServerChange("disable", state.path), delete]


def server_of_state(state: ServerState, run_dir: str, identity: str = "") -> Server | None:
    """Return the server that HAProxy has, as if we had wanted it; None for the gateway's own."""
    backend, _, name = state.path.partition("/")
    endpoint = endpoint_of_backend(backend)
    host, _, port = state.address.rpartition(":")
    if endpoint is None or not port.isdigit():
        return None
    replica_id, is_shared = decode_name(name), is_shared_backend(backend)
    if state.address == UNIX_ADDRESS:
        socket_path = front_socket_path(run_dir, replica_id)
        return Server(endpoint, replica_id, "", 0, 0, socket_path, is_shared, identity)
    return Server(endpoint, replica_id, host.strip("[]"), int(port), 0, "", is_shared, identity)


class ConfigFiles:
    """HAProxy's files on disk, written when their content changes."""

    def __init__(self) -> None:
        self._written: dict[str, str] = {}

    def write(self, spec: GatewaySpec, servers: Iterable[Server], fd_limit: int) -> None:
        """Make the files those of these servers. Raises ConfigError and OSError."""
        files = render_files(spec, servers, fd_limit)
        if files != self._written:
            write_files(files)
            self._written = files


class ServerKeeper:
    """The loop that keeps HAProxy's servers and files equal to what the router wants."""

    def __init__(
        self,
        spec: GatewaySpec,
        fd_limit: int,
        runtime: HaproxyRuntime,
        on_change: Callable[[], None],
        files: ConfigFiles | None = None,
        now_s: Callable[[], float] | None = None,
    ) -> None:
        """files, now_s: others than the disk's and the running event loop's, for simulation."""
        self._spec = spec
        self._fd_limit = fd_limit
        self._runtime = runtime
        self._on_change = on_change
        self._files = files or ConfigFiles()
        self._now_s = now_s or _loop_time_s
        self._wanted: dict[str, Server] = {}
        self._known: frozenset[str] = frozenset()
        self._wake = asyncio.Event()
        self._started_s = self._now_s()
        self._reached_s = self._started_s
        self._needs_reload = False
        self._reload_not_before_s = 0.0
        self.serving: frozenset[str] = frozenset()
        """Paths of the wanted servers that HAProxy has and that take requests, as of the last round."""
        self._present: frozenset[str] | None = None  # what HAProxy may send a request to; None: not known yet
        self._revision = 0
        self._published_revision = -1
        self._num_gone = 0
        self.num_failures = 0
        self.num_reloads = 0
        self.last_error = ""

    def __repr__(self) -> str:
        return (
            f"<ServerKeeper wanted={len(self._wanted)} serving={len(self.serving)} error={self.last_error!r}>"
        )

    def want(self, servers: Iterable[Server], known: Iterable[str]) -> None:
        """Set the servers that HAProxy must have. known: paths of all replicas that ever reported;
        only servers of others are left alone after a start."""
        wanted = {server.path: server for server in servers}
        known = frozenset(known)
        if wanted != self._wanted or known != self._known:
            self._wanted = wanted
            self._known = known
            self._revision += 1
            self._wake.set()

    def is_released(self, path: str) -> bool:
        """Whether HAProxy will send no more requests to this server, which is not wanted any more."""
        return (
            path not in self._wanted
            and self._published_revision == self._revision
            and self._present is not None
            and path not in self._present
        )

    def set_spec(self, spec: GatewaySpec) -> None:
        """Take a new spec; HAProxy is reloaded if its files change with it. Raises ConfigError."""
        files = render_files(spec, [], self._fd_limit)  # refused before anything changed
        is_different = files != render_files(self._spec, [], self._fd_limit)
        self._spec = spec
        if is_different:
            self._needs_reload = True
            self._reload_not_before_s = 0.0
            self._wake.set()

    async def run(self) -> None:
        """Run for ever. Cancel it to stop."""
        await repeat_rounds(self.run_round, self._wake, VERIFY_PERIOD_S)

    async def run_round(self) -> bool:
        """Compare and change once. True if nothing is left to do."""
        revision = self._revision
        try:
            actual = await self._runtime.show_servers()
            wanted = self._adopt(actual)
            is_written = self._try_to_write(wanted.values())
            if self._needs_reload and is_written and await self._reload():
                actual = await self._runtime.show_servers()
            changes = plan_changes(wanted.values(), actual)
            is_settled = await self._apply(changes) and is_written and not self._needs_reload
            self._publish(await self._runtime.show_servers() if changes else actual, revision)
        except HaproxyUnavailable as error:
            self._note_failure(error)
            self._num_gone = self._num_gone + 1 if isinstance(error, HaproxyGone) else 0
            self._survive_without_haproxy()
            return False
        except (HeadraceError, OSError) as error:
            self._note_failure(error)
            return False
        if is_settled:
            self.last_error = ""
        return is_settled

    async def _reload(self) -> bool:
        """Reload unless the last try failed a moment ago. A refusal (a new port is taken) stops nothing else:
        the running HAProxy goes on with its old endpoints."""
        now_s = self._now_s()
        if now_s < self._reload_not_before_s:
            return False
        self._reload_not_before_s = now_s + RELOAD_PAUSE_S
        try:
            await self._runtime.reload()
        except HaproxyRefused as error:
            self._note_failure(error)
            return False
        self._needs_reload = False
        self.num_reloads += 1
        return True

    async def _apply(self, changes: Iterable[ServerChange]) -> bool:
        is_settled = True
        for change in changes:
            try:
                if change.kind == "add":
                    assert change.server is not None
                    await self._runtime.add_server(change.server)
                elif change.kind == "enable":
                    await self._runtime.enable_server(change.path)
                elif change.kind == "disable":
                    await self._runtime.disable_server(change.path)
                elif not await self._runtime.delete_server(change.path):
                    is_settled = False  # it still serves; deleted in a later round
            except HaproxyRefused as error:
                self._note_failure(error)
                is_settled = False
        return is_settled

    def _adopt(self, actual: Mapping[str, ServerState]) -> dict[str, Server]:
        """Return the wanted servers and, soon after the start, those whose replicas did not report yet."""
        wanted = dict(self._wanted)
        if self._now_s() - self._started_s < ADOPTION_S:
            for path, state in actual.items():
                server = server_of_state(state, self._spec.run_dir, self._spec.identity)
                if server is not None and path not in self._known and not state.is_in_maintenance:
                    wanted.setdefault(path, server)
        return wanted

    def _publish(self, actual: Mapping[str, ServerState], revision: int) -> None:
        self._reached_s = self._now_s()
        self._num_gone = 0
        present = frozenset(path for path, state in actual.items() if not state.is_in_maintenance)
        serving = present & self._wanted.keys()
        self._set_published(present, serving, revision)

    def _set_published(self, present: frozenset[str], serving: frozenset[str], revision: int) -> None:
        before = (self._present, self.serving, self._published_revision)
        self._present, self.serving, self._published_revision = present, serving, revision
        if before != (present, serving, revision):
            self._on_change()

    def _survive_without_haproxy(self) -> None:
        """Prepare the files that a restarted HAProxy begins with. One missed answer changes nothing else:
        HAProxy itself ignores a server that it does not have."""
        now_s = self._now_s()
        if now_s - self._reached_s > ABSENT_AFTER_S:
            self._set_published(frozenset(), frozenset(), self._revision)
        elif (
            self._num_gone >= GONE_ROUNDS
        ):  # who leaves need not wait; another one will have those that serve
            self._set_published(frozenset(), self.serving & self._wanted.keys(), self._revision)
        if now_s - self._started_s >= ADOPTION_S:
            self._try_to_write(self._wanted.values())

    def _try_to_write(self, servers: Iterable[Server]) -> bool:
        """Make the files those of these servers. False: they are not (a full disk); the running HAProxy need
        not wait for that, and the next round tries again."""
        try:
            self._files.write(self._spec, servers, self._fd_limit)
        except (HeadraceError, OSError) as error:
            self._note_failure(error)
            return False
        return True

    def _note_failure(self, error: Exception) -> None:
        self.num_failures += 1
        if str(error) != self.last_error:
            self.last_error = str(error)
            logger.warning("haproxy: %s", error)


def _loop_time_s() -> float:
    return asyncio.get_running_loop().time()
