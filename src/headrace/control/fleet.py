"""What the controller knows of its replicas: processes, load reports, crashes. Turns them into observations.

Owns the slots. Pure: events and `now_s` come in, `observe` goes out to the reconciler.
Must not know: sockets, launchers, or what is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.api.messages import LoadReport, ProcessState, is_same_process
from headrace.control.essentials import STOOD_STILL_S
from headrace.control.node_drains import NodeDrains
from headrace.control.notices import MachineNotices
from headrace.control.process_ends import describe_end
from headrace.control.reconciler import StartReplica, StopReplica
from headrace.control.slots import ObservedReplica, Phase, Role, count_failures, phase_of, slot_prefix
from headrace.control.start_times import StartTimes

FIRST_REPORT_LIMIT_S = 20.0
"""How long a started front may take to its first load report, on a busy machine."""
ADOPTION_LIMIT_S = 4.0
"""How long a restarted controller waits for the reports of replicas that it finds running."""
WAKE_LIMIT_S = 10.0
"""A replica that was told to wake and is not ready by then stays a standby; another one is taken."""
REST_LIMIT_S = 20.0
"""A front waits 5 s for its routers and what is open, and its engine may take its time."""
CHANGE_RETRY_S = 30.0
"""After it could not sleep or wake, a replica is not asked again for so long."""
HITS_MEMORY_S = 120.0
"""Tokens that a prefix cache spared count as being in demand for about this long."""


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
    silent_from_s: float = -math.inf
    ready_since_s: float | None = None
    ended_s: float = 0.0
    failures: int = 0
    is_retryable: bool = True
    last_error: str = ""
    num_starts: int = 1
    phase: Phase = "starting"
    phase_since_s: float = 0.0
    role: Role = "serving"
    change_since_s: float | None = None
    """Since when it is asked to become what its role says: asleep or awake."""
    promoted_s: float | None = None
    """When it was last told to leave standby."""
    change_phase: str = ""
    """What it said of its sleep when it was asked."""
    no_change_before_s: float = -math.inf
    node: str = ""
    """Id of the node that its process is on; empty: this machine."""
    node_address: str = ""
    """As in ProcessState."""
    is_told_to_leave: bool = False
    """Its node is drained, and it is to leave by itself."""
    waiting_for: str = ""
    """What its start waits for, or why nothing is heard of it, in the launcher's words."""
    has_started: bool = False
    """Its process was ready, or asleep, once."""
    is_adopted: bool = False
    """Its process was started by an earlier controller, nobody knows when."""
    hit_tokens: float = 0.0
    """Prompt tokens that its cache spared, fading."""
    hits_seen: int = 0
    hits_s: float = 0.0


