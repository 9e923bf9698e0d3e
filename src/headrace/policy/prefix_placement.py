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
_FASTEST, _SLOWEST = 0.75, 1.25
"""Replicas whose measured costs are this near to the mean count as equally fast: the rest is noise, and a
replica with a large batch has cheaper tokens without being the better place."""
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
        able: list[_Candidate] = []
        for replica in replicas:
            load = load_of(replica)
            if has_room(replica, load):
                num_cached = 0
                if matched or session is not None:
                    num_cached = self._num_cached(replica.replica_id, prompt, matched, session)
                able.append(_Candidate(replica, load, num_cached))
        if not able:
            return must_wait({replica.replica_id: float(load_of(replica)) for replica in replicas})
        is_measured = self._estimate(able, prompt, now_s)
        limit = min([candidate.score for candidate in able])
        limit = limit * (1 + _TIE_RATIO) + _TIE_S if is_measured else limit + LOAD_WINDOW
        wanted = session[0] if session is not None else None
        best, best_key = able[0], None
        for candidate in able:
            if candidate.score <= limit:
                replica = candidate.replica
                preference = replica.replica_id != wanted if is_measured else -candidate.num_cached
                key = (preference, candidate.load, replica.num_assigned)
                if best_key is None or key < best_key:
                    best, best_key = candidate, key
        return _placement(best, able, prompt, wanted)

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

    def _num_cached(
        self, replica_id: str, prompt: PromptHead, matched: dict[str, int], session: tuple[str, int] | None
    ) -> int:
        """Return how many bytes of the prompt a replica is expected to hold.

        The session knows more than the index where the prompt goes on behind the hashed head, and where the
        replica says nothing of what it holds. A head that is not held any more disproves it.
        """
        num_matched = matched.get(replica_id, 0)
        num_bytes = num_matched * BLOCK_BYTES
        if session is not None and session[0] == replica_id:
            is_disproved = num_matched < len(prompt.hashes) and self.index.is_reporting(replica_id)
            if session[1] > num_bytes and not is_disproved:
                num_bytes = session[1]
        return num_bytes if num_bytes < prompt.num_bytes else prompt.num_bytes

    def _estimate(self, able: Sequence[_Candidate], prompt: PromptHead, now_s: float) -> bool:
        """Give each candidate its cost in seconds. False: nothing is measured yet, loads stay the scores."""
        mean_token_s = _mean([candidate.replica.prefill_token_s for candidate in able])
        if mean_token_s <= 0:
            return False
        decode_token_s = _mean([candidate.replica.decode_token_s for candidate in able])
        step_per_request_s = _mean([candidate.replica.step_per_request_s for candidate in able])
        horizon = min(HORIZON_TOKENS, prompt.max_output_tokens or HORIZON_TOKENS)
        # Each open request lengthens the step that we wait for, and those of our own tokens.
        request_s = decode_token_s + step_per_request_s * horizon
        num_bytes, tokens_per_byte, busy_until_s = prompt.num_bytes, self._tokens_per_byte, self._busy_until_s
        for candidate in able:
            replica, load = candidate.replica, candidate.load
            speed, token_s = 1.0, mean_token_s
            own_token_s = replica.prefill_token_s
            if own_token_s and not _SLOWEST * mean_token_s > own_token_s > _FASTEST * mean_token_s:
                speed, token_s = own_token_s / mean_token_s, own_token_s
            num_tokens = (num_bytes - candidate.num_cached) * tokens_per_byte
            candidate.prefill_s = score = num_tokens * token_s
            if load:
                backlog_s = busy_until_s.get(replica.replica_id, 0.0) - now_s
                score += request_s * speed * load
                if backlog_s > 0:
                    score += backlog_s
            num_free = replica.num_free_tokens
            if num_tokens + horizon > num_free >= 0:
                score += (num_tokens + horizon - num_free) * token_s  # pushes out what others compute again
            candidate.score = score
        return True


class _Candidate:
    """A replica that may be chosen, while one decision is made."""

    __slots__ = ("load", "num_cached", "prefill_s", "replica", "score")

    def __init__(self, replica: ReplicaObservation, load: int, num_cached: int) -> None:
        self.replica = replica
        self.load = load
        self.num_cached = num_cached
        """Bytes of the prompt."""
        self.score = float(load)
        self.prefill_s = 0.0


def _placement(
    best: _Candidate, able: Sequence[_Candidate], prompt: PromptHead, wanted: str | None
) -> Placement:
    replica_id = best.replica.replica_id
    reason: PlacementReason
    if best.num_cached < max([candidate.num_cached for candidate in able]):
        reason = "spread"
    elif best.num_cached == 0:
        reason = "least_loaded"
    else:
        reason = "session" if wanted == replica_id else "prefix"
    scores = {candidate.replica.replica_id: candidate.score for candidate in able}
    ratio = best.num_cached / prompt.num_bytes if prompt.num_bytes else 0.0
    return Placement(replica_id, reason, scores, ratio, best.prefill_s)


def _mean(costs: Sequence[float]) -> float:
    """Return the mean of what was measured; 0 if nothing was."""
    num_measured = len(costs) - costs.count(0.0)
    return sum(costs) / num_measured if num_measured else 0.0
