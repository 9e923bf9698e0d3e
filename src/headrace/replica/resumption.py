"""Streams whose engine was lost or is to be freed: continued in a sibling's engine, or in their own again.

Owns where each such stream is, and its attempts; `policy.resumption` decides. What a client gets is not
touched: the stream goes on from its tokens, and every engine it is in gets it under a new id, so that what
an engine that it left still says belongs to nobody. Must not know text, HTTP, or how siblings are found.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import msgspec

from headrace.api.messages import GenerationRequest, KvPlace, Placed, Sibling
from headrace.clock import Clock
from headrace.errors import Overloaded, ReplicaLost
from headrace.observability.front_metrics import FrontMetrics
from headrace.policy.resumption import (
    ContinueAt,
    GiveUp,
    Limits,
    OwnEngine,
    SiblingView,
    Stranded,
    decide,
    find_sibling,
    may_hold,
)
from headrace.replica.carried_stream import CarriedStream, Continuable, num_on_trial
from headrace.replica.engine_users import EngineStream
from headrace.replica.local_siblings import is_leaving, view_of
from headrace.replica.moves import Moves
from headrace.replica.peer_link import HostedStream

TICK_S = 0.02
"""How often streams that wait look for an engine."""
REFUSED_PAUSE_S = 0.25
"""A sibling that did not take a stream is not asked again for so long."""
LOST_PAUSE_S = 1.0
"""The same for one that was lost with it, of a front that has no engine, or has none any more because it
leaves: what comes back has the same name, and there may be no other place."""
_log = logging.getLogger(__name__)


class OwnEngineClient(Protocol):
    """This replica's engine."""

    def submit(self, request: GenerationRequest, stream: EngineStream) -> None:
        """Raises Overloaded."""
        ...

    def abort(self, request_id: str) -> None: ...

    def has_request(self, request_id: str) -> bool: ...

    @property
    def streams(self) -> Mapping[str, EngineStream]: ...

    @property
    def kv_place(self) -> KvPlace | None: ...


class Peers(Protocol):
    """Siblings' engines, by the path of their sockets."""

    def submit(self, path: str, request: GenerationRequest, stream: HostedStream) -> None: ...

    def abort(self, path: str, request_id: str) -> None: ...