class Fleet:
    """All slots. Changed by events only, read through `observe`."""

    def __init__(self, notices: MachineNotices | None = None) -> None:
        """notices: of the machines, heard by another fleet, too."""
        self.slots: dict[str, Slot] = {}
        self.notices = notices or MachineNotices()
        self.drains = NodeDrains()
        self._adopted: set[str] = set()
        """Taken over, and not heard of yet."""
        self._adopted_s = 0.0
        self._observed_s = math.inf
        self._with_standby: frozenset[str] = frozenset()
        self._start_times: dict[str, StartTimes] = {}
        """By endpoint; bounded by the endpoints that there were."""

    def __repr__(self) -> str:
        phases = [slot.phase for slot in self.slots.values()]
        return f"Fleet({', '.join(f'{phases.count(p)} {p}' for p in dict.fromkeys(phases)) or 'empty'})"

    # ---- what happened ----------------

    def adopt(
        self,
        processes: Sequence[ProcessState],
        generations: Mapping[str, str],
        now_s: float,
        with_standby: Collection[str] = (),
    ) -> None:
        """Take over replicas that were running before this controller. Until they report they count as
        what is wanted, so that nothing healthy is touched. with_standby: endpoints that keep replicas on
        standby; one of others that sleeps was put to sleep by a user."""
        self._with_standby = frozenset(with_standby)
        by_prefix = {slot_prefix(name): name for name in generations}
        for process in processes:
            prefix, _, number = process.name.rpartition("-")
            if not prefix or not number.isdigit():
                continue  # not a replica
            endpoint = by_prefix.get(prefix, prefix)
            slot = Slot(process.name, endpoint, generations.get(endpoint, ""), 30.0, now_s, pid=process.pid)
            slot.lease_ends_s = now_s + FIRST_REPORT_LIMIT_S
            slot.phase_since_s = now_s
            slot.is_adopted, slot.node, slot.node_address = True, process.node, process.node_address
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
        slot.node, slot.node_address, slot.waiting_for = process.node, process.node_address, ""
        if slot.report is not None and not is_same_process(slot.report, process):
            slot.report = None  # a last word of the process before this one

    def on_waiting(self, name: str, reason: str, now_s: float) -> None:
        """The launcher waits for a place for it, or hears nothing of where it is."""
        slot = self.slots.get(name)
        if slot is None or not slot.is_alive:
            return
        slot.waiting_for = reason
        if slot.pid == 0:
            slot.lease_ends_s = now_s + FIRST_REPORT_LIMIT_S

    def on_report(self, report: LoadReport, now_s: float) -> None:
        """Take a load report. One of an unknown, ended or earlier process is ignored."""
        slot = self.slots.get(report.replica_id)
        if slot is None or not slot.is_alive or (slot.pid and not is_same_process(report, slot)):
            return
        self._adopted.discard(report.replica_id)
        self._follow_sleep(slot, report, now_s)
        _count_hits(slot, report, now_s)
        slot.report, slot.waiting_for = report, ""
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
        if report.leave_by_s >= 0 and slot.pid:  # without its pid its node is not known
            started_s = -math.inf if slot.is_adopted else slot.started_s
            self.notices.note(slot.node, slot.endpoint, report.leave_by_s, started_s, now_s)

    def on_ended(self, process: ProcessState, now_s: float) -> None:
        """A process ended. If that was not asked for, or asked for because it failed, its slot stays."""
        slot = self.slots.get(process.name)
        if slot is None:
            return
        self._adopted.discard(process.name)
        is_leaving = slot.report is not None and slot.report.state == "draining" and process.exit_code == 0
        if (slot.is_stopping or is_leaving) and not slot.keeps_slot:
            del self.slots[process.name]  # asked to leave, or left by itself because its machine does
            return
        has_said_why = slot.report is not None and slot.report.state == "failed" and slot.last_error
        if not slot.keeps_slot and not has_said_why:
            slot.last_error = describe_end(process)
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
        slot.failures = count_failures(_observe(slot, now_s), now_s)
        slot.is_alive = slot.is_stopping = slot.keeps_slot = False
        slot.ended_s, slot.pid = now_s, 0
        slot.node = slot.node_address = slot.waiting_for = ""
        slot.report = None
        slot.ready_since_s = None
        slot.change_since_s = None
        slot.is_told_to_leave = False

    def _follow_sleep(self, slot: Slot, report: LoadReport, now_s: float) -> None:
        """See whether it sleeps or wakes as asked; a replica that does so unasked is what it makes itself."""
        if report.state in ("ready", "standby") and not slot.has_started:
            slot.has_started = True
            phases = report.engine_info.phases if report.engine_info is not None else {}
            seconds = sum(phases.values()) if slot.is_adopted else now_s - slot.started_s
            self.starts_of(report.endpoint).add("cold", seconds)
            if slot.is_adopted and report.state == "standby":
                slot.role = "standby" if slot.endpoint in self._with_standby else "resting"
        since_s = slot.change_since_s
        if since_s is None:
            if slot.role != "resting" and report.state in ("ready", "standby"):
                slot.role = "serving" if report.state == "ready" else "standby"
        elif _has_changed(slot, report):
            slot.change_since_s = None
            if slot.role == "serving":
                self.starts_of(slot.endpoint).add("standby", now_s - since_s)
        elif _has_refused(slot, report):
            self._give_up_change(slot, report.phase, now_s)

    def _give_up_change(self, slot: Slot, error: str, now_s: float) -> None:
        slot.last_error = f"it could not {'sleep' if slot.role == 'standby' else 'wake'}: {error}"
        slot.role = "serving" if slot.role == "standby" else "standby"
        slot.change_since_s = None
        slot.no_change_before_s = now_s + CHANGE_RETRY_S

    def starts_of(self, endpoint: str) -> StartTimes:
        """Return what is remembered of an endpoint's starts."""
        return self._start_times.setdefault(endpoint, StartTimes())

    # ---- what was decided ----------------

    def start(self, action: StartReplica, drain_grace_s: float, now_s: float) -> None:
        """Note that a replica is being started."""
        generation = action.generation
        slot = self.slots.get(action.replica_id)
        if slot is None:
            slot = Slot(action.replica_id, action.endpoint, generation, drain_grace_s, now_s)
            slot.phase_since_s = now_s
            self.slots[action.replica_id] = slot
        else:
            slot.num_starts += 1
            if slot.generation != generation:  # another version did nothing wrong yet
                slot.failures, slot.is_retryable = 0, True
        slot.generation = generation
        slot.role = "standby" if action.is_standby else "serving"
        slot.change_since_s = None
        slot.no_change_before_s = -math.inf
        slot.promoted_s = None
        slot.has_started = slot.is_adopted = slot.is_told_to_leave = False
        slot.hit_tokens, slot.hits_seen = 0.0, 0
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

    def ask_sleep(self, replica_id: str, now_s: float, *, is_standby: bool) -> None:
        """Note that a replica is told to sleep and be a standby, or to wake and serve."""
        slot = self.slots[replica_id]
        slot.role = "standby" if is_standby else "serving"
        slot.change_since_s = now_s
        slot.promoted_s = None if is_standby else now_s
        slot.change_phase = slot.report.phase if slot.report is not None else ""

    def rest(self, replica_id: str, *, is_asleep: bool) -> None:
        """Note that a user puts a replica to sleep, or wakes it: then it is nobody else's to wake."""
        slot = self.slots[replica_id]
        slot.role = "resting" if is_asleep else "serving"
        slot.change_since_s = None

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

    def of(self, endpoint: str) -> list[Slot]:
        """Return an endpoint's slots."""
        return [slot for slot in self.slots.values() if slot.endpoint == endpoint]

    def observe(self, now_s: float) -> list[ObservedReplica]:
        """Return all slots as the reconciler sees them."""
        observed = []
        self._excuse_silence(now_s)
        for slot in self.slots.values():
            limit_s = REST_LIMIT_S if slot.role == "standby" else WAKE_LIMIT_S
            if slot.change_since_s is not None and now_s - slot.change_since_s > limit_s:
                self._give_up_change(slot, f"it did not within {limit_s:g} s", now_s)
            replica = replace(_observe(slot, now_s), is_node_draining=slot.node in self.drains)
            phase = phase_of(replica, now_s)
            if phase != slot.phase:
                slot.phase, slot.phase_since_s = phase, now_s
            observed.append(replica)
        return observed

    def _excuse_silence(self, now_s: float) -> None:
        """After a look that came late nobody's silence has grown: it was the controller that stood still."""
        late_s, self._observed_s = now_s - self._observed_s, now_s
        if late_s > STOOD_STILL_S:
            for slot in self.slots.values():
                slot.silent_from_s = min(now_s, max(slot.lease_ends_s, slot.silent_from_s) + late_s)


