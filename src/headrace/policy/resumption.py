"""Where a stream that has no engine goes on: to a sibling, to its own front's engine, later, or nowhere.

Pure: what is known of the stream and of the engines in, a decision with its reason out. How a request that
breaks engines is kept from breaking many is decided here, too. Must not know sockets, text, or clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

SUSPECT_CRASHES = 2
"""Engines lost one after another with the stream in them, and no token of it in between: it may be what
breaks them. From then on it is tried at home if that is possible, and anywhere only alone among its like."""
MAX_CRASHES = 4
"""So many engines one request can break. Not fewer: what else kills engines may hit a stream twice before a
token, and once more while it is tried."""
SUSPECT_PATIENCE_RATIO = 0.25
"""Of the longest wait: for so long a suspect waits for its own engine, before a sibling is risked."""
RESERVE_RATIO = 0.125
"""Guests may fill a replica beyond its max_open by this part of it: a full fleet can lose one engine."""


def guest_room(max_open: int) -> int:
    """Return how many requests and guests a replica takes together before it refuses guests."""
    return max_open + max(2, round(max_open * RESERVE_RATIO))


@dataclass(frozen=True, slots=True)
class Limits:
    """An endpoint's `streams` section."""

    max_attempts: int = 6
    """Engines after the first that were lost or given up on, each, one stream may use."""
    max_wait_s: float = 60.0
    """Longest time without an engine since the stream's last token."""


@dataclass(frozen=True, slots=True)
class Stranded:
    """A stream without an engine. Seconds on the clock."""

    stream_class: str
    """Empty: it has no token yet, and any engine of its text may begin it."""
    num_attempts: int = 0
    """Engines that it was continued on so far because it had lost another."""
    num_crashes: int = 0
    """Engines that were lost with it since its last token."""
    waited_s: float = 0.0
    """Time without an engine since its last token."""
    avoided: Mapping[str, float] = field(default_factory=dict)
    """Replicas that would not take it, or were lost with it: not before this time."""

    @property
    def is_suspect(self) -> bool:
        return self.num_crashes >= SUSPECT_CRASHES


@dataclass(frozen=True, slots=True)
class SiblingView:
    """Another replica of the endpoint, by its last report."""

    replica_id: str
    stream_class: str
    is_ready: bool
    """It takes requests, and is not about to leave."""
    may_become_ready: bool
    num_open: int
    """Requests and guests, and what was sent there since."""
    max_open: int
    num_suspects: int = 0
    """This front's streams in it that are suspected and have not given a token yet."""

    @property
    def has_room(self) -> bool:
        return self.num_open < guest_room(self.max_open)


@dataclass(frozen=True, slots=True)
class OwnEngine:
    """The engine of the stream's own front."""

    state: Literal["ready", "starting", "gone", "none"]
    """starting: it will be ready, as far as is known. gone: asleep, stopped, or failed for good. none: a
    durable front's, which never has one: replicas come and go."""
    stream_class: str = ""
    is_leaving: bool = False
    """It is to be free of requests soon: siblings come first."""
    num_suspects: int = 0
    """Streams in it that are suspected and have not given a token yet."""


@dataclass(frozen=True, slots=True)
class ContinueAt:
    """Go on at once. `replica_id` empty: in the own engine."""

    replica_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again soon."""

    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The stream ends with an error."""

    reason: str


def decide(
    stream: Stranded, own: OwnEngine, siblings: Sequence[SiblingView], limits: Limits, now_s: float
) -> ContinueAt | Wait | GiveUp:
    """Say what becomes of a stream that has no engine."""
    if reason := _hopeless(stream, limits):
        return GiveUp(reason)
    is_own_ready = own.state == "ready" and own.stream_class == stream.stream_class
    may_use_own = is_own_ready and not (stream.is_suspect and own.num_suspects)
    if may_use_own and not own.is_leaving:
        return ContinueAt("", f"its own engine is ready{_suspicion(stream)}")
    is_own_near = own.state == "starting" or (is_own_ready and not own.is_leaving)
    if stream.is_suspect and is_own_near and stream.waited_s < limits.max_wait_s * SUSPECT_PATIENCE_RATIO:
        return Wait(f"it waits for its own engine{_suspicion(stream)}")
    if host := find_sibling(stream, siblings, now_s):
        return host
    if may_use_own:
        return ContinueAt(
            "", f"no sibling can take it, and its own engine is still there{_suspicion(stream)}"
        )
    if is_own_ready:
        return Wait(f"another suspect is tried{_suspicion(stream)}")
    if own.state == "none":
        return Wait("no replica can take it now")
    if own.state == "starting":
        return Wait("no sibling can take it now; its own engine is starting")
    alike = [each for each in siblings if each.stream_class in (stream.stream_class, "")]
    if any(each.is_ready or each.may_become_ready for each in alike):
        return Wait("its own engine is gone; no sibling can take it now")
    if own.state == "gone":
        return GiveUp("its own engine is gone, and no sibling computes as it did")
    return GiveUp("its own engine computes differently now, and no sibling as it did")


def may_hold(own: OwnEngine, siblings: Sequence[SiblingView], limits: Limits, *, is_leaving: bool) -> bool:
    """Say whether a request that comes now may wait in a front whose engine is being started again, or that
    leaves, after every gateway has let it go: who still sends it something has no better place then. One that
    leaves keeps it only while no sibling is ready: a gateway that is refused goes there, and its answer has
    all the time that it needs."""
    if not limits.max_attempts or not own.stream_class:
        return False
    if not is_leaving:
        return own.state == "starting"
    alike = [each for each in siblings if each.stream_class in (own.stream_class, "")]
    if any(each.is_ready for each in alike):
        return False
    return own.state in ("ready", "starting") or any(each.may_become_ready for each in alike)


def find_sibling(stream: Stranded, siblings: Sequence[SiblingView], now_s: float) -> ContinueAt | None:
    """Return the least loaded sibling that can continue `stream` bit for bit, if there is one."""
    hosts = [
        each
        for each in siblings
        if each.is_ready
        and each.stream_class
        and stream.stream_class in ("", each.stream_class)
        and each.has_room
        and stream.avoided.get(each.replica_id, now_s) <= now_s
        and not (stream.is_suspect and each.num_suspects)
    ]
    if not hosts:
        return None
    best = min(hosts, key=lambda each: (each.num_open / max(1, each.max_open), each.replica_id))
    load = f"least loaded of {len(hosts)}: {best.num_open} open of {best.max_open}"
    return ContinueAt(best.replica_id, load + _suspicion(stream))


def _hopeless(stream: Stranded, limits: Limits) -> str:
    if stream.num_crashes >= MAX_CRASHES:
        return f"{stream.num_crashes} engines were lost with it and no token in between"
    if stream.num_attempts >= limits.max_attempts:
        return f"it was continued {stream.num_attempts} times, which is the limit"
    if stream.waited_s >= limits.max_wait_s:
        return f"no engine could continue it for {limits.max_wait_s:g} s"
    return ""


def _suspicion(stream: Stranded) -> str:
    return f"; {stream.num_crashes} engines were lost with it" if stream.is_suspect else ""
