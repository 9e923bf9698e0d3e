"""The versions of each endpoint: which are wanted, how a change between them stands, what undo goes back to.

Owns the rollouts' progress and the old version's settings, which a restarted controller gets back.
Pure: must not know sockets, files, launchers, or how a rollout is judged (`policy.rollout`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from headrace.api.config import Config
from headrace.api.endpoint_config import Endpoint
from headrace.api.messages import EndpointDemand, RolloutStatus
from headrace.control.fleet import Slot
from headrace.control.reconciler import WantedVersion
from headrace.control.specs import generation_of
from headrace.control.version_counts import VersionCounts
from headrace.errors import ConfigError
from headrace.policy import rollout
from headrace.policy.rollout import Outcomes, RolloutObservation, RolloutPlan, RolloutProgress, VersionView


class KeptRollout(msgspec.Struct, frozen=True):
    """What outlives the controller of one endpoint's rollout."""

    endpoint: str
    state: rollout.RolloutState
    stage: int
    reason: str
    old_config: str
    """The old version's part of the config, as JSON; the new version's is in the config itself."""


@dataclass(slots=True)
class _Change:
    """An endpoint's last change of version."""

    progress: RolloutProgress
    old_section: Endpoint
    base_old: Outcomes
    base_new: Outcomes
    """Of both versions, when the rollout began."""
    num_old_ready: int = 1


