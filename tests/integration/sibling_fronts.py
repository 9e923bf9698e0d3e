"""Several real fronts of one endpoint, and the part of a controller that tells each of its siblings."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.integration.front_process import FakeRouter, RunningFront, running_front

from headrace.api.framing import encode_frame
from headrace.api.messages import EngineSpec, LeaveBy, LoadReport, SetSleep, Sibling, Siblings
from headrace.api.run_paths import peer_socket_path

QUICK_FRONT = str(Path(__file__).with_name("quick_front.py"))


class Controller(FakeRouter):
    """Hears one front's reports, and tells it what it is told to."""

    def tell(self, message: Siblings | SetSleep | LeaveBy) -> None:
        with suppress(OSError, IndexError):  # the front left
            self._connections[-1].sendall(encode_frame(message))


def connect_hosts(run_dir: Path, siblings: list[Sibling]) -> None:
    """Each front has a run directory of its own, as on several hosts: put siblings' sockets there, as tunnels
    do."""
    for sibling in siblings:
        path = Path(peer_socket_path(str(run_dir), sibling.replica_id))
        if sibling.peer_socket and not path.is_symlink():
            path.symlink_to(sibling.peer_socket)


class Fronts:
    """Fronts that know each other as long as `introduces` is set."""

    def __init__(self) -> None:
        self.fronts: dict[str, RunningFront] = {}
        self.controllers: dict[str, Controller] = {}
        self.introduces = True
        self._told: dict[str, list[Sibling]] = {}
        self._telling = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __getitem__(self, index: int) -> RunningFront:
        return self.fronts[f"chat-{index + 1}"]

    def report(self, index: int) -> LoadReport:
        """The newest report of a front."""
        return self.controllers[f"chat-{index + 1}"].latest

    def controller(self, index: int) -> Controller:
        return self.controllers[f"chat-{index + 1}"]

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            with self._telling:
                if self.introduces:
                    self._introduce()

    def _introduce(self) -> None:
        siblings = []
        for replica_id, controller in self.controllers.items():
            if controller.reports and self.fronts[replica_id].process.poll() is None:
                report = controller.latest
                siblings.append(
                    Sibling(
                        replica_id,
                        report.peer_socket,
                        report.stream_class,
                        report.state,
                        report.num_open + report.num_guests,
                        report.max_open,
                        report.leave_by_s,
                        kv_place=report.kv_place,
                    )
                )
        for replica_id, controller in self.controllers.items():
            others = [sibling for sibling in siblings if sibling.replica_id != replica_id]
            if controller.reports and self._told.get(replica_id) != others:
                self._told[replica_id] = others
                connect_hosts(Path(controller.latest.socket_path).parent, others)
                controller.tell(Siblings(others))

    def forget_each_other(self) -> None:
        """From now on each believes to be alone; `wait_ready` introduces them again."""
        self.introduces = False
        with self._telling:
            for replica_id, controller in self.controllers.items():
                self._told[replica_id] = []
                controller.tell(Siblings([]))

    def wait_ready(self) -> None:
        """Wait until all are ready and know each other."""
        self.introduces = True
        for front, controller in zip(self.fronts.values(), self.controllers.values(), strict=True):
            front.wait_ready()
            controller.wait_for(lambda report: report.state == "ready" and bool(report.stream_class))
        known = threading.Event()
        while not all(
            len([s for s in self._told.get(name, []) if s.state == "ready"]) == len(self.fronts) - 1
            for name in self.fronts
        ):
            assert not known.wait(0.01)

    def wait_host(self) -> int:
        """Return the index of the front that has guests, once one has."""
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            for index in range(len(self.fronts)):
                if self.report(index).num_guests:
                    return index
            time.sleep(0.01)
        raise AssertionError("no front has guests")

    @contextmanager
    def running(self) -> Iterator[Fronts]:
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join(5)


@contextmanager
def sibling_fronts(
    engines: list[EngineSpec], first_fields: Mapping[str, Any] | None = None, **spec_fields: Any
) -> Iterator[Fronts]:
    """Start a front for each engine. They are introduced to each other as they report, and start dead engines
    again at once. `first_fields`: of the first one's spec alone."""
    fronts = Fronts()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-siblings-")))
        running = []
        for number, engine in enumerate(engines, 1):
            replica_id = f"chat-{number}"
            (folder / replica_id).mkdir()
            path = str(folder / replica_id / "controller.sock")
            controller = Controller(path)
            stack.callback(controller.close)
            fields = {**spec_fields, **(first_fields or {})} if number == 1 else spec_fields
            front = running_front(
                engine, replica_id=replica_id, extra_sockets=[path], program=[QUICK_FRONT], **fields
            )
            running.append((replica_id, controller, stack.enter_context(front)))
        for replica_id, controller, process in running:
            fronts.fronts[replica_id] = process
            fronts.controllers[replica_id] = controller
        stack.enter_context(fronts.running())
        yield fronts
