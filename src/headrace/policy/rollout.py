"""A rollout: how a change of version reaches an endpoint, stage by stage, or is taken back. Pure.

Owns the state machine: what the new version gets of replicas and requests, when a stage is judged, and by
what. Must not know slots, processes or routers: observations and `now_s` come in, decisions with reasons out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from headrace.api.endpoint_config import Rollout
from headrace.policy.chance import chance_of

RolloutState = Literal["running", "paused", "promoted", "rolled_back"]
MAX_FAILURES = 3
"""So many failures in a row of one of its replicas, and a new version is taken for broken."""
DOUBT = 0.05
"""A stage's numbers count against a new version only where chance alone brings them about more rarely."""
EARLY_DOUBT = 0.001
"""Likewise before a stage's end: it is looked at after each request, and so often chance gets its way."""
IDLE_STAGE_S = 3.0
"""While nobody asks anything of an endpoint, waiting longer in a stage would prove nothing more."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """How requests of one version ended since the rollout began."""

    finished: int = 0
    failed: int = 0
    slow_ttft: int = 0
    slow_itl: int = 0

    @property
    def num_ended(self) -> int:
        return self.finished + self.failed

    @property
    def failed_ratio(self) -> float:
        return self.failed / self.num_ended if self.num_ended else 0.0

    def since(self, earlier: Outcomes) -> Outcomes:
        """Return what came after `earlier`; never negative, whatever was counted."""
        return Outcomes(
            max(0, self.finished - earlier.finished),
            max(0, self.failed - earlier.failed),
            max(0, self.slow_ttft - earlier.slow_ttft),
            max(0, self.slow_itl - earlier.slow_itl),
        )


@dataclass(frozen=True, slots=True)
class VersionView:
    """One version as it is seen."""

    num_ready: int = 0
    failures: int = 0
    """Most failures in a row of one of its replicas."""
    is_hopeless: bool = False
    """One of them says that starting it again cannot help."""
    last_error: str = ""
    outcomes: Outcomes = Outcomes()


@dataclass(frozen=True, slots=True)
class RolloutObservation:
    """An endpoint while it changes."""

    num_wanted: int
    """Serving replicas over both versions."""
    old: VersionView
    new: VersionView
    num_arrived: int = 0
    """Requests since the controller's start, and those held or open now: is anybody asking?"""
    num_open: int = 0


@dataclass(frozen=True, slots=True)
class RolloutProgress:
    """Where a rollout stands. Seconds on the controller's clock."""

    old: str
    """Generations."""
    new: str
    state: RolloutState
    since_s: float
    """When it came into its state."""
    reason: str
    stage: int = 0
    """Index into rollout.traffic."""
    waits_since_s: float | None = None
    """Since when the stage waits for its replicas; None: they are there, and requests go to them."""
    stage_since_s: float = 0.0
    base: Outcomes = Outcomes()
    """Of the new version, when the stage began."""
    first: Outcomes = Outcomes()
    """Of the new version, when the rollout began or was resumed."""
    busy_s: float = 0.0
    """When somebody last asked something in this stage."""
    num_arrived: int = 0

    @property
    def is_open(self) -> bool:
        """Not decided yet."""
        return self.state in ("running", "paused")


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """What to do about the replicas and requests of both versions."""

    old_count: int
    new_count: int
    traffic: float | None
    """The new version's part of the requests; None: no difference is made."""


def begin(old: str, new: str, now_s: float) -> RolloutProgress:
    """Return a rollout that begins now."""
    return RolloutProgress(old, new, "running", now_s, "it begins", waits_since_s=now_s, busy_s=now_s)


def plan(progress: RolloutProgress, num_wanted: int, rules: Rollout, num_old_ready: int) -> RolloutPlan:
    """Return the replicas of each version and the requests' parts. Sums to num_wanted + surge at most."""
    if progress.state == "promoted":
        return RolloutPlan(0, num_wanted, None)
    if progress.state == "rolled_back":
        return RolloutPlan(num_wanted, 0, None)
    if _is_swap(progress, num_wanted, rules, num_old_ready):
        return RolloutPlan(0, num_wanted, None)
    part = rules.traffic[_stage(progress, rules)]
    new_count = min(num_wanted, max(1, math.ceil(part * num_wanted - 1e-9)))
    old_count = min(num_wanted, num_wanted + rules.surge - new_count)
    if progress.waits_since_s is not None:  # its replicas are not there: the stage before it holds
        part = rules.traffic[progress.stage - 1] if progress.stage else 0.0
    return RolloutPlan(old_count, new_count, part)