class Rollouts:
    """All endpoints' versions."""

    def __init__(self, config: Config, counts: VersionCounts) -> None:
        self._config = config
        self._counts = counts
        self._changes: dict[str, _Change] = {}
        self._generations = _generations(config)
        self.revision = 0
        """Grows when there is something new to keep."""

    def __repr__(self) -> str:
        states = ", ".join(f"{name} {change.progress.state}" for name, change in self._changes.items())
        return f"Rollouts({states or 'none'})"

    # ---- the user's wishes ----------------

    def apply(self, config: Config, now_s: float) -> dict[str, str]:
        """Take a new config. Where it changes a version, a rollout begins, from what serves now. Returns what
        follows for each endpoint whose version changes, for people."""
        notes: dict[str, str] = {}
        before, self._config = self._config, config
        generations, self._generations = self._generations, _generations(config)
        self._changes = {name: c for name, c in self._changes.items() if name in config.endpoints}
        for name in config.endpoints:
            if name in before.endpoints:
                note = self._change(name, before.endpoints[name], now_s)
                if note:
                    notes[name] = note
                elif generations[name] != self._generations[name] and self._is_settled_on_new(name):
                    notes[name] = "changed; its replicas are replaced one by one"
        return notes

    def rescale(self, config: Config) -> None:
        """Take a config in which no version changes."""
        self._config = config

    def _change(self, name: str, previous: Endpoint, now_s: float) -> str:
        change = self._changes.get(name)
        is_back = change is not None and change.progress.state != "promoted"
        old_section = change.old_section if change is not None and is_back else previous
        new = self._generations[name]
        old = self._generation(name, old_section)
        known = None if change is None else (change.progress.old, change.progress.new)
        if change is not None and known == (old, new) and change.progress.is_open:
            return ""  # it goes on
        if old == new:
            if change is None or not is_back:
                return ""
            if change.progress.is_open:
                reason = "a config of the old version was applied"
                self._move(change, replace(rollout.undo(change.progress, now_s), reason=reason, old=old))
                return "back to its old version"
            del self._changes[name]
            self.revision += 1
            return ""
        progress = rollout.begin(old, new, now_s)
        outcomes = self._counts.of(name, old), self._counts.of(name, new)
        self._changes[name] = _Change(progress, old_section, *outcomes)
        self.revision += 1
        self._forget_counts()
        return "changed; its replicas are replaced step by step (`headrace rollout status`)"

    def pause(self, endpoint: str, now_s: float) -> str:
        """Let a running rollout stay as it is. Raises ConfigError."""
        change = self._open_change(endpoint, "pause")
        if change.progress.state == "paused":
            raise ConfigError(
                f"the rollout of {endpoint!r} is paused already; `headrace rollout resume` ends it"
            )
        self._move(change, rollout.pause(change.progress, now_s))
        return f"{endpoint}: its rollout is paused"

    def resume(self, endpoint: str, now_s: float) -> str:
        """Let a paused rollout go on. Raises ConfigError."""
        change = self._open_change(endpoint, "resume")
        if change.progress.state != "paused":
            raise ConfigError(f"the rollout of {endpoint!r} is not paused; it goes on by itself")
        outcomes = self._counts.of(endpoint, change.progress.new).since(change.base_new)
        self._move(change, rollout.resume(change.progress, outcomes, now_s))
        return f"{endpoint}: its rollout goes on"

    def promote(self, endpoint: str, slots: Sequence[Slot], now_s: float) -> str:
        """Skip the stages that are left. Raises ConfigError."""
        change = self._open_change(endpoint, "promote")
        if not any(slot.phase == "ready" for slot in slots if slot.generation == change.progress.new):
            raise ConfigError(
                f"no replica of the new version of {endpoint!r} is ready: {change.progress.reason}. "
                "Wait until one is, or take it back with `headrace rollout undo`"
            )
        self._move(change, rollout.promote(change.progress, now_s))
        return f"{endpoint}: the new version is promoted; the old one's replicas are replaced"

    def undo(self, endpoint: str, now_s: float) -> str:
        """Go back to the version before the last change. Raises ConfigError."""
        change = self._changes.get(endpoint)
        if change is None:
            raise ConfigError(
                f"{endpoint!r} has had no other version since the system started; nothing to undo"
            )
        if change.progress.state == "rolled_back":
            raise ConfigError(
                f"{endpoint!r} is back at its old version already: {change.progress.reason}. "
                "Apply a config to change it"
            )
        self._move(change, rollout.undo(change.progress, now_s))
        return f"{endpoint}: going back to the version before"

    def _open_change(self, endpoint: str, verb: str) -> _Change:
        change = self._changes.get(endpoint)
        if change is None or not change.progress.is_open:
            ended = f"; the last one was {change.progress.state.replace('_', ' ')}" if change else ""
            raise ConfigError(f"there is no rollout of {endpoint!r} to {verb}{ended}")
        return change

    # ---- what follows ----------------

    def decide(
        self, endpoint: str, num_wanted: int, slots: Sequence[Slot], demand: EndpointDemand, now_s: float
    ) -> str:
        """See where an endpoint's rollout stands. Returns what came of it, if it ended now."""
        change = self._changes.get(endpoint)
        if change is None:
            return ""
        progress = change.progress
        change.num_old_ready = sum(_has_served(s) for s in slots if s.generation == progress.old)
        seen = RolloutObservation(
            num_wanted,
            _view(progress.old, slots, self._counts.of(endpoint, progress.old).since(change.base_old)),
            _view(progress.new, slots, self._counts.of(endpoint, progress.new).since(change.base_new)),
            demand.arrived,
            demand.num_held + demand.num_in_flight,
        )
        seen = replace(seen, old=replace(seen.old, num_ready=change.num_old_ready))
        rules = self._config.endpoints[endpoint].rollout
        self._move(change, rollout.decide(progress, seen, rules, now_s))
        if progress.is_open and not change.progress.is_open:
            return f"{endpoint}: {change.progress.state.replace('_', ' ')}: {change.progress.reason}"
        return ""

    def versions(self, endpoint: str, num_wanted: int) -> tuple[WantedVersion, ...]:
        """Return the generations that an endpoint is to have, and how many serving replicas of each."""
        change = self._changes.get(endpoint)
        if change is None:
            return (WantedVersion(self._generations[endpoint], num_wanted),)
        planned = self._plan(endpoint, change, num_wanted)
        progress = change.progress
        versions = (
            WantedVersion(progress.old, planned.old_count),
            WantedVersion(progress.new, planned.new_count),
        )
        used = tuple(version for version in versions if version.count)
        return used or (WantedVersion(self.main_generation(endpoint), 0),)

    def traffic(self, endpoint: str, num_wanted: int) -> dict[str, float]:
        """Return each generation's part of the requests, the new one's first; empty: no difference."""
        change = self._changes.get(endpoint)
        if change is None:
            return {}
        part = self._plan(endpoint, change, num_wanted).traffic
        if part is None:
            return {}
        return {change.progress.new: part, change.progress.old: round(1.0 - part, 9)}

    def num_surplus(self, endpoint: str, num_live: int) -> int:
        """Return how many of `num_live` replicas there are only because versions change."""
        change = self._changes.get(endpoint)
        if change is None or not change.progress.is_open:
            return 0
        for wanted in range(num_live):
            planned = self._plan(endpoint, change, wanted)
            if planned.old_count + planned.new_count >= num_live:
                return num_live - wanted
        return 0

    def main_generation(self, endpoint: str) -> str:
        """Return the generation that serves when nothing is undecided; the old one until a rollout ends."""
        change = self._changes.get(endpoint)
        if change is None or change.progress.state == "promoted":
            return self._generations[endpoint]
        return change.progress.old

    def is_open(self, endpoint: str) -> bool:
        """Whether a rollout of `endpoint` runs. A paused one rests."""
        change = self._changes.get(endpoint)
        return change is not None and change.progress.state == "running"

    def config_of(self, endpoint: str, generation: str) -> Config:
        """Return the config from which a replica of a generation is started."""
        section = self._section(endpoint, generation)
        return self._config.model_copy(update={"endpoints": {**self._config.endpoints, endpoint: section}})

    def section(self, endpoint: str) -> Endpoint:
        """Return what an endpoint's replicas are like: the applied config, or the old one's."""
        return self._section(endpoint, self.main_generation(endpoint))

    def statuses(
        self, slots: Sequence[Slot], num_wanted: Mapping[str, int], now_s: float
    ) -> list[RolloutStatus]:
        """Return where each endpoint's last change stands."""
        return [
            self._status(
                name, [slot for slot in slots if slot.endpoint == name], num_wanted.get(name, 0), now_s
            )
            for name in self._changes
        ]

    # ---- over a restart of the controller ----------------

    def keep(self) -> list[KeptRollout]:
        """Return what a restarted controller needs."""
        return [
            KeptRollout(
                name,
                change.progress.state,
                change.progress.stage,
                change.progress.reason if not change.progress.is_open else "",
                change.old_section.model_dump_json(),
            )
            for name, change in self._changes.items()
        ]

    def restore(self, kept: Sequence[KeptRollout], now_s: float) -> None:
        """Go on with what an earlier controller kept. Stages begin anew. Raises ValueError."""
        for entry in kept:
            if entry.endpoint not in self._config.endpoints:
                continue
            section = Endpoint.model_validate_json(entry.old_config)
            old, new = self._generation(entry.endpoint, section), self._generations[entry.endpoint]
            if old == new:
                continue  # the config was not written any more
            progress = replace(
                rollout.begin(old, new, now_s),
                state=entry.state,
                stage=max(entry.stage, 0),
                reason=entry.reason,
            )
            self._changes[entry.endpoint] = _Change(progress, section, Outcomes(), Outcomes())

    # ---- inside ----------------

    def _is_settled_on_new(self, name: str) -> bool:
        """What its replicas are started with is what the config says, and nothing else is wanted. It changes
        without a rollout where not the endpoint changes, but what all have in common."""
        return self.main_generation(name) == self._generations[name]

    def _move(self, change: _Change, progress: RolloutProgress) -> None:
        before, change.progress = change.progress, progress
        self.revision += (before.state, before.stage) != (progress.state, progress.stage)

    def _plan(self, endpoint: str, change: _Change, num_wanted: int) -> RolloutPlan:
        rules = self._config.endpoints[endpoint].rollout
        return rollout.plan(change.progress, num_wanted, rules, change.num_old_ready)

    def _section(self, endpoint: str, generation: str) -> Endpoint:
        change = self._changes.get(endpoint)
        if change is not None and generation == change.progress.old:
            return change.old_section
        return self._config.endpoints[endpoint]

    def _generation(self, name: str, section: Endpoint) -> str:
        return generation_of(self._config.model_copy(update={"endpoints": {name: section}}), name)

    def _forget_counts(self) -> None:
        self._counts.forget_all_but(
            {
                (name, generation)
                for name, change in self._changes.items()
                for generation in (change.progress.old, change.progress.new)
            }
        )

    def _status(self, name: str, slots: Sequence[Slot], num_wanted: int, now_s: float) -> RolloutStatus:
        change = self._changes[name]
        progress = change.progress
        part = self._plan(name, change, num_wanted).traffic
        if part is None:
            part = 1.0 if progress.state == "promoted" else 0.0
        ready = [slot.generation for slot in slots if slot.phase == "ready"]
        return RolloutStatus(
            endpoint=name,
            state=progress.state,
            old=progress.old,
            new=progress.new,
            traffic=part,
            reason=progress.reason,
            since_s=now_s - progress.since_s,
            old_replicas=ready.count(progress.old),
            new_replicas=ready.count(progress.new),
        )


def _generations(config: Config) -> dict[str, str]:
    return {name: generation_of(config, name) for name in config.endpoints}


def _has_served(slot: Slot) -> bool:
    """It serves, or starts its engine again."""
    return slot.phase == "ready" or (slot.phase == "starting" and slot.has_started)


def _view(generation: str, slots: Sequence[Slot], outcomes: Outcomes) -> VersionView:
    slots = [slot for slot in slots if slot.generation == generation]
    failing = max(slots, key=_failures, default=None)
    return VersionView(
        num_ready=sum(slot.phase == "ready" for slot in slots),
        failures=_failures(failing) if failing is not None else 0,
        is_hopeless=any(slot.failures and not slot.is_retryable for slot in slots),
        last_error=failing.last_error if failing is not None and _failures(failing) else "",
        outcomes=outcomes,
    )


def _failures(slot: Slot) -> int:
    """Failures in a row, of its process, and of its engine while that was never ready."""
    report = slot.report
    return slot.failures + (report.engine_restarts if report is not None and not slot.has_started else 0)
