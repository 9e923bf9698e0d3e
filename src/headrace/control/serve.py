"""`headrace.serve`: a whole system for the length of a `with` block, for notebooks, scripts and tests.

Owns the child process that holds it, and the wait until it is ready. The child ends when the block does, or
this program dies. Must not know: how processes are started.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import msgspec

from headrace.api.config import Config
from headrace.api.config_loader import load_config, parse_config
from headrace.api.messages import AdminReply, ApplyConfig, CreateKey, GetStatus, ScaleEndpoint, SystemStatus
from headrace.control.admin import NotRunning, ask
from headrace.control.preflight import check_address, check_keys, check_models
from headrace.control.serve_process import ServeAnswer, ServeSpec
from headrace.errors import ConfigError, HeadraceError
from headrace.fabric.run_directory import default_run_directory

if TYPE_CHECKING:
    import openai

ConfigLike = Config | Mapping[str, Any] | str | Path
READY_LIMIT_S = 300.0
START_LIMIT_S = 30.0
_POLL_S = 0.05
_STOP_MARGIN_S = 25.0
_MAX_ERROR_BYTES = 8192


class StartFailed(HeadraceError):
    """The system did not get ready; the message holds what its replicas last said."""


def serve(config: ConfigLike, *, ready_limit_s: float = READY_LIMIT_S) -> System:
    """Start a system and wait until it is ready. Use as a context manager; leaving it drains and cleans up.

    config: the tree as a mapping, a Config, or the path of a YAML file. `gateway: {bind: "127.0.0.1:0"}`
    takes any free port. Raises ConfigError, or StartFailed with the failing replica's last error.
    """
    system = System(check_address(check_keys(check_models(_load(config)))))
    try:
        system.wait_until_ready(ready_limit_s)
    except BaseException:
        system.close()
        raise
    return system


class System:
    """A running system. Made by `serve`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run_directory = default_run_directory(f"serve-{os.getpid()}-{secrets.token_hex(3)}")
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, closed in close
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "headrace.control.serve_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C in a terminal is for this program alone
        )
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        state = "running" if self._process.poll() is None else "ended"
        return f"System({self.url}, {state})"

    def __enter__(self) -> System:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The address for OpenAI clients, ending in /v1."""
        from headrace.control.status import gateway_url

        return gateway_url(self.config.gateway)

    def create_key(self, tenant: str, name: str = "") -> str:
        """Make an API key and return it; it is kept nowhere. Raises CommandRefused."""
        return ask(self.run_directory, CreateKey(tenant, name)).key

    def client(self, endpoint: str = "", api_key: str = "none") -> openai.OpenAI:
        """Return the official client. endpoint: checked to exist; requests name it as their `model`.

        api_key: needed when the config has tenants (`create_key`).
        """
        if endpoint and endpoint not in self.config.endpoints:
            known = ", ".join(sorted(self.config.endpoints))
            raise ConfigError(f"endpoint {endpoint!r} does not exist; there are: {known}")
        try:
            import openai
        except ImportError:
            raise HeadraceError("the openai client is missing; pip install headrace[client]") from None
        return openai.OpenAI(base_url=self.url, api_key=api_key)

    def status(self) -> SystemStatus:
        """Return a snapshot. Raises NotRunning while the controller is being restarted."""
        reply = ask(self.run_directory, GetStatus())
        assert reply.status is not None
        return reply.status

    def scale(self, endpoint: str, replicas: int) -> None:
        """Ask for a number of replicas; `wait_until_ready` waits for them. Raises CommandRefused."""
        ask(self.run_directory, ScaleEndpoint(endpoint, replicas))

    def apply(self, config: ConfigLike) -> AdminReply:
        """Take a new config; its notes say what changes. Raises ConfigError or CommandRefused."""
        checked = check_keys(check_models(_load(config)))
        reply = ask(self.run_directory, ApplyConfig(checked.model_dump_json()))
        now = self.config.gateway
        gateway = checked.gateway.model_copy(update={"bind": now.bind, "admin_bind": now.admin_bind})
        self.config = checked.model_copy(update={"gateway": gateway})
        return reply

    def wait_until_ready(self, limit_s: float = READY_LIMIT_S) -> None:
        """Wait until every endpoint has its replicas and no others. Raises StartFailed."""

        def is_settled(status: SystemStatus) -> bool:
            wanted = sum(e.desired + e.desired_standby for e in status.endpoints)
            return status.is_ready and len(status.replicas) == wanted

        self._wait(is_settled, limit_s)

    def close(self) -> None:
        """Drain, end every process, remove every file. Does nothing the second time."""
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            with contextlib.suppress(OSError):
                process.stdin.close()
            grace_s = max(endpoint.drain_grace_s for endpoint in self.config.endpoints.values())
            try:
                process.wait(grace_s + _STOP_MARGIN_S)
            except subprocess.TimeoutExpired:
                process.kill()  # everything it holds dies with it
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
            self._errors.close()

    def _greet(self) -> None:
        """Hand the config over and wait for the run directory. Raises StartFailed."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        spec = ServeSpec(self.config.model_dump_json(), str(self.run_directory))
        try:
            process.stdin.write(msgspec.json.encode(spec) + b"\n")
            process.stdin.flush()
        except OSError:
            raise StartFailed(f"the system ended while it was starting: {self._last_errors()}") from None
        if not select.select([process.stdout], [], [], START_LIMIT_S)[0]:
            raise StartFailed(f"the system did not start within {START_LIMIT_S:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise StartFailed(f"the system ended while it was starting: {self._last_errors()}")
        answer = msgspec.json.decode(line, type=ServeAnswer)
        if answer.error:
            raise StartFailed(answer.error)

    def _wait(self, is_done: Callable[[SystemStatus], bool], limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        status: SystemStatus | None = None
        while True:
            if self._process.poll() is not None:
                raise StartFailed(f"the system ended by itself: {self._last_errors()}")
            with contextlib.suppress(NotRunning):
                status = self.status()
                if is_done(status):
                    return
                if error := hopeless_error(status):
                    raise StartFailed(error)
            if time.monotonic() > deadline_s:
                raise StartFailed(f"not ready after {limit_s:.0f} s: {describe_unready(status)}")
            time.sleep(_POLL_S)

    def _last_errors(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _MAX_ERROR_BYTES))
        return self._errors.read().decode("utf-8", "replace").strip() or "it said nothing"


def hopeless_error(status: SystemStatus) -> str:
    """Return why no endpoint can get ready, or an empty text while one may."""
    if any(process.state == "failing" for process in status.processes):
        return describe_unready(status)
    wanting = [endpoint for endpoint in status.endpoints if endpoint.desired > 0]
    if not wanting or any(endpoint.ready or endpoint.starting for endpoint in wanting):
        return ""
    if not all(endpoint.failed for endpoint in wanting):
        return ""
    return describe_unready(status)


def describe_unready(status: SystemStatus | None) -> str:
    """Return what stands between `status` and ready, for people."""
    if status is None:
        return "its controller never answered"
    lines = [
        f"replica {replica.replica_id} is {replica.state}: {replica.last_error or replica.phase or 'no word'}"
        for replica in status.replicas
        if replica.state != "ready"
    ]
    lines += [
        f"{process.name} is {process.state}: {process.last_error or 'no word'}"
        for process in status.processes
        if process.name.startswith(("router-", "haproxy-", "relay-")) and process.state != "running"
    ]
    lines += [
        f"the rollout of {rollout.endpoint} is running: {rollout.reason}"
        for rollout in status.rollouts
        if rollout.state == "running"
    ]
    return "; ".join(lines) or "the gateway does not answer yet"


def _load(config: ConfigLike) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return parse_config(config)
    return load_config(config, environment=os.environ)