def _observe(slot: Slot, now_s: float) -> ObservedReplica:
    report = slot.report
    return ObservedReplica(
        replica_id=slot.replica_id,
        endpoint=slot.endpoint,
        generation=slot.generation,
        is_alive=slot.is_alive,
        is_stopping=slot.is_stopping,
        started_s=slot.started_s,
        lease_ends_s=slot.lease_ends_s,
        silent_from_s=slot.silent_from_s,
        report_state=report.state if report is not None else None,
        ready_since_s=slot.ready_since_s,
        num_open=report.num_streams if report is not None else 0,
        keeps_slot=slot.keeps_slot,
        drain_grace_s=slot.drain_grace_s,
        ended_s=slot.ended_s,
        failures=slot.failures,
        is_retryable=slot.is_retryable,
        last_error=slot.last_error,
        role=slot.role,
        is_changing=slot.change_since_s is not None,
        can_change=now_s >= slot.no_change_before_s,
        lost_tokens=_lost_tokens(slot, now_s),
        is_leaving=report is not None and report.leave_by_s >= 0,
        node=slot.node,
        is_told_to_leave=slot.is_told_to_leave,
    )


def _has_changed(slot: Slot, report: LoadReport) -> bool:
    """Whether a report says that it sleeps, or serves, as it was asked to."""
    if slot.role == "standby":
        return report.state == "standby" and report.phase.startswith("asleep")
    return report.state == "ready"


def _has_refused(slot: Slot, report: LoadReport) -> bool:
    """Whether a report says that it stays as it was, and why. Asked to sleep it goes through the state
    standby in any case, and may come back from it."""
    if not report.phase or report.phase == slot.change_phase:
        return False
    if slot.role == "standby":
        return report.state == "ready"
    is_on_its_way = report.phase == "waking" or report.phase.startswith(("asleep at", "falling asleep"))
    return report.state == "standby" and not is_on_its_way


def _count_hits(slot: Slot, report: LoadReport, now_s: float) -> None:
    hits = report.engine.prefix_hit_tokens if report.engine is not None else 0
    slot.hit_tokens = _faded_hits(slot, now_s) + max(0, hits - slot.hits_seen)
    slot.hits_seen, slot.hits_s = hits, now_s


def _faded_hits(slot: Slot, now_s: float) -> float:
    return slot.hit_tokens * math.exp(-max(0.0, now_s - slot.hits_s) / HITS_MEMORY_S)


def _lost_tokens(slot: Slot, now_s: float) -> float:
    """Tokens that would be computed again elsewhere: those that open requests hold in KV memory, and as many
    as the cache spared lately."""
    report = slot.report
    if report is None or report.engine is None or report.engine_info is None:
        return 0.0
    num_used = max(0, report.engine.num_total_blocks - report.engine.num_free_blocks)
    return num_used * report.engine_info.block_size + _faded_hits(slot, now_s)
