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
    has_room,
    load_of,
    must_wait,
)
from headrace.policy.prefix_index import PrefixIndex
from headrace.policy.prompt import BLOCK_BYTES, PromptHead

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
_Candidate = tuple[ReplicaObservation, int, int]
"""A replica that may be chosen, its load, and the bytes of the prompt that it has cached. No object of its
own: with it a decision took a sixth longer."""


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

    def __repr__(self) -> str:
        return f"<PrefixPlacer {self.index!r} {len(self._sessions)} sessions>"

    @property
    def tokens_per_byte(self) -> float:
        """Learned from finished requests."""
        return self._tokens_per_byte

    def place(self, replicas: Sequence[ReplicaObservation], prompt: PromptHead, now_s: float) -> Placement:
        matched = self.index.match(prompt.hashes, now_s) if prompt.hashes else {}
        session = self._sessions.get(prompt.session) if prompt.session else None
        wanted = session[0] if session is not None else None
        num_bytes = prompt.num_bytes
        able: list[_Candidate] = []
        for replica in replicas:
            load = load_of(replica)
            if has_room(replica, load):
                replica_id = replica.replica_id
                num = matched.get(replica_id, 0) if matched else 0
                num_cached = num * BLOCK_BYTES
                if num_cached > num_bytes:
                    num_cached = num_bytes
                if session is not None and wanted == replica_id:
                    num_cached = self._cached_by_session(replica_id, prompt, num, session[1])
                able.append((replica, load, num_cached))
        if not able:
            return must_wait({replica.replica_id: float(load_of(replica)) for replica in replicas})
        costs = self._estimate(able, prompt, now_s)
        scores = [score for score, _ in costs] if costs else [float(load) for _, load, _ in able]
        limit = min(scores)
        limit = limit * (1 + _TIE_RATIO) + _TIE_S if costs else limit + LOAD_WINDOW
        best, best_key = 0, None
        for position, score in enumerate(scores):
            if score <= limit:
                replica, load, num_cached = able[position]
                preference = replica.replica_id != wanted if costs else -num_cached
                key = (preference, load, replica.num_assigned)
                if best_key is None or key < best_key:
                    best, best_key = position, key
        chosen, _, num_cached = able[best]
        return Placement(
            chosen.replica_id,
            _reason(chosen.replica_id, num_cached, able, wanted),
            {candidate[0].replica_id: score for candidate, score in zip(able, scores, strict=True)},
            num_cached / num_bytes if num_bytes else 0.0,
            costs[best][1] if costs else 0.0,
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
        if num_bytes >= BLOCK_BYTES and 0 < num_tokens <= 2 * num_bytes:
            ratio = num_tokens / num_bytes
            self._tokens_per_byte += (ratio - self._tokens_per_byte) * _LEARNING_RATE

    def forget(self, replica_id: str) -> None:
        self.index.forget(replica_id)
        self._busy_until_s.pop(replica_id, None)
        self._under_way.pop(replica_id, None)

    def _cached_by_session(
        self, replica_id: str, prompt: PromptHead, num_matched: int, num_bytes: int
    ) -> int:
        """Return how many bytes of the prompt the session's replica is expected to hold.

        The session knows more than the index where the prompt goes on behind the hashed head, and where the
        replica says nothing of what it holds. A head that is not held any more disproves it.
        """
        if num_matched < len(prompt.hashes) and self.index.is_reporting(replica_id):
            num_bytes = 0
        return min(max(num_bytes, num_matched * BLOCK_BYTES), prompt.num_bytes)

    def _estimate(
        self, able: Sequence[_Candidate], prompt: PromptHead, now_s: float
    ) -> list[tuple[float, float]]:
        """Return each candidate's cost and its prefill's part, in seconds. Empty: nothing is measured yet."""
        mean_token_s = _mean([replica.prefill_token_s for replica, _, _ in able])
        if mean_token_s <= 0:
            return []
        decode_token_s = _mean([replica.decode_token_s for replica, _, _ in able])
        step_per_request_s = _mean([replica.step_per_request_s for replica, _, _ in able])
        horizon = min(HORIZON_TOKENS, prompt.max_output_tokens or HORIZON_TOKENS)
        # Each open request lengthens the step that we wait for, and those of our own tokens.
        request_s = decode_token_s + step_per_request_s * horizon
        num_bytes, tokens_per_byte, busy_until_s = prompt.num_bytes, self._tokens_per_byte, self._busy_until_s
        slowest, fastest = mean_token_s * (1 + _SAME_SPEED_RATIO), mean_token_s * (1 - _SAME_SPEED_RATIO)
        costs = []
        for replica, load, num_cached in able:
            token_s = replica.prefill_token_s
            if token_s <= 0 or fastest < token_s < slowest:
                token_s = mean_token_s
            num_tokens = (num_bytes - num_cached) * tokens_per_byte
            prefill_s = score = num_tokens * token_s
            if load:
                backlog_s = busy_until_s.get(replica.replica_id, 0.0) - now_s
                if backlog_s > 0:
                    score += backlog_s
                score += request_s * token_s / mean_token_s * load
            num_free = replica.num_free_tokens
            if 0 <= num_free < num_tokens + horizon:
                score += (num_tokens + horizon - num_free) * token_s  # pushes out what is computed again
            costs.append((score, prefill_s))
        return costs


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
