"""Continues a front's streams whose engine is gone: on a sibling, or on its own when that is back.

Owns the streams that have no engine, and the seats in siblings' engines. Must not know HTTP or reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.api.messages import GenerationRequest, Sibling
from headrace.sim.peers import PeerSeat
from headrace.sim.streams import FrontStream, Seat

if TYPE_CHECKING:
    from headrace.sim.front import FrontProcess

RETRY_S = 0.25


class OwnSeat:
    """The front's own engine."""

    def __init__(self, front: FrontProcess) -> None:
        self.name = front.name
        self._front = front

    def submit(self, request: GenerationRequest, stream: FrontStream) -> None:
        self._front.engine.submit(request, stream)

    def abort(self, stream: FrontStream) -> None:
        self._front.engine.abort(stream.seat_id)


class Resumer:
    """All streams of one front that are not in its own engine."""

    def __init__(self, front: FrontProcess) -> None:
        self._front = front
        self._waiting: dict[FrontStream, None] = {}
        self._peers: dict[str, PeerSeat] = {}
        self._is_due = False
        self.own_seat = OwnSeat(front)
        self.num_resumed = 0
        self.num_given_up = 0

    @property
    def num_hosted(self) -> int:
        return sum(peer.num_streams for peer in self._peers.values())

    def on_lost(self, stream: FrontStream, reason: str) -> None:
        """A stream's engine is gone."""
        spec = self._front.spec
        if spec.resume_attempts == 0 or stream.num_attempts >= spec.resume_attempts:
            self.num_given_up += 1
            stream.fail(f"{reason}; it was continued {stream.num_attempts} times")
            return
        stream.lost_s = self._front.host.now_s()
        self._waiting[stream] = None
        self._want_turn(0.0)

    def hand_over(self) -> None:
        """This replica leaves: what is open goes to siblings, if there are any, and the engine is let go."""
        front = self._front
        self.own_seat.name = ""  # not to be chosen again
        if not front.streams or self._siblings():
            front.guests.turn_out()
            for stream in list(front.streams):
                if stream.seat is self.own_seat:
                    stream.leave_seat()
                    self.on_lost(stream, "this replica is leaving")
            front.engine.stop()

    def on_news(self) -> None:
        """Something changed that a waiting stream may wait for."""
        if self._waiting:
            self._want_turn(0.0)

    def _want_turn(self, delay_s: float) -> None:
        if not self._is_due:
            self._is_due = True
            self._front.after(delay_s, self._turn, "resume")

    def _turn(self) -> None:
        self._is_due = False
        for stream in list(self._waiting):
            if stream.has_ended:
                del self._waiting[stream]
                continue
            seat = self._choose(stream)
            now_s = self._front.host.now_s()
            if seat is not None:
                del self._waiting[stream]
                stream.num_attempts += 1
                self.num_resumed += 1
                stream.take_seat(seat, f"{stream.generation.request_id}^{stream.num_attempts}")
            elif now_s - (stream.lost_s or now_s) > self._front.spec.resume_limit_s:
                del self._waiting[stream]
                self.num_given_up += 1
                stream.fail("no engine was there to continue on")
        if self._waiting:
            self._want_turn(RETRY_S)

    def _choose(self, stream: FrontStream) -> Seat | None:
        front = self._front
        if front.engine.state == "ready" and not front.is_closed:
            return self.own_seat
        able = self._siblings()
        if not able:
            return None
        best = min(able, key=lambda s: (stream.seats_tried.count(s.replica_id), s.num_open, s.replica_id))
        return self._peer(best)

    def _siblings(self) -> list[Sibling]:
        front = self._front
        return [
            sibling
            for sibling in front.siblings
            if sibling.state == "ready"
            and sibling.stream_class == front.spec.stream_class
            and sibling.num_open < sibling.max_open
            and sibling.replica_id != front.name
        ]

    def _peer(self, sibling: Sibling) -> PeerSeat:
        peer = self._peers.get(sibling.replica_id)
        if peer is None or peer.is_gone:
            peer = self._peers[sibling.replica_id] = PeerSeat(self._front, sibling, self._forget)
        return peer

    def _forget(self, peer: PeerSeat) -> None:
        if self._peers.get(peer.name) is peer:
            del self._peers[peer.name]