class StreamKeeper:
    """The engine as answers see it: one that is lost is replaced behind their backs."""

    def __init__(
        self,
        engine: OwnEngineClient,
        peers: Peers,
        own: Callable[[], OwnEngine],
        limits: Limits,
        metrics: FrontMetrics,
        clock: Clock,
    ) -> None:
        """`own`: how the engine is, and what the one that was ready last computes with."""
        self._engine = engine
        self._peers = peers
        self._own = own
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._siblings: dict[str, Sibling] = {}
        self._sent: Counter[str] = Counter()
        """Streams sent to each sibling since it was last heard of."""
        self._carried: dict[str, CarriedStream] = {}
        """By the request id of the answer's choice."""
        self._num_moves = 0
        """Of all streams: an answer that is sent here again has the id of the one that was broken off."""
        self._tick: asyncio.TimerHandle | None = None
        self.moves = Moves()
        """Of what routers placed."""

    def __repr__(self) -> str:
        return f"StreamKeeper({self.num_waiting} waiting, {self.num_hosted} hosted of {len(self._carried)})"

    @property
    def num_waiting(self) -> int:
        """Streams without an engine."""
        return sum([carried.host is None for carried in self._carried.values()])

    @property
    def num_hosted(self) -> int:
        return sum([bool(carried.host) for carried in self._carried.values()])

    def are_others_catching_up(self) -> bool:
        """Whether siblings compute again what the own engine lost, and nobody waits for that one."""
        return not self.num_waiting and any(each.is_catching_up for each in self._carried.values())

    # ---- what answers ask

    def submit(self, request: GenerationRequest, stream: Continuable) -> None:
        """Hand a new request to the own engine. While that is being started again, or gone for good, it waits
        if it may (`policy.resumption.may_hold`). Raises Overloaded."""
        own = self._own()
        if own.state == "ready" or not (self.may_hold(False) or self.may_hold(True)):
            self._engine.submit(request, stream)
            return
        carried = self._carry_new(request, stream, own.stream_class)
        self._place(carried, carried.stranded_at_s)

    def may_hold(self, is_leaving: bool) -> bool:
        """Whether a request that comes now may wait for an engine."""
        return may_hold(self._own(), self._views(), self._limits, is_leaving=is_leaving)

    def place(self, request: GenerationRequest, stream: Continuable) -> None:
        """Hand a new request to the engine of the replica where a router placed it; if that is not known to
        take it, where there is room, and else to the next that comes."""
        carried = self._carry_new(request, stream, "")
        now_s = carried.stranded_at_s
        sibling = None if request.placed is None else self._siblings.get(request.placed.replica_id)
        if sibling is not None and sibling.stream_class and sibling.peer_socket:
            self._continue(carried, ContinueAt(sibling.replica_id, "a router placed it there"), now_s)
        else:
            self._place(carried, now_s)

    def _carry_new(self, request: GenerationRequest, stream: Continuable, stream_class: str) -> CarriedStream:
        carried = CarriedStream(self, stream, stream_class)
        carried.host, carried.stranded_at_s, carried.cause = None, self._clock.now_s(), "placed"
        self._carried[request.request_id] = carried
        return carried

    def abort(self, request_id: str) -> None:
        """Take a request back, wherever it is. Its stream hears nothing more; unknown ids are ignored."""
        carried = self._carried.get(request_id)
        if carried is None:
            self._engine.abort(request_id)
        else:
            self.forget(carried)
            self._take_back(carried)

    def has_request(self, request_id: str) -> bool:
        return request_id in self._carried or self._engine.has_request(request_id)

    def on_engine_lost(self, stream: Continuable, reason: str) -> None:
        """The own engine is gone, and with it a stream that never was anywhere else."""
        carried = CarriedStream(self, stream, self._own().stream_class)
        self._carried[stream.request.request_id] = carried
        self.on_carried_lost(carried, reason)

    # ---- what engines and hosts tell

    def on_carried_lost(self, carried: CarriedStream, reason: str) -> None:
        now_s, host = self._clock.now_s(), carried.host
        carried.kv_source = self._kv_place_of(host)
        self._strand(carried, now_s)
        carried.num_crashes += 1
        carried.cause, carried.lost_reason = "engine_lost", reason
        if host:
            has_own = self._own().state not in ("none", "gone")
            pause_s = self._limits.max_wait_s if has_own else LOST_PAUSE_S
            carried.avoided[host] = now_s + pause_s
        self._place(carried, now_s)

    def on_given_back(self, carried: CarriedStream, reason: str) -> None:
        """A host did not take it, or no longer carries it."""
        now_s, host = self._clock.now_s(), carried.host
        self._strand(carried, now_s)
        if carried.cause == "engine_lost":
            carried.num_attempts -= 1
        elif carried.cause == "placed":
            carried.gap_from_s = None  # it has not begun anywhere
        if host:
            carried.avoided[host] = now_s + REFUSED_PAUSE_S
        carried.lost_reason = carried.lost_reason or reason
        _log.info("request %s was given back by %s: %s", carried.stream.request.request_id, host, reason)
        self._place(carried, now_s)

    def _strand(self, carried: CarriedStream, now_s: float) -> None:
        carried.strand(now_s)
        if not carried.stream.token_ids and self._own().state == "none":
            carried.stream_class = ""  # nothing was computed of it: any engine of its text may begin it

    def on_gap_end(self, seconds: float) -> None:
        self._metrics.resume_gap.observe(seconds)

    def forget(self, carried: CarriedStream) -> None:
        request = carried.stream.request
        self._carried.pop(request.request_id, None)
        if request.placed is not None:
            self.moves.forget(request.placed.request_id)

    # ---- siblings, and moves to them

    def set_siblings(self, siblings: Sequence[Sibling]) -> None:
        """Take what the controller knows of the other replicas of this endpoint."""
        self._siblings = {sibling.replica_id: sibling for sibling in siblings}
        self._sent.clear()
        now_s = self._clock.now_s()
        for carried in list(self._carried.values()):
            if carried.host is None:
                self._place(carried, now_s)
            elif carried.host and is_leaving(self._siblings.get(carried.host)):
                self._move_on(carried, now_s)

    def has_room_elsewhere(self) -> bool:
        """Whether some sibling could take a stream of this engine now."""
        if not self._limits.max_attempts:
            return False
        stranded = Stranded(self._own().stream_class)
        return find_sibling(stranded, self._views(), self._clock.now_s()) is not None

    def hand_over(self) -> int:
        """Move the own engine's streams to siblings that have room; return how many are left in it. Guests
        are their own fronts' business."""
        now_s, num_left = self._clock.now_s(), 0
        can_move = self._limits.max_attempts > 0
        for stream in list(self._engine.streams.values()):
            carried = stream if isinstance(stream, CarriedStream) else None
            if carried is None and not isinstance(stream, Continuable):
                continue
            if carried is None and isinstance(stream, Continuable):
                carried = CarriedStream(self, stream, self._own().stream_class)
            assert carried is not None
            host = find_sibling(carried.as_stranded(now_s), self._views(), now_s) if can_move else None
            if host is None:
                num_left += 1
                continue
            self._carried[carried.stream.request.request_id] = carried
            self._engine.abort(carried.engine_id)
            self._hand_to(carried, host, now_s)
        return num_left

    def _move_on(self, carried: CarriedStream, now_s: float) -> None:
        """Take a stream from a host that leaves, if there is another place."""
        own = self._own()
        target = find_sibling(carried.as_stranded(now_s), self._views(), now_s)
        is_own_free = not (carried.is_on_trial() and num_on_trial(self._engine.streams.values()))
        is_own_ready = own.state == "ready" and own.stream_class == carried.stream_class
        if is_own_ready and is_own_free and not own.is_leaving:
            target = ContinueAt("", "its host leaves, and its own engine is ready")
        if target is not None:
            self._peers.abort(carried.path, carried.engine_id)
            self._hand_to(carried, target, now_s)

    def _hand_to(self, carried: CarriedStream, target: ContinueAt, now_s: float) -> None:
        carried.kv_source = self._kv_place_of(carried.host)
        self._strand(carried, now_s)
        carried.cause, carried.lost_reason = "handover", ""
        self._continue(carried, target, now_s)

    # ---- places

    def _place(self, carried: CarriedStream, now_s: float) -> None:
        own = replace(self._own(), num_suspects=num_on_trial(self._engine.streams.values()))
        decision = decide(carried.as_stranded(now_s), own, self._views(), self._limits, now_s)
        if isinstance(decision, ContinueAt):
            if carried.cause == "engine_lost":
                carried.num_attempts += 1
            self._continue(carried, decision, now_s)
        elif isinstance(decision, GiveUp):
            self._give_up(carried, decision)
        elif self._tick is None:
            self._tick = asyncio.get_running_loop().call_later(TICK_S, self._run_tick)

    def _run_tick(self) -> None:
        self._tick = None
        now_s = self._clock.now_s()
        for carried in list(self._carried.values()):
            if carried.host is None and carried.stream.request.request_id in self._carried:
                self._place(carried, now_s)

    def _continue(self, carried: CarriedStream, target: ContinueAt, now_s: float) -> None:
        stream = carried.stream
        request_id = stream.request.request_id
        carried.waited_s = carried.as_stranded(now_s).waited_s
        carried.engine_id = self._new_engine_id(carried)
        if not carried.stream_class:
            carried.stream_class = self._siblings[target.replica_id].stream_class
        is_suspect = carried.as_stranded(now_s).is_suspect
        request = msgspec.structs.replace(
            stream.request,
            request_id=carried.engine_id,
            resume_from=list(stream.token_ids),
            stream_class=carried.stream_class,
            is_suspect=is_suspect,
            # Whatever broke its engines, it is not to come along.
            kv_place=None if is_suspect else carried.kv_source,
            placed=self._placed(stream.request, target.replica_id, now_s),
        )
        carried.host = target.replica_id
        if target.replica_id:
            carried.path = self._siblings[target.replica_id].peer_socket
            # What a router placed there is in its own counts.
            self._sent[target.replica_id] += carried.cause != "placed" or stream.request.placed is None
            self._peers.submit(carried.path, request, carried)
        else:
            try:
                self._engine.submit(request, carried)
            except Overloaded as error:  # it was ready a moment ago
                self.on_given_back(carried, error.message)
                return
        if carried.cause == "placed":
            return  # it begins here
        self._metrics.num_resumed[carried.cause] += 1
        self._metrics.num_resumed_tokens += len(stream.token_ids)
        stream.on_resumed(target.replica_id)
        _log.info(
            "request %s goes on at %s after %d tokens: %s",
            request_id,
            target.replica_id or "its own engine",
            len(stream.token_ids),
            target.reason,
        )

    def _placed(self, request: GenerationRequest, replica_id: str, now_s: float) -> Placed | None:
        """Return what the next host of a request must know, and note where it went."""
        placed = request.placed
        if placed is None:
            return None
        self.moves.note(placed.request_id, placed.replica_id, replica_id, now_s)
        return msgspec.structs.replace(placed, replica_id=replica_id)

    def _kv_place_of(self, host: str | None) -> KvPlace | None:
        """Where the keys and values of the engine at `host` can be read."""
        if not host:
            return self._engine.kv_place if host is not None else None
        sibling = self._siblings.get(host)
        return None if sibling is None else sibling.kv_place

    def _new_engine_id(self, carried: CarriedStream) -> str:
        """A client may have chosen an id that looks like this."""
        while True:
            self._num_moves += 1
            engine_id = f"{carried.stream.request.request_id}@{self._num_moves}"
            if not self.has_request(engine_id):
                return engine_id

    def _give_up(self, carried: CarriedStream, decision: GiveUp) -> None:
        self.forget(carried)
        self._metrics.num_given_up += 1
        lost = carried.lost_reason or "it was taken away"
        words = f"the engine was lost while it answered ({lost})"
        if carried.cause == "placed":
            words = "no engine began it" if carried.stream.request.placed is None else "no replica began it"
        carried.stream.fail(ReplicaLost(f"{words}; {decision.reason}; send the request again"))

    def _take_back(self, carried: CarriedStream) -> None:
        if carried.host:
            self._peers.abort(carried.path, carried.engine_id)
        elif carried.host is not None:
            self._engine.abort(carried.engine_id)

    def _views(self) -> list[SiblingView]:
        suspects = Counter([each.host for each in self._carried.values() if each.is_on_trial()])
        return [
            view_of(sibling, self._sent[replica_id], suspects[replica_id])
            for replica_id, sibling in self._siblings.items()
        ]

    def close(self) -> None:
        """Look for places no more. What still waits is the answers' to end."""
        if self._tick is not None:
            self._tick.cancel()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every carried stream is where it is said to be."""
        for request_id, carried in self._carried.items():
            assert carried.stream.request.request_id == request_id, f"{carried!r} under {request_id}"
            if carried.host == "":
                assert self._engine.has_request(carried.engine_id), f"{carried!r} is not in the engine"