def decide(
    progress: RolloutProgress, seen: RolloutObservation, rules: Rollout, now_s: float
) -> RolloutProgress:
    """Return where the rollout stands now: further, promoted, rolled back, or where it was, and why."""
    if progress.state != "running":
        return progress
    if seen.num_wanted == 0:
        return replace(
            begin(progress.old, progress.new, now_s),
            since_s=progress.since_s,
            reason="no replica is wanted; the next start shows whether the new version works",
        )
    if problem := _start_problem(progress, seen, rules, now_s):
        return _end(progress, "rolled_back", problem, now_s)
    target = plan(progress, seen.num_wanted, rules, seen.old.num_ready)
    is_there = seen.new.num_ready >= target.new_count
    if target.old_count == 0 and target.traffic is None:
        if is_there:
            return _end(progress, "promoted", "it is ready, and there was no old replica to compare", now_s)
        return replace(progress, reason=_waiting(seen, target))
    if progress.waits_since_s is not None:
        if progress.stage and (problem := _early_problem(progress, seen, rules)):
            return _end(progress, "rolled_back", problem, now_s)
        if not is_there:
            return replace(progress, reason=_waiting(seen, target))
        return _enter(progress, seen, rules, now_s)
    return _judge(_note_requests(progress, seen, now_s), seen, rules, now_s)


def pause(progress: RolloutProgress, now_s: float) -> RolloutProgress:
    """Stay as it is until resumed."""
    return replace(progress, state="paused", since_s=now_s, reason="paused by a user")


def resume(progress: RolloutProgress, outcomes: Outcomes, now_s: float) -> RolloutProgress:
    """Go on: the stage begins anew. outcomes: the new version's so far."""
    waits_since_s = None if progress.waits_since_s is None else now_s
    return replace(
        progress,
        state="running",
        since_s=now_s,
        reason="resumed by a user",
        waits_since_s=waits_since_s,
        stage_since_s=now_s,
        busy_s=now_s,
        base=outcomes,
        first=outcomes,
    )


def promote(progress: RolloutProgress, now_s: float) -> RolloutProgress:
    """Skip what is left of the stages."""
    return _end(progress, "promoted", "promoted by a user", now_s)


def undo(progress: RolloutProgress, now_s: float) -> RolloutProgress:
    """Go back to the version before."""
    return _end(progress, "rolled_back", "undone by a user", now_s)


def _stage(progress: RolloutProgress, rules: Rollout) -> int:
    """The stage's index; the rules may have become shorter meanwhile."""
    return min(progress.stage, len(rules.traffic) - 1)


def _is_swap(progress: RolloutProgress, num_wanted: int, rules: Rollout, num_old_ready: int) -> bool:
    """Whether there is nothing to compare the new version with: no old replica serves, or there is room for
    one only. Once requests were compared, an old version that dies does not prove the new one."""
    is_first = progress.stage == 0 and progress.waits_since_s is not None
    return is_first and (num_old_ready == 0 or (rules.surge == 0 and num_wanted <= 1))


def _start_problem(progress: RolloutProgress, seen: RolloutObservation, rules: Rollout, now_s: float) -> str:
    error = f": {seen.new.last_error}" if seen.new.last_error else ""
    if seen.new.is_hopeless:
        return f"the new version cannot start{error}"
    if seen.new.failures >= MAX_FAILURES:
        return f"a replica of the new version failed {seen.new.failures} times in a row{error}"
    waits_since_s = progress.waits_since_s
    if waits_since_s is not None and now_s - waits_since_s >= rules.start_limit_s:
        return (
            f"the new version was not ready within {rules.start_limit_s:g} s (rollout.start_limit_s){error}"
        )
    return ""


def _waiting(seen: RolloutObservation, target: RolloutPlan) -> str:
    words = f"waits for the new version: {seen.new.num_ready} of {target.new_count} replicas are ready"
    if seen.new.failures:
        words += f"; one failed {seen.new.failures} times: {seen.new.last_error}"
    return words


def _enter(
    progress: RolloutProgress, seen: RolloutObservation, rules: Rollout, now_s: float
) -> RolloutProgress:
    part = rules.traffic[_stage(progress, rules)]
    return replace(
        progress,
        waits_since_s=None,
        stage_since_s=now_s,
        busy_s=now_s,
        base=seen.new.outcomes,
        num_arrived=seen.num_arrived,
        reason=f"the new version gets {part:.0%} of the requests",
    )


