"""Streams that are held long: their clients are told that they wait, so that nothing on the way gives up.

HAProxy can say nothing to a client before the router has answered it. So after a few seconds the router lets
it send the request to the relay, which begins the stream with comment lines and sends the request a second
time, on the internal listener, under the same id; there it waits on for the decision. For the dispatcher it
is one request that was held all the time.
Owns which held requests are there, and the call that each one's decision goes to. No I/O: `now_s` comes in.
Must not know SPOE, queues or replicas.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from headrace.gateway.arrivals import Bound, Refused

MAX_SCANNED = 64
"""Requests looked at per turn: what is more comes in the next one."""

SWEEP_S = 1.0
LOST_AFTER_S = 60.0
"""A parked request that has ended, and of whose stream nothing is heard for so long: its HAProxy died, or
ended it before the relay had it."""

Decision = Bound | Refused


class Waiting:
    """One held request's way to its client: the call that HAProxy waits on, if there is one."""

    __slots__ = ("_answer", "_decision", "_park", "is_parked")

    def __init__(self, answer: Callable[[Decision], None], park: Callable[[], None] | None) -> None:
        """`answer` tells HAProxy the decision; `park` lets it send the request to the relay, None if that is
        not possible (no stream, no relay)."""
        self._answer: Callable[[Decision], None] | None = answer
        self._park = park
        self._decision: Decision | None = None
        self.is_parked = False

    @property
    def can_park(self) -> bool:
        return self._park is not None and not self.is_parked

    @property
    def is_rejoined(self) -> bool:
        """It was parked, and came again."""
        return self.is_parked and self._park is None

    def decide(self, decision: Decision) -> None:
        """Tell the decision, or keep it until the request comes again."""
        if self._answer is None:
            self._decision = decision
            return
        answer, self._answer = self._answer, None
        answer(decision)

    def stay(self) -> None:
        """HAProxy gave its call up: the request waits in a later pass now, and this is to do nothing more."""
        self._answer = self._park = None

    def park(self) -> None:
        """Send the request to the relay."""
        assert self._park is not None
        self.is_parked, self._answer = True, None
        self._park()

    def rejoin(self, answer: Callable[[Decision], None]) -> bool:
        """The request came again. True if its decision was made meanwhile and is told now."""
        self._park = None
        if self._decision is not None:
            answer(self._decision)
            return True
        self._answer = answer
        return False


class WaitingRoom:
    """The held requests that may be parked, by the time at which they are due, and those that are."""

    def __init__(self, max_parked: int) -> None:
        self._max_parked = max_parked
        self._candidates: list[tuple[float, str, Waiting]] = []
        self._may_park: dict[str, Waiting] = {}
        """Candidates by request; one that is not here any more was overtaken."""
        self._parked: dict[str, Waiting] = {}
        self._ended_s: dict[str, float] = {}
        """When a parked request was first seen to have ended."""
        self._swept_s = 0.0

    def __repr__(self) -> str:
        return f"<WaitingRoom {len(self._parked)} parked, {len(self._candidates)} may be>"

    def __len__(self) -> int:
        return len(self._parked)

    def held(self, request_id: str, waiting: Waiting, due_s: float) -> None:
        """A request is held, and to be parked at `due_s` if it still is. Whatever pass of it waited before
        waits no more."""
        if (older := self._may_park.pop(request_id, None)) is not None:
            older.stay()
        if waiting.can_park:
            self._may_park[request_id] = waiting
            heapq.heappush(self._candidates, (due_s, request_id, waiting))

    def due(self, now_s: float, is_held: Callable[[str], bool]) -> list[Waiting]:
        """Return the requests to park now, as many as there is room for; they count as parked. Those that are
        not held any more are forgotten."""
        due: list[Waiting] = []
        for _ in range(min(MAX_SCANNED, len(self._candidates))):
            due_s, request_id, waiting = self._candidates[0]
            if is_held(request_id) and waiting.can_park:
                if now_s < due_s or len(self._parked) >= self._max_parked:
                    break
                self._parked[request_id] = waiting
                due.append(waiting)
            heapq.heappop(self._candidates)
            if self._may_park.get(request_id) is waiting:
                del self._may_park[request_id]
        return due

    def get(self, request_id: str) -> Waiting | None:
        """Return a parked request, whether or not it came again."""
        return self._parked.get(request_id)

    def leave(self, request_id: str) -> Waiting | None:
        """Forget a parked request: its stream has ended."""
        self._ended_s.pop(request_id, None)
        return self._parked.pop(request_id, None)

    def sweep(self, now_s: float, is_open: Callable[[str], bool]) -> int:
        """Forget parked requests that ended a while ago without a word of their streams, so that they take
        nobody's place; return how many. Looks once a second; the clock may jump."""
        if 0 <= now_s - self._swept_s < SWEEP_S:
            return 0
        self._swept_s = now_s
        for request_id in self._parked:
            if is_open(request_id):
                self._ended_s.pop(request_id, None)
            else:
                self._ended_s.setdefault(request_id, now_s)
        lost = [name for name, since_s in self._ended_s.items() if now_s - since_s > LOST_AFTER_S]
        for request_id in lost:
            self.leave(request_id)
        return len(lost)
