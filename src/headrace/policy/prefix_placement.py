"""Placement by cost: prefill that no cache spares, against work queued already. Pure; `now_s` comes in.

A request goes where its expected cost in seconds is lowest; so a prefix that many ask for is computed a
second time as soon as its holder is busier than that computation takes. Owns what one endpoint's router
remembers of prefixes, sessions and prefill under way. Must not know addresses, tokens' values or tenants.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from headrace.policy.placement import (
    CacheChanges,
    Placement,
    PlacementReason,
    ReplicaObservation,
    load_of,
    most_open,
    must_wait,
)
from headrace.policy.prefix_index import PrefixIndex
from headrace.policy.prompt import PREFIX_BYTES, PromptHead

MAX_SESSIONS = 65_536
HORIZON_TOKENS = 64
"""An open request slows this many tokens of ours, at most. Later ones are not this decision's business: by
then other requests have ended, and the next ones have levelled the loads."""
UNDER_WAY_S = 0.012
"""A request that was bound this short a time before a report may not be in the report's figures."""
_SAME_SPEED_RATIO = 0.25
"""Replicas whose measured costs differ by less are taken for equally fast: the rest is noise, and a replica
with a large batch has cheaper tokens without being the better place."""
LOAD_WINDOW = 1
"""While no cost is measured: a replica may have this many open requests more than the least loaded one and
still be preferred for its cached prefix."""
_TIE_RATIO = 0.02
_TIE_S = 0.0002
"""Costs that differ by less are equal, and the load decides: they are estimates."""
_FIRST_TOKENS_PER_BYTE = 0.25
"""English text in the usual vocabularies; corrected by the first finished requests."""
_LEARNING_RATE = 0.05
_MAX_UNDER_WAY = 1024
_Row = tuple[ReplicaObservation, str, int, int, int, float, int]
"""A replica; its id, room (`most_open`), open requests by its last report: those that may be ours, others';
seconds per prompt token, room in its KV memory. No object of its own: it is unpacked per decision."""
_Candidate = tuple[float, int, int, float, ReplicaObservation]
"""A replica with room: its score, its load, the bytes of the prompt that it has cached, the seconds that it
needs for the rest of them."""


class _Fleet:
    """What changes with the replicas' reports only, laid out for the decisions until the next one."""

    __slots__ = ("decode_token_s", "mean_token_s", "replicas", "rows", "step_per_request_s")

    def __init__(self, replicas: Sequence[ReplicaObservation]) -> None:
        self.replicas = replicas
        self.mean_token_s = mean_s = _mean([replica.prefill_token_s for replica in replicas])
        """0: no cost is measured yet."""
        self.decode_token_s = _mean([replica.decode_token_s for replica in replicas])
        self.step_per_request_s = _mean([replica.step_per_request_s for replica in replicas])
        slowest, fastest = mean_s * (1 + _SAME_SPEED_RATIO), mean_s * (1 - _SAME_SPEED_RATIO)
        self.rows: list[_Row] = []
        for replica in replicas:
            token_s = replica.prefill_token_s
            if token_s <= 0 or fastest < token_s < slowest:
                token_s = mean_s
            opened = replica.num_open, replica.num_open_elsewhere
            self.rows.append(
                (replica, replica.replica_id, most_open(replica), *opened, token_s, replica.num_free_tokens)
            )


