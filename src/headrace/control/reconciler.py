"""The reconciler: what is wanted and what is seen, to actions with their reasons. Pure.

Owns counts per version, standby, victims and replacement. Must not know asyncio, time, sockets or processes:
`now_s` comes in, actions go out, and the same code runs in the simulator.

Ready replicas are taken only as far as the others that are ready are enough (with `surge` 0 one less than
that, while versions change). Draining replicas count towards the endpoint's maximum plus the surge, because
they still hold memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace.control.slots import (
    ObservedReplica,
    Phase,
    is_evacuated,
    lowest_free_id,
    phase_of,
    restart_due_s,
    slot_prefix,
)


@dataclass(frozen=True, slots=True)
class WantedVersion:
    """How many serving replicas one generation is to have."""

    generation: str
    """Hash of what its replicas are started with; live replicas of no wanted hash are replaced."""
    count: int


@dataclass(frozen=True, slots=True)
class DesiredEndpoint:
    """What is wanted of one endpoint."""

    name: str
    count: int
    """Serving replicas over all versions. While versions change, up to `surge` more than that may run."""
    max_count: int
    versions: tuple[WantedVersion, ...]
    """Their counts sum to at most count + surge."""
    standby: int = 0
    """Replicas kept asleep beside them, as far as the maximum has room."""
    standby_generation: str = ""
    surge: int = 1
    reason: str = ""
    """Why the count is what it is."""
    hold_off: str = ""
    """Why no replica may be started now; empty: they may be."""
    id_prefix: str = ""
    """What its ids begin with; empty: its name, made safe."""

    @property
    def num_standby(self) -> int:
        """How many replicas on standby are wanted: more than may ever be promoted are of no use."""
        return max(0, min(self.standby, self.max_count - self.count))


@dataclass(frozen=True, slots=True)
class StartReplica:
    replica_id: str
    endpoint: str
    reason: str
    generation: str = ""
    is_standby: bool = False
    gateway_id: str = ""
    """Not a replica: a durable front of this gateway."""


@dataclass(frozen=True, slots=True)
class StopReplica:
    """grace_s 0 kills at once. `is_failure`: count it as a crash; the slot stays and backs off."""

    replica_id: str
    endpoint: str
    grace_s: float
    reason: str
    is_failure: bool = False


@dataclass(frozen=True, slots=True)
class ForgetReplica:
    """Give up a slot that has no process, or whose process is being stopped: nothing wants it any more."""

    replica_id: str
    endpoint: str
    reason: str


@dataclass(frozen=True, slots=True)
class PromoteReplica:
    """Wake a replica on standby: it is to serve."""

    replica_id: str
    endpoint: str
    reason: str


@dataclass(frozen=True, slots=True)
class RestReplica:
    """Let a ready replica sleep: it becomes a standby that was missing."""

    replica_id: str
    endpoint: str
    reason: str


@dataclass(frozen=True, slots=True)
class LeaveReplica:
    """Tell a replica by when its node goes away: it leaves by itself."""

    replica_id: str
    endpoint: str
    reason: str


Action = StartReplica | StopReplica | ForgetReplica | PromoteReplica | RestReplica | LeaveReplica


def reconcile(
    desired: Sequence[DesiredEndpoint], observed: Sequence[ObservedReplica], now_s: float
) -> list[Action]:
    """Return what to do now. Nothing, when what is seen is what is wanted."""
    by_endpoint: dict[str, list[ObservedReplica]] = {endpoint.name: [] for endpoint in desired}
    actions: list[Action] = []
    for replica in observed:
        if replica.endpoint in by_endpoint:
            by_endpoint[replica.endpoint].append(replica)
        else:
            actions += _remove(replica, phase_of(replica, now_s), "its endpoint was removed")
    for endpoint in desired:
        actions += _Turn(endpoint, by_endpoint[endpoint.name], now_s).run()
    return actions


class _Turn:
    """One endpoint's decisions at one moment."""

    def __init__(self, desired: DesiredEndpoint, replicas: Sequence[ObservedReplica], now_s: float) -> None:
        self.desired = desired
        self.now_s = now_s
        self.actions: list[Action] = []
        self.taken = {replica.replica_id for replica in replicas}
        self.wanted = {version.generation: version.count for version in desired.versions}
        phases = {replica.replica_id: phase_of(replica, now_s) for replica in replicas}
        self.phases: dict[str, Phase] = phases
        # A draining replica has given its slot up, one whose node is drained is about to. One that leaves by
        # itself, because its machine does, takes no room from its replacement, unless there is none for more
        # than what is wanted.
        is_leaving = {
            r.replica_id for r in replicas if phases[r.replica_id] == "draining" or is_evacuated(r, now_s)
        }
        by_itself = {r.replica_id for r in replicas if r.replica_id in is_leaving and not r.is_stopping}
        self.num_alive = sum(
            r.is_alive for r in replicas if not (desired.surge and r.replica_id in by_itself)
        )
        self.slots = [replica for replica in replicas if replica.replica_id not in is_leaving]

    def run(self) -> list[Action]:
        self._stop_broken()
        for replica in [replica for replica in self.slots if self._is_outdated(replica)]:
            if self._phase(replica) == "starting":
                self._drop(replica, "the config changed before it was ready")
        missing = self._promote()
        self._drop_surplus(sum(missing.values()) > 0)
        missing_standby = self._tend_standby()
        self._fill_up(missing, missing_standby)
        return self.actions

    # ---- what is there ----------------

    def _phase(self, replica: ObservedReplica) -> Phase:
        return self.phases[replica.replica_id]

    def _serves(self, replica: ObservedReplica) -> bool:
        """It is ready, and has said so lately: gateways send nothing to one whose lease ended."""
        return self._phase(replica) == "ready" and self.now_s <= replica.lease_ends_s

    def _is_running(self, replica: ObservedReplica) -> bool:
        """It has a process that is to stay. The other slots wait to be started again, as whatever is
        needed then."""
        return replica.is_alive and not replica.is_stopping

    def _is_outdated(self, replica: ObservedReplica) -> bool:
        if not self._is_running(replica):
            return False
        if replica.role == "standby":
            return replica.generation != self.desired.standby_generation
        return replica.generation not in self.wanted

    @property
    def _serving(self) -> list[ObservedReplica]:
        return [slot for slot in self.slots if self._is_running(slot) and slot.role != "standby"]

    @property
    def _standby(self) -> list[ObservedReplica]:
        return [slot for slot in self.slots if self._is_running(slot) and slot.role == "standby"]

    @property
    def _idle(self) -> list[ObservedReplica]:
        """Slots without a process, or whose broken process is being killed; the longest waiting first."""
        idle = [slot for slot in self.slots if not self._is_running(slot)]
        return sorted(idle, key=lambda slot: (slot.ended_s, slot.replica_id))

    @property
    def _is_replacing(self) -> bool:
        return self.desired.count > 0 and (
            len(self.wanted) > 1 or any(slot.generation not in self.wanted for slot in self._serving)
        )

    # ---- decisions ----------------

    def _stop_broken(self) -> None:
        """Hung and failed replicas go at once: they serve nothing. Their slots stay and back off."""
        for index, replica in enumerate(self.slots):
            phase = self._phase(replica)
            if not self._is_running(replica) or phase not in ("lost", "failed"):
                continue
            if phase == "lost":
                reason = f"no load report for {replica.silent_s(self.now_s):.0f} s after its lease"
            else:
                reason = replica.last_error or "failed without saying why"
            self.slots[index] = replace(replica, is_stopping=True, keeps_slot=True)
            self.phases[replica.replica_id] = "failed"
            grace_s = stop_grace_s(replica, phase)
            stop = StopReplica(replica.replica_id, self.desired.name, grace_s, reason, is_failure=True)
            self.actions.append(stop)

    def _promote(self) -> dict[str, int]:
        """Let replicas on standby serve where some are missing. Return how many are missing then, by
        generation; a standby that still starts is on its way and not replaced by a cold start, unless
        nothing could be started for it now: then it stays what it was started as."""
        most = self.desired.count + (self.desired.surge if self._is_replacing else 0)
        missing: dict[str, int] = {}
        for generation, count in self.wanted.items():
            missing[generation] = count - sum(slot.generation == generation for slot in self._serving)
            standby = [slot for slot in self._standby if slot.generation == generation and slot.can_change]
            standby.sort(key=lambda slot: (self._phase(slot) != "standby", slot.started_s))
            for slot in standby[: max(missing[generation], 0)]:
                can_serve = self._phase(slot) == "standby" and not slot.is_changing
                if not can_serve and len(self._serving) >= most:
                    continue
                missing[generation] -= 1
                if can_serve:
                    reason = f"{self.desired.count} wanted: {self.desired.reason}"
                    self.actions.append(PromoteReplica(slot.replica_id, self.desired.name, reason))
                else:
                    self.phases[slot.replica_id] = "starting"  # it cannot serve yet, whatever it reports
                self.slots[self.slots.index(slot)] = replace(slot, role="serving", is_changing=True)
        return {generation: count for generation, count in missing.items() if count > 0}

    def _drop_surplus(self, is_some_missing: bool) -> None:
        """More than wanted, of a version or of none that is wanted: those go whose loss costs least, ready
        ones only while the rest is enough."""
        needed = self.desired.count
        can_start = not self.desired.hold_off
        if self.desired.surge == 0 and is_some_missing and self._is_replacing and can_start:
            needed -= 1
        num_serving = sum(map(self._serves, self._serving))
        num_ready = sum(self._phase(slot) == "ready" for slot in self._serving)
        surplus = [slot for slot in self._serving if slot.generation not in self.wanted]
        for generation, count in self.wanted.items():
            members = [slot for slot in self._serving if slot.generation == generation]
            surplus += sorted(members, key=self._cost_of_loss)[: max(len(members) - count, 0)]
        is_replacing = self._is_replacing
        for victim in sorted(surplus, key=self._cost_of_loss):
            serves, is_ready = self._serves(victim), self._phase(victim) == "ready"
            # All fall silent at once when it was this controller that stood still: they are still needed.
            if is_ready and (num_serving if serves else num_ready) <= needed:
                continue
            num_serving -= serves
            num_ready -= is_ready
            if serves and self._can_rest(victim):
                reason = f"{self.desired.count} wanted, and a standby is missing: {self.desired.reason}"
                self.actions.append(RestReplica(victim.replica_id, self.desired.name, reason))
                resting = replace(victim, role="standby", is_changing=True)
                self.slots[self.slots.index(victim)] = resting
                continue
            why = "versions change" if is_replacing else f"{self.desired.count} wanted: {self.desired.reason}"
            self._drop(victim, f"{why}; {self._describe_loss(victim)}")

    def _can_rest(self, replica: ObservedReplica) -> bool:
        current = [s for s in self._standby if s.generation == self.desired.standby_generation]
        return (
            replica.generation == self.desired.standby_generation
            and replica.can_change
            and not replica.num_open
            and not replica.is_leaving
            and len(current) < self.desired.num_standby
        )

    def _cost_of_loss(self, replica: ObservedReplica) -> tuple[int, bool, bool, float, int, float]:
        """Not ready, or silent, first; then outdated ones, those that leave anyway, the fewest tokens that
        would be computed again, the fewest open requests, the newest."""
        order = {"starting": 0, "standby": 1}.get(self._phase(replica), 2 + self._serves(replica))
        is_current = not self._is_outdated(replica)
        work = replica.lost_tokens, replica.num_open
        return order, is_current, not replica.is_leaving, *work, -replica.started_s

    def _describe_loss(self, replica: ObservedReplica) -> str:
        if self._phase(replica) != "ready":
            return f"it is {self._phase(replica)}"
        if not self._serves(replica):
            return "its last load report is too old"
        if self._is_outdated(replica):
            return f"an old version with {replica.num_open} open"
        return f"its loss costs least: {replica.num_open} open, {replica.lost_tokens:.0f} tokens in demand"

    def _tend_standby(self) -> int:
        """Drop replicas on standby that are too many, and outdated ones one by one. Return how many are
        missing."""
        current = [slot for slot in self._standby if not self._is_outdated(slot)]
        outdated = [slot for slot in self._standby if self._is_outdated(slot)]
        wanted = self.desired.num_standby
        for slot in sorted(current, key=lambda slot: -slot.started_s)[: max(len(current) - wanted, 0)]:
            self._drop(slot, f"{wanted} on standby are enough")
            current.remove(slot)
        num_surplus = max(len(current) + len(outdated) - wanted, 0)
        is_one_missing = len(current) + len(outdated) < wanted
        is_one_coming = is_one_missing or any(self._phase(slot) == "starting" for slot in current)
        for slot in outdated[: num_surplus + (not is_one_coming)]:
            self._drop(slot, "an old version on standby is replaced")
            outdated.remove(slot)
        return wanted - len(current) - len(outdated)

    def _fill_up(self, missing: dict[str, int], missing_standby: int) -> None:
        """Start what is missing: in slots that are due, then in new ones, within the maximum and the surge.
        Slots for which there is no use are given up."""
        desired = self.desired
        extra = desired.surge if self._is_replacing else 0
        num_new = desired.count + extra - len(self._serving)
        idle = self._idle
        plan: list[tuple[str, bool]] = []
        for generation, count in missing.items():
            plan += [(generation, False)] * count
        plan = plan[: max(num_new, 0)] + [(desired.standby_generation, True)] * max(missing_standby, 0)
        used: list[tuple[ObservedReplica, str, bool]] = []
        for generation, is_standby in list(plan):  # its own version first: there its back-off counts
            slot = next((slot for slot in idle if slot.generation == generation), None)
            if slot is not None:
                idle.remove(slot)
                plan.remove((generation, is_standby))
                used.append((slot, generation, is_standby))
        while plan and idle:
            used.append((idle.pop(0), *plan.pop(0)))
        for slot in idle:
            self._drop(slot, f"{desired.count} wanted: {desired.reason}")
        self._start(used, plan)

    def _start(self, used: list[tuple[ObservedReplica, str, bool]], new: list[tuple[str, bool]]) -> None:
        """Start slots that are due, and new ones, within the room that there is, if any may be started."""
        desired, name = self.desired, self.desired.name
        if desired.hold_off:
            return
        room = max(desired.max_count, desired.count) + desired.surge - self.num_alive
        if desired.surge == 0 and self._is_replacing:
            room = min(room, desired.count + desired.num_standby - self.num_alive)
        reason = "versions change" if self._is_replacing else desired.reason
        for slot, generation, is_standby in used:
            is_due = slot.generation != generation or self.now_s >= restart_due_s(slot)
            if room > 0 and is_due and not slot.is_alive:
                again = f"again after {slot.failures} failures" if slot.failures else "not running"
                why = again if slot.generation == generation else reason
                self.actions.append(StartReplica(slot.replica_id, name, why, generation, is_standby))
                room -= 1
        for generation, is_standby in new[: max(room, 0)]:
            replica_id = lowest_free_id(desired.id_prefix or slot_prefix(name), self.taken)
            self.taken.add(replica_id)
            why = f"{desired.num_standby} on standby wanted" if is_standby else reason
            self.actions.append(StartReplica(replica_id, name, why, generation, is_standby))

    def _drop(self, replica: ObservedReplica, reason: str) -> None:
        self.slots = [slot for slot in self.slots if slot.replica_id != replica.replica_id]
        already = [a for a in self.actions if a.replica_id == replica.replica_id]
        for action in already:  # stopped as broken a moment ago: then its slot simply ends too
            self.actions.remove(action)
            replica = replace(replica, is_stopping=False, keeps_slot=False)
        self.actions += _remove(replica, self._phase(replica), reason)


def _remove(replica: ObservedReplica, phase: Phase, reason: str) -> list[Action]:
    """Stop it if it lives, give its slot up if not."""
    if not replica.is_alive or replica.keeps_slot:
        return [ForgetReplica(replica.replica_id, replica.endpoint, reason)]
    if replica.is_stopping:
        return []
    return [StopReplica(replica.replica_id, replica.endpoint, stop_grace_s(replica, phase), reason)]


def stop_grace_s(replica: ObservedReplica, phase: Phase) -> float:
    """How long a replica may take to end. One whose engine is gone may have streams all the same, which
    siblings' engines continue: only a hung one is killed with them."""
    if phase in ("ready", "draining") or (replica.num_open and phase != "lost"):
        return replica.drain_grace_s
    return 1.0 if phase in ("starting", "standby") else 0.0