def _note_requests(progress: RolloutProgress, seen: RolloutObservation, now_s: float) -> RolloutProgress:
    if seen.num_open or seen.num_arrived != progress.num_arrived:
        return replace(progress, busy_s=now_s, num_arrived=seen.num_arrived)
    return progress


def _judge(
    progress: RolloutProgress, seen: RolloutObservation, rules: Rollout, now_s: float
) -> RolloutProgress:
    new = seen.new.outcomes.since(progress.base)
    if problem := _early_problem(progress, seen, rules):
        return _end(progress, "rolled_back", problem, now_s)
    part = rules.traffic[_stage(progress, rules)]
    elapsed_s = now_s - progress.stage_since_s
    is_idle = now_s - progress.busy_s >= IDLE_STAGE_S
    if new.num_ended < rules.min_requests and elapsed_s < rules.stage_s and not is_idle:
        left_s = rules.stage_s - elapsed_s
        words = f"{new.num_ended} of {rules.min_requests} requests, or {left_s:.0f} s more"
        return replace(progress, reason=f"the new version gets {part:.0%} of the requests; {words}")
    problem = _problem(progress, seen, rules, DOUBT)
    if problem:
        return _end(progress, "rolled_back", problem, now_s)
    passed = f"{new.finished} of {new.num_ended} requests finished" if new.num_ended else "nobody asked"
    if _stage(progress, rules) == len(rules.traffic) - 1:
        return _end(progress, "promoted", f"it passed at {part:.0%} of the requests: {passed}", now_s)
    return replace(
        progress,
        stage=progress.stage + 1,
        waits_since_s=now_s,
        reason=f"it passed at {part:.0%} of the requests: {passed}",
    )


def _early_problem(progress: RolloutProgress, seen: RolloutObservation, rules: Rollout) -> str:
    """Why the stage need not be waited for: it fails so often that nothing can excuse it; empty: not so."""
    new = seen.new.outcomes.since(progress.base)
    return _failing(new, seen.old.outcomes, rules, EARLY_DOUBT)


def _problem(progress: RolloutProgress, seen: RolloutObservation, rules: Rollout, doubt: float) -> str:
    """Why the new version is too bad, by this stage or by all of them, which show smaller faults; empty: it
    is not, as far as these numbers tell."""
    old = seen.old.outcomes
    for since in (progress.base, progress.first):
        new = seen.new.outcomes.since(since)
        if problem := _failing(new, old, rules, doubt) or _slow(new, old, rules, doubt):
            return problem
    return ""


def _failing(new: Outcomes, old: Outcomes, rules: Rollout, doubt: float) -> str:
    """Why the new version fails too often; empty: it does not, or chance may have done it."""
    limit = rules.max_failed_ratio
    chance = chance_of(new.failed, new.num_ended, max(limit, old.failed_ratio))
    if chance > doubt:
        return ""
    return (
        f"{new.failed} of {new.num_ended} requests of the new version failed; "
        f"{limit:.1%} may (rollout.max_failed_ratio), the old version's were {old.failed_ratio:.1%}: "
        f"{_odds(chance)}"
    )


def _slow(new: Outcomes, old: Outcomes, rules: Rollout, doubt: float) -> str:
    """Why the new version is too slow; empty: it is not, or chance may have done it."""
    for field, name in (("slow_ttft", "slo.ttft_ms"), ("slow_itl", "slo.itl_ms")):
        num_slow = min(getattr(new, field), new.finished)
        old_ratio = min(1.0, getattr(old, field) / old.finished) if old.finished else 0.0
        chance = chance_of(num_slow, new.finished, old_ratio + rules.max_slow_ratio)
        if chance <= doubt:
            return (
                f"{num_slow} of the new version's {new.finished} requests were beyond {name}, "
                f"{old_ratio:.0%} of the old version's; {rules.max_slow_ratio:.0%} more may be "
                f"(rollout.max_slow_ratio): {_odds(chance)}"
            )
    return ""


def _odds(chance: float) -> str:
    if chance < 1e-6:
        return "that is not chance"
    return f"chance does that once in {1 / chance:.0f} times"


def _end(progress: RolloutProgress, state: RolloutState, reason: str, now_s: float) -> RolloutProgress:
    return replace(progress, state=state, since_s=now_s, reason=reason, waits_since_s=None)
