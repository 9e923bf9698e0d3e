"""A real front process with its engine, and a listener for its load reports, for integration tests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import EngineSpec, FinishedRequest, LoadReport, ReplicaSpec, ReportAck
from headrace.api.run_paths import router_socket_path

SOURCE = Path(__file__).resolve().parents[2] / "src"
START_LIMIT_S = 30.0
SIMULATED = EngineSpec("simulated", "simulated", simulated_step_s=0.002)


class FakeRouter:
    """Listens for load reports, keeps them, acknowledges them."""

    def __init__(self, path: str) -> None:
        self.releases = True
        """Whether a draining replica, or one that goes on standby, is released."""
        self.answers_ready = True
        """Whether reports of a replica that serves are acknowledged: routers do not."""
        self.reports: list[LoadReport] = []
        self.finished: dict[str, FinishedRequest] = {}
        self.num_finished = 0
        self._changed = threading.Condition()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(4)
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        decoder: FrameDecoder[LoadReport] = FrameDecoder(LoadReport)
        with connection, suppress(OSError):
            while data := connection.recv(65536):
                for report in decoder.feed(data):
                    self._keep(report)
                    is_leaving = report.state in ("draining", "standby")
                    if not is_leaving and not self.answers_ready:
                        continue
                    is_released = self.releases and is_leaving
                    connection.sendall(encode_frame(ReportAck(report.sequence, is_released)))

    def _keep(self, report: LoadReport) -> None:
        with self._changed:
            self.reports.append(report)
            for finished in report.finished:
                self.finished[finished.request_id] = finished
                self.num_finished += 1
            self._changed.notify_all()

    @property
    def latest(self) -> LoadReport:
        return self.reports[-1]

    def wait_for(self, condition: Callable[[LoadReport], bool], limit_s: float = START_LIMIT_S) -> LoadReport:
        """Return the first report from now on, the newest included, that meets `condition`."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: bool(self.reports) and condition(self.reports[-1]), limit_s
            )
            assert found, f"no such report within {limit_s} s; the last one: {self.reports[-1:]}"
            return self.reports[-1]

    def wait_finished(self, request_id: str, limit_s: float = 5.0) -> FinishedRequest:
        """Return how a request ended, once it is reported."""
        with self._changed:
            found = self._changed.wait_for(lambda: request_id in self.finished, limit_s)
            assert found, f"request {request_id} was not reported within {limit_s} s"
            return self.finished[request_id]

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)


class RunningFront:
    """A front process; `router` hears its reports."""

    def __init__(self, process: subprocess.Popen[bytes], router: FakeRouter, log_path: Path) -> None:
        self.process = process
        self.router = router
        self._log_path = log_path

    @property
    def address(self) -> str:
        return self.router.latest.address

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def log(self) -> str:
        return self._log_path.read_text()

    def access_log(self) -> list[dict[str, Any]]:
        whole, _, _ = self.log().rpartition("\n")  # the last line may be half written
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def wait_ready(self) -> LoadReport:
        return self.router.wait_for(lambda report: report.state == "ready")

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self.address.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def exchange(self, data: bytes, limit_s: float = 10.0) -> bytes:
        """Send raw bytes, read to the end of the connection."""
        reader, writer = await self.connect()
        try:
            writer.write(data)
            async with asyncio.timeout(limit_s):
                return await reader.read()
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def metrics(self) -> dict[str, float]:
        """Return the metrics without their labels, but for the terminal state: `requests_total finished`."""
        text = httpx.get(f"{self.url}/metrics", verify=False).text
        values = {}
        for name, labels, value in re.findall(r"^headrace_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            if not name.endswith("_bucket"):
                state = re.search(r'(?:state|status)="(\w+)"', labels)
                values[f"{name} {state[1]}" if state else name] = float(value)
        return values

    def stop(self, limit_s: float = 15.0) -> int:
        """Send SIGTERM; return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit_s)


def check_conservation(front: RunningFront, num_open: int = 0, limit_s: float = 5.0) -> dict[str, float]:
    """Assert accepted = sum of terminal states + open, and that `num_open` are open, within the limit."""
    deadline_s = time.monotonic() + limit_s
    while (metrics := front.metrics())["requests_open"] != num_open and time.monotonic() < deadline_s:
        time.sleep(0.02)
    ended = {key: value for key, value in metrics.items() if key.startswith("requests_total ")}
    assert metrics["requests_open"] == num_open, metrics
    assert len(ended) == 4
    assert metrics["requests_accepted_total"] == sum(ended.values()) + num_open, metrics
    return ended


@contextmanager
def running_front(
    engine: EngineSpec = SIMULATED,
    start_limit_s: float = START_LIMIT_S,
    gateway_dir: str = "",
    replica_id: str = "chat-1",
    extra_sockets: Sequence[str] = (),
    program: Sequence[str] = ("-m", "headrace.replica"),
    **spec_fields: Any,
) -> Iterator[RunningFront]:
    """Start a front with `engine`; at the end stop it and look for tracebacks in its log. `gateway_dir`: run
    directory of a gateway that it serves as well. `extra_sockets`: who else hears its reports."""
    run_dir = Path(tempfile.mkdtemp(prefix="headrace-front-"))
    path = str(run_dir / "router.sock")
    router = FakeRouter(path)
    sockets = [path, *(extra_sockets or [str(run_dir / "controller.sock")])]
    spec_fields.setdefault("report_sockets", sockets)
    if gateway_dir:
        spec_fields["report_sockets"] = [*sockets, router_socket_path(gateway_dir, "g1")]
    spec = ReplicaSpec(replica_id, "chat", engine, gateway_dir or str(run_dir), **spec_fields)
    log_path = run_dir / "front.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *program, msgspec.json.encode(spec).decode()],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    front = RunningFront(process, router, log_path)
    try:
        router.wait_for(lambda report: bool(report.address), start_limit_s)
        yield front
        front.stop()
        assert "Traceback" not in front.log(), front.log()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        router.close()
        print(front.log()[-4000:])
        shutil.rmtree(run_dir)
