"""Fleets for the reconciler's tests, and a small world that plays launcher and replicas."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import strategies as st

from headrace.control.reconciler import (
    Action,
    DesiredEndpoint,
    ForgetReplica,
    PromoteReplica,
    RestReplica,
    StartReplica,
    StopReplica,
    WantedVersion,
)
from headrace.control.slots import (
    LOST_AFTER_S,
    ObservedReplica,
    count_failures,
    phase_of,
)

NOW_S = 1000.0


MAX_SURGE = 1


def desired(
    count: int = 2,
    *,
    maximum: int = 8,
    name: str = "chat",
    versions: dict[str, int] | None = None,
    standby: int = 0,
    surge: int = MAX_SURGE,
) -> DesiredEndpoint:
    versions = versions or {"new": count}
    wanted = tuple(WantedVersion(*version) for version in versions.items())
    return DesiredEndpoint(name, count, maximum, wanted, standby, "new", surge, "the test wants it")


def ready(
    replica_id: str, *, num_open: int = 0, generation: str = "new", started_s: float = 0.0
) -> ObservedReplica:
    return ObservedReplica(
        replica_id, "chat", generation, True, False, started_s, NOW_S + 3, "ready", started_s, num_open
    )


def starting(replica_id: str, generation: str = "new") -> ObservedReplica:
    return ObservedReplica(replica_id, "chat", generation, True, False, NOW_S, NOW_S + 3, "starting")


def crashed(replica_id: str, failures: int, ended_s: float, *, is_retryable: bool = True) -> ObservedReplica:
    return ObservedReplica(
        replica_id,
        "chat",
        "new",
        False,
        False,
        0,
        0,
        ended_s=ended_s,
        failures=failures,
        is_retryable=is_retryable,
    )


def stops(actions: list[Action]) -> list[str]:
    return [action.replica_id for action in actions if isinstance(action, StopReplica)]


def starts(actions: list[Action]) -> list[str]:
    return [action.replica_id for action in actions if isinstance(action, StartReplica)]


def ids(kind: type, actions: list[Action]) -> list[str]:
    return [action.replica_id for action in actions if isinstance(action, kind)]


@dataclass
class World:
    """Plays launcher and replicas: starts take a tick, drains take a tick, some replicas crash."""

    replicas: dict[str, ObservedReplica]
    now_s: float = NOW_S

    def apply(self, actions: list[Action]) -> None:
        for action in actions:
            old = self.replicas.get(action.replica_id)
            match action:
                case PromoteReplica(replica_id) | RestReplica(replica_id):
                    assert old is not None
                    assert old.is_alive
                    assert not old.is_stopping
                    assert old.report_state == ("standby" if isinstance(action, PromoteReplica) else "ready")
                    role = "serving" if isinstance(action, PromoteReplica) else "standby"
                    self.replicas[replica_id] = replace(old, role=role, is_changing=True)
                case StartReplica(replica_id, endpoint, _, generation, is_standby):
                    assert old is None or not old.is_alive, f"{replica_id} was started twice"
                    failures = old.failures if old else 0
                    self.replicas[replica_id] = ObservedReplica(
                        replica_id,
                        endpoint,
                        generation,
                        True,
                        False,
                        self.now_s,
                        self.now_s + 15,
                        failures=failures if old and old.generation == generation else 0,
                        role="standby" if is_standby else "serving",
                    )
                case StopReplica(replica_id, is_failure=is_failure):
                    assert old is not None
                    assert old.is_alive
                    assert not old.is_stopping
                    self.replicas[replica_id] = replace(old, is_stopping=True, keeps_slot=is_failure)
                case ForgetReplica(replica_id):
                    assert old is not None
                    if old.is_alive:
                        self.replicas[replica_id] = replace(old, keeps_slot=False)
                    else:
                        del self.replicas[replica_id]

    def crash(self, replica_id: str) -> None:
        old = self.replicas[replica_id]
        failures = count_failures(old, self.now_s)
        self.replicas[replica_id] = replace(
            old,
            is_alive=False,
            is_stopping=False,
            keeps_slot=False,
            report_state=None,
            ended_s=self.now_s,
            failures=failures,
        )

    def advance(self, seconds: float) -> None:
        """Stopping replicas end, starting ones get ready, the ready ones report."""
        self.now_s += seconds
        for replica_id, replica in list(self.replicas.items()):
            if replica.is_stopping and replica.keeps_slot:
                self.crash(replica_id)
            elif replica.is_stopping:
                del self.replicas[replica_id]
            elif (
                replica.is_alive
                and replica.report_state != "failed"
                and self.now_s <= replica.lease_ends_s + LOST_AFTER_S
            ):
                since_s = replica.ready_since_s if replica.ready_since_s is not None else self.now_s
                self.replicas[replica_id] = replace(
                    replica,
                    report_state="standby" if replica.role == "standby" else "ready",
                    is_changing=False,
                    ready_since_s=since_s,
                    lease_ends_s=self.now_s + 3,
                )

    def num_ready(self, endpoint: str = "chat") -> int:
        return sum(
            phase_of(replica, self.now_s) == "ready"
            and self.now_s <= replica.lease_ends_s
            and replica.endpoint == endpoint
            and replica.role == "serving"
            for replica in self.replicas.values()
        )


@st.composite
def replicas_of(draw: st.DrawFn, endpoint: str, ids: list[str]) -> list[ObservedReplica]:
    replicas = []
    for replica_id in draw(st.lists(st.sampled_from(ids), unique=True, max_size=len(ids))):
        is_alive = draw(st.booleans())
        is_stopping = is_alive and draw(st.booleans())
        state = (
            draw(st.sampled_from([None, "starting", "ready", "ready", "failed", "standby"]))
            if is_alive
            else None
        )
        replicas.append(
            ObservedReplica(
                replica_id,
                endpoint,
                draw(st.sampled_from(["new", "old"])),
                is_alive,
                is_stopping,
                started_s=NOW_S - draw(st.floats(0, 100)),
                lease_ends_s=NOW_S + draw(st.floats(-30, 15)),
                report_state=state,
                ready_since_s=NOW_S - 1 if state == "ready" else None,
                num_open=draw(st.integers(0, 5)),
                keeps_slot=is_stopping and draw(st.booleans()),
                ended_s=NOW_S - draw(st.floats(0, 100)),
                failures=draw(st.integers(0, 8)),
                is_retryable=draw(st.booleans()),
                role="standby" if state == "standby" else "serving",
                can_change=draw(st.booleans()),
                lost_tokens=draw(st.floats(0, 1000)),
                is_leaving=draw(st.booleans()),
            )
        )
    return replicas


fleets = st.builds(
    lambda chat, gone: chat + gone,
    replicas_of("chat", [f"chat-{n}" for n in range(1, 7)]),
    replicas_of("gone", ["gone-1", "gone-2"]),
)


@st.composite
def wishes(draw: st.DrawFn) -> DesiredEndpoint:
    """One version, or two in the middle of a rollout; with and without standby and surge."""
    count, surge = draw(st.integers(0, 4)), draw(st.integers(0, 2))
    new = draw(st.integers(0, count)) if draw(st.booleans()) else count
    old = draw(st.integers(0, min(count, count + surge - new)))
    if old + new < count:
        old = count - new
    versions = {generation: wanted for generation, wanted in (("old", old), ("new", new)) if wanted}
    maximum = draw(st.integers(max(count, 1), 6))
    return desired(
        count, maximum=maximum, versions=versions or {"new": 0}, standby=draw(st.integers(0, 2)), surge=surge
    )