class PrefixPlacer:
    """One endpoint's placement by cost."""

    def __init__(self, index: PrefixIndex | None = None, max_sessions: int = MAX_SESSIONS) -> None:
        self.index = index or PrefixIndex()
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[str, tuple[str, int]] = OrderedDict()
        """Session -> the replica that served it last, and the size of its prompt there."""
        self._busy_until_s: dict[str, float] = {}
        """When each replica will have computed the prompts that it has."""
        self._under_way: dict[str, deque[tuple[float, float]]] = {}
        """When each of the last requests was bound, and the seconds that its prompt takes."""
        self._tokens_per_byte = _FIRST_TOKENS_PER_BYTE
        self._fleet = _Fleet(())

    def __repr__(self) -> str:
        return f"<PrefixPlacer {self.index!r} {len(self._sessions)} sessions>"

    @property
    def tokens_per_byte(self) -> float:
        """Learned from finished requests."""
        return self._tokens_per_byte

    def place(self, replicas: Sequence[ReplicaObservation], prompt: PromptHead, now_s: float) -> Placement:
        if self._fleet.replicas is not replicas:
            self._fleet = _Fleet(replicas)
        session = self._sessions.get(prompt.session) if prompt.session else None
        able = self._candidates(prompt, session, now_s)
        if not able:
            return must_wait({replica.replica_id: float(load_of(replica)) for replica in replicas})
        is_measured = self._fleet.mean_token_s > 0
        limit = min([candidate[0] for candidate in able])
        limit = limit * (1 + _TIE_RATIO) + _TIE_S if is_measured else limit + LOAD_WINDOW
        wanted = session[0] if session is not None else None
        best, best_key = able[0], None
        for candidate in able:
            score, load, num_cached, _, replica = candidate
            if score <= limit:
                preference = replica.replica_id != wanted if is_measured else -num_cached
                key = (preference, load, replica.num_assigned)
                if best_key is None or key < best_key:
                    best, best_key = candidate, key
        _, _, num_cached, prefill_s, chosen = best
        return Placement(
            chosen.replica_id,
            _reason(chosen.replica_id, num_cached, able, wanted),
            {replica.replica_id: score for score, _, _, _, replica in able},
            num_cached / prompt.num_bytes if prompt.num_bytes else 0.0,
            prefill_s,
        )

    def bound(self, placement: Placement, prompt: PromptHead, now_s: float) -> None:
        replica_id = placement.replica_id
        assert replica_id is not None, "a request that waits is not bound"
        if prompt.hashes:
            self.index.expect(replica_id, prompt.hashes, now_s)
        if placement.prefill_s:
            busy_until_s = self._busy_until_s.get(replica_id, 0.0)
            self._busy_until_s[replica_id] = max(busy_until_s, now_s) + placement.prefill_s
            under_way = self._under_way.setdefault(replica_id, deque(maxlen=_MAX_UNDER_WAY))
            under_way.append((now_s, placement.prefill_s))
        if prompt.session:
            self._sessions[prompt.session] = (replica_id, prompt.num_bytes)
            self._sessions.move_to_end(prompt.session)
            if len(self._sessions) > self._max_sessions:
                self._sessions.popitem(last=False)

    def report(self, replica: ReplicaObservation, changes: CacheChanges, now_s: float) -> None:
        replica_id = replica.replica_id
        self.index.report(replica_id, *changes)
        busy_s = replica.num_uncomputed_tokens * replica.prefill_token_s
        under_way = self._under_way.get(replica_id)
        if under_way:
            while under_way and under_way[0][0] < now_s - UNDER_WAY_S:
                under_way.popleft()
            busy_s += sum([seconds for _, seconds in under_way])
        self._busy_until_s[replica_id] = now_s + busy_s

    def finished(self, num_bytes: int, num_tokens: int) -> None:
        if num_bytes >= PREFIX_BYTES[1] and 0 < num_tokens <= 2 * num_bytes:
            ratio = num_tokens / num_bytes
            self._tokens_per_byte += (ratio - self._tokens_per_byte) * _LEARNING_RATE

    def forget(self, replica_id: str) -> None:
        self.index.forget(replica_id)
        self._busy_until_s.pop(replica_id, None)
        self._under_way.pop(replica_id, None)

    def _cached_by_session(self, prompt: PromptHead, session: tuple[str, int], num_matched: int) -> int:
        """Return how many bytes of the prompt the session's replica is expected to hold.

        The session knows more than the index where the prompt goes on behind the hashed head, and where the
        replica says nothing of what it holds. A head that is not held any more disproves it.
        """
        replica_id, num_bytes = session
        if num_matched < len(prompt.hashes) and self.index.is_reporting(replica_id):
            num_bytes = 0
        return min(max(num_bytes, PREFIX_BYTES[num_matched]), prompt.num_bytes)

    def _candidates(
        self, prompt: PromptHead, session: tuple[str, int] | None, now_s: float
    ) -> list[_Candidate]:
        """Return the replicas with room; scores are seconds, or loads where no cost is measured."""
        matched = self.index.match(prompt.hashes, now_s) if prompt.hashes else {}
        wanted = session[0] if session is not None else None
        fleet, num_bytes, tokens_per_byte = self._fleet, prompt.num_bytes, self._tokens_per_byte
        mean_token_s, busy_until_s = fleet.mean_token_s, self._busy_until_s
        horizon = min(HORIZON_TOKENS, prompt.max_output_tokens or HORIZON_TOKENS)
        # Each open request lengthens the step that we wait for, and those of our own tokens.
        request_s = fleet.decode_token_s + fleet.step_per_request_s * horizon
        able: list[_Candidate] = []
        for replica, replica_id, most, num_open, num_elsewhere, token_s, num_free in fleet.rows:
            load = replica.num_in_flight
            if load < num_open:
                load = num_open
            load += num_elsewhere
            if load >= most:
                continue
            num_matched = matched.get(replica_id, 0)
            num_cached = PREFIX_BYTES[num_matched]
            if num_cached > num_bytes:
                num_cached = num_bytes
            if session is not None and replica_id == wanted:
                num_cached = self._cached_by_session(prompt, session, num_matched)
            if not mean_token_s:
                able.append((float(load), load, num_cached, 0.0, replica))
                continue
            num_tokens = (num_bytes - num_cached) * tokens_per_byte
            prefill_s = score = num_tokens * token_s
            if load:
                backlog_s = busy_until_s.get(replica_id, 0.0) - now_s
                if backlog_s > 0:
                    score += backlog_s
                score += request_s * token_s / mean_token_s * load
            if 0 <= num_free < num_tokens + horizon:
                score += (num_tokens + horizon - num_free) * token_s  # pushes out what is computed again
            able.append((score, load, num_cached, prefill_s, replica))
        return able


def _reason(
    replica_id: str, num_cached: int, able: Sequence[_Candidate], wanted: str | None
) -> PlacementReason:
    if num_cached < max([candidate[2] for candidate in able]):
        return "spread"
    if num_cached == 0:
        return "least_loaded"
    return "session" if wanted == replica_id else "prefix"


def _mean(costs: Sequence[float]) -> float:
    """Return the mean of what was measured; 0 if nothing was."""
    measured = [cost for cost in costs if cost > 0]
    return sum(measured) / len(measured) if measured else 0.0
