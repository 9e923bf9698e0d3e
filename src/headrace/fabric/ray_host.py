"""A host: the detached actor that holds one group of processes on the node where Ray placed it.

Ray starts it, watches it and carries its few messages; no request and no token passes here. It holds a keeper
(`headrace.fabric.keeper`), which holds the processes and ends with it. Must not know: what they do.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from itertools import islice
from pathlib import Path

import msgspec

import headrace
from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import (
    ProcessEnded,
    ProcessSpec,
    ProcessStarted,
    ProcessState,
    StartProcess,
)
from headrace.errors import HeadraceError, ProtocolError
from headrace.fabric.host_messages import (
    CONTROLLER_GROUP,
    HostCommand,
    HostEvent,
    HostEvents,
    HostReport,
    JoinSystem,
    Membership,
    TunnelsOpened,
)
from headrace.fabric.shared_run_directory import SharedRunDirectory, host_run_directory

MAX_EVENTS = 1000
"""Events that are kept for a controller that is away; its next one asks what is alive."""
KEEPER_START_LIMIT_S = 20.0
ASK_LIMIT_S = 10.0
END_LIMIT_S = 6.0
DEATH_INFO_WAIT_MS = 200
"""How long a call of the controller whose connection broke waits for the reason. Ray looks once a second
whether it was so long: its own 1000 ms make that two seconds with a node that is gone."""
_READ_BYTES = 65536


class Host:
    """Holds processes through its keeper. Its methods run in the actor's threads, and none waits for ever."""

    def __init__(
        self, system: str, group: str, node_id: str, address: str, membership: Membership | None = None
    ) -> None:
        """Start the keeper. A failure is told by `describe`. membership: None if there is one host only."""
        self._node_id, self._address = node_id, address
        self._processes: dict[str, ProcessState] = {}
        self._events: deque[HostEvent] = deque(maxlen=MAX_EVENTS)
        self._sequence = 0
        self._changed = threading.Condition()
        self._is_ready = False
        self._num_failures = 0
        self._error = ""
        self._run_dir = self._last_output = self._tunnels = ""
        try:
            self._run_dir = str(host_run_directory(system, address))
            self._start_keeper(group)
            if membership is not None:
                with contextlib.suppress(BrokenPipeError):  # its last words say more
                    self._connection.sendall(encode_frame(JoinSystem(membership, address)))
        except (HeadraceError, OSError) as error:
            self._error = str(error)

    def __repr__(self) -> str:
        return f"Host({', '.join(self._processes) or 'nothing'})"

    def describe(self) -> bytes:
        """Return a HostReport, as soon as the keeper is there or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_ready or self._error, KEEPER_START_LIMIT_S)
            error = self._error or ("" if self._is_ready else "its keeper does not start")
            report = HostReport(
                headrace.__version__,
                self._node_id,
                self._address,
                self._run_dir,
                self._sequence,
                list(self._processes.values()),
                error,
                self._last_output,
                self._num_failures,
                self._tunnels,
            )
        return msgspec.msgpack.encode(report)

    def obey(self, command: bytes) -> bytes:
        """Pass a HostCommand on. What comes of it are events."""
        decoded = msgspec.msgpack.decode(command, type=HostCommand)
        self._connection.sendall(encode_frame(decoded))
        return b""

    def poll(self, after: int, limit_s: float) -> bytes:
        """Return the HostEvents after event number `after`, or none once `limit_s` passed."""
        with self._changed:
            self._changed.wait_for(lambda: self._sequence > after or self._error, limit_s)
            if self._error:
                raise RuntimeError(self._error)
            num_new = min(self._sequence - after, len(self._events))
            events = list(islice(self._events, len(self._events) - num_new, None)) if num_new > 0 else []
            return msgspec.msgpack.encode(HostEvents(self._sequence, events))

    def ask(self, name: str, frame: bytes) -> bytes:
        """Send one frame to the socket `name` of the run directory, and return the bytes of the answer.
        Nothing: nobody listens, or there was no answer within the limit."""
        answer = b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, contextlib.suppress(OSError):
            connection.settimeout(ASK_LIMIT_S)
            connection.connect(os.path.join(self._run_dir, os.path.basename(name)))
            connection.sendall(frame)
            deadline_s = time.monotonic() + ASK_LIMIT_S
            while time.monotonic() < deadline_s and (data := connection.recv(_READ_BYTES)):
                answer += data
                if len(answer) >= 4 + int.from_bytes(answer[:4], "big"):
                    return answer
        return b""

    def end(self) -> bytes:
        """End everything that it holds, and clean up. The end of the actor's process does the first only."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with self._changed:
            self._changed.wait_for(lambda: self._error, END_LIMIT_S)
        return b""

    def _start_keeper(self, group: str) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(None)
        argv = [
            sys.executable,
            "-P",
            "-m",
            "headrace.fabric.keeper",
            str(theirs.fileno()),
            self._run_dir,
            group,
        ]
        with theirs:
            keeper = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # it goes when our end of the socket closes, and cleans up then
            )
        self._connection = ours
        threading.Thread(target=self._take_events, args=(ours, keeper), daemon=True).start()

    def _take_events(self, connection: socket.socket, keeper: subprocess.Popen[bytes]) -> None:
        decoder: FrameDecoder[HostEvent] = FrameDecoder(HostEvent)
        with contextlib.suppress(OSError, ProtocolError):  # its end follows
            while data := connection.recv(_READ_BYTES):
                with self._changed:
                    for event in decoder.feed(data):
                        self._note(event)
                    self._changed.notify_all()
        connection.close()
        assert keeper.stderr is not None
        with keeper.stderr:
            last_words = keeper.stderr.read().decode("utf-8", "replace").strip().splitlines()[-1:]
        code = keeper.wait()
        with contextlib.suppress(HeadraceError, OSError):  # one that was killed could not clean up
            SharedRunDirectory.join(Path(self._run_dir)).leave()
        with self._changed:
            self._error = f"its keeper ended with {code}: {last_words[0] if last_words else 'no word'}"
            self._changed.notify_all()

    def _note(self, event: HostEvent) -> None:
        if not self._is_ready:  # the keeper's first word has nothing in it
            self._is_ready = True
            return
        if isinstance(event, ProcessStarted):
            self._processes[event.process.name] = event.process
        elif isinstance(event, ProcessEnded):
            self._processes.pop(event.process.name, None)
            self._num_failures += event.process.exit_code != 0
            self._last_output = event.process.last_output
        elif isinstance(event, TunnelsOpened):
            self._tunnels = event.address
        self._events.append(event)
        self._sequence += 1


class HostActor(Host):
    """A host as Ray starts it: it learns from Ray where it is."""

    def __init__(self, system: str, group: str, membership: bytes) -> None:
        node_id, address = _here()
        decoded = msgspec.msgpack.decode(membership, type=Membership)
        super().__init__(system, group, node_id, address, decoded)


class ControllerActor(Host):
    """The controller's host: Ray starts it again wherever it ended, and it starts the controller."""

    def __init__(self, system: str, spec: bytes, identity: bytes) -> None:
        import ray

        node_id, address = _here()
        super().__init__(system, CONTROLLER_GROUP, node_id, address, Membership(identity, address))
        if not self._error:
            decoded = msgspec.msgpack.decode(spec, type=ProcessSpec)
            environment = {
                **decoded.environment,
                "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
                "RAY_timeout_ms_task_wait_for_death_info": str(DEATH_INFO_WAIT_MS),
            }
            decoded = msgspec.structs.replace(decoded, environment=environment)
            self._connection.sendall(encode_frame(StartProcess(decoded)))


def _here() -> tuple[str, str]:
    """The id and the address of the node that this actor is on."""
    import ray

    return ray.get_runtime_context().get_node_id(), str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
