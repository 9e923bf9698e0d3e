"""What the controller knows of its replicas: processes, load reports, crashes. Turns them into observations.

Owns the slots. Pure: events and `now_s` come in, `observe` goes out to the reconciler.
Must not know: sockets, launchers, or what is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.api.messages import LoadReport, ProcessState
from headrace.control.reconciler import (
    ObservedReplica,
    Phase,
    StartReplica,
    StopReplica,
    count_failures,
    phase_of,
    slot_prefix,
)

FIRST_REPORT_LIMIT_S = 20.0
"""How long a started front may take to its first load report, on a busy machine."""
ADOPTION_LIMIT_S = 4.0
"""How long a restarted controller waits for the reports of replicas that it finds running."""


@dataclass(slots=True)
class Slot:
    """One replica id: its process, if any, and what is remembered of earlier ones."""

    replica_id: str
    endpoint: str
    generation: str
    drain_grace_s: float
    started_s: float
    is_alive: bool = True
    is_stopping: bool = False
    keeps_slot: bool = False
    pid: int = 0
    report: LoadReport | None = None
    lease_ends_s: float = 0.0
    ready_since_s: float | None = None
    ended_s: float = 0.0
    failures: int = 0
    is_retryable: bool = True
    last_error: str = ""
    num_starts: int = 1
    phase: Phase = "starting"
    phase_since_s: float = 0.0


class Fleet:
    """All slots. Changed by events only, read through `observe`."""

    def __init__(self) -> None:
        self.slots: dict[str, Slot] = {}
        self._adopted: set[str] = set()
        """Taken over, and not heard of yet."""
        self._adopted_s = 0.0

    def __repr__(self) -> str:
        phases = [slot.phase for slot in self.slots.values()]
        return f"Fleet({', '.join(f'{phases.count(p)} {p}' for p in dict.fromkeys(phases)) or 'empty'})"

    # ---- what happened ----------------

    def adopt(self, processes: Sequence[ProcessState], generations: Mapping[str, str], now_s: float) -> None:
        """Take over replicas that were running before this controller. Until they report they count as
        what is wanted, so that nothing healthy is touched."""
        by_prefix = {slot_prefix(name): name for name in generations}
        for process in processes:
            prefix, _, number = process.name.rpartition("-")
            if not prefix or not number.isdigit():
                continue  # not a replica
            endpoint = by_prefix.get(prefix, prefix)
            slot = Slot(process.name, endpoint, generations.get(endpoint, ""), 30.0, now_s, pid=process.pid)
            slot.lease_ends_s = now_s + FIRST_REPORT_LIMIT_S
            slot.phase_since_s = now_s
            self.slots[process.name] = slot
            self._adopted.add(process.name)
        self._adopted_s = now_s

    def is_settled(self, now_s: float) -> bool:
        """Whether every adopted replica has reported or ended, or had the time to."""
        return not self._adopted or now_s - self._adopted_s > ADOPTION_LIMIT_S

    def on_started(self, process: ProcessState) -> None:
        slot = self.slots.get(process.name)
        if slot is None:
            return
        slot.pid = process.pid
        if slot.report is not None and slot.report.pid != process.pid:
            slot.report = None  # a last word of the process before this one

    def on_report(self, report: LoadReport, now_s: float) -> None:
        """Take a load report. One of an unknown, ended or earlier process is ignored."""
        slot = self.slots.get(report.replica_id)
        if slot is None or not slot.is_alive or (slot.pid and report.pid != slot.pid):
            return
        self._adopted.discard(report.replica_id)
        slot.report = report
        slot.endpoint = report.endpoint
        slot.generation = report.generation
        slot.lease_ends_s = now_s + report.lease_s
        if report.state != "ready":
            slot.ready_since_s = None
        elif slot.ready_since_s is None:
            slot.ready_since_s = now_s
        if report.last_error:
            slot.last_error = report.last_error
        slot.is_retryable = report.state != "failed" or report.is_retryable

    def on_ended(self, process: ProcessState, now_s: float) -> None:
        """A process ended. If that was not asked for, or asked for because it failed, its slot stays."""
        slot = self.slots.get(process.name)
        if slot is None:
            return
        self._adopted.discard(process.name)
        if slot.is_stopping and not slot.keeps_slot:
            del self.slots[process.name]
            return
        has_said_why = slot.report is not None and slot.report.state == "failed" and slot.last_error
        if not slot.keeps_slot and not has_said_why:
            slot.last_error = _describe_end(process)
        self._fail(slot, now_s)

    def on_refused(self, name: str, error: str, now_s: float) -> None:
        """The launcher could not do what was asked."""
        slot = self.slots.get(name)
        if slot is None or not slot.is_alive:
            return
        if slot.is_stopping and not slot.keeps_slot:
            del self.slots[name]
        elif slot.pid == 0 or slot.is_stopping:
            slot.last_error = error
            self._fail(slot, now_s)

    def _fail(self, slot: Slot, now_s: float) -> None:
        slot.failures = count_failures(_observe(slot), now_s)
        slot.is_alive = slot.is_stopping = slot.keeps_slot = False
        slot.ended_s = now_s
        slot.pid = 0
        slot.report = None
        slot.ready_since_s = None

    # ---- what was decided ----------------

    def start(self, action: StartReplica, generation: str, drain_grace_s: float, now_s: float) -> None:
        """Note that a replica is being started."""
        slot = self.slots.get(action.replica_id)
        if slot is None:
            slot = Slot(action.replica_id, action.endpoint, generation, drain_grace_s, now_s)
            slot.phase_since_s = now_s
            self.slots[action.replica_id] = slot
        else:
            slot.num_starts += 1
        slot.generation = generation
        slot.drain_grace_s = drain_grace_s
        slot.started_s = now_s
        slot.is_alive = True
        slot.lease_ends_s = now_s + FIRST_REPORT_LIMIT_S

    def stop(self, action: StopReplica) -> None:
        """Note that a replica is being stopped."""
        slot = self.slots[action.replica_id]
        slot.is_stopping = True
        slot.keeps_slot = action.is_failure
        if action.is_failure:
            slot.last_error = action.reason

    def forget(self, replica_id: str) -> None:
        """Give a slot up: now if it has no process, else when its process has ended."""
        slot = self.slots[replica_id]
        slot.keeps_slot = False
        if not slot.is_alive:
            del self.slots[replica_id]

    def forgive(self, endpoint: str) -> None:
        """Forget failures: the user changed something, so try again at once."""
        for slot in self.slots.values():
            if slot.endpoint == endpoint and not slot.is_alive:
                slot.failures = 0
                slot.is_retryable = True

    # ---- what is seen ----------------

    def observe(self, now_s: float) -> list[ObservedReplica]:
        """Return all slots as the reconciler sees them."""
        observed = []
        for slot in self.slots.values():
            replica = _observe(slot)
            phase = phase_of(replica, now_s)
            if phase != slot.phase:
                slot.phase, slot.phase_since_s = phase, now_s
            observed.append(replica)
        return observed


def _observe(slot: Slot) -> ObservedReplica:
    report = slot.report
    return ObservedReplica(
        replica_id=slot.replica_id,
        endpoint=slot.endpoint,
        generation=slot.generation,
        is_alive=slot.is_alive,
        is_stopping=slot.is_stopping,
        started_s=slot.started_s,
        lease_ends_s=slot.lease_ends_s,
        report_state=report.state if report is not None else None,
        ready_since_s=slot.ready_since_s,
        num_open=report.num_open if report is not None else 0,
        keeps_slot=slot.keeps_slot,
        drain_grace_s=slot.drain_grace_s,
        ended_s=slot.ended_s,
        failures=slot.failures,
        is_retryable=slot.is_retryable,
        last_error=slot.last_error,
    )


def _describe_end(process: ProcessState) -> str:
    code = process.exit_code
    if code is not None and code < 0:
        ending = f"ended by signal {-code}"
    else:
        ending = f"exited with {code}"
    last_line = process.last_output.splitlines()[-1].strip() if process.last_output else ""
    return f"{ending}: {last_line}" if last_line else ending
