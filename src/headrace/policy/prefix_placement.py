"""Placement by cost: prefill that no cache spares, against work queued already. Pure; `now_s` comes in.

A request goes where its expected cost in seconds is lowest; so a prefix that many ask for is computed a
second time as soon as its holder is busier than that computation takes. Owns what one endpoint's router
remembers of prefixes, sessions and prefill under way. Must not know addresses, tokens' values or tenants.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from headrace.policy.placement import (
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
HORIZON_TOKENS = 32
"""An open request is weighed as this many output tokens of engine time. Later ones are not this decision's
business: by then other requests have ended, and the next ones have levelled the loads."""
LOAD_WINDOW = 1
"""While no cost is measured: a replica may have this many open requests more than the least loaded one and
still be preferred for its cached prefix."""
_TIE_RATIO = 0.02
_TIE_S = 0.0002
"""Costs that differ by less are equal, and the load decides: they are estimates."""
_FIRST_TOKENS_PER_BYTE = 0.25
"""English text in the usual vocabularies; corrected by the first finished requests."""
_LEARNING_RATE = 0.05


class PrefixPlacer:
    """One endpoint's placement by cost."""

    def __init__(self, index: PrefixIndex | None = None, max_sessions: int = MAX_SESSIONS) -> None:
        self.index = index or PrefixIndex()
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[str, tuple[str, int]] = OrderedDict()
        """Session -> the replica that served it last, and the size of its prompt there."""
        self._busy_until_s: dict[str, float] = {}
        """When each replica will have computed the prompts bound to it."""
        self._tokens_per_byte = _FIRST_TOKENS_PER_BYTE

    def __repr__(self) -> str:
        return f"<PrefixPlacer {self.index!r} {len(self._sessions)} sessions>"

    @property
    def tokens_per_byte(self) -> float:
        """Learned from finished requests."""
        return self._tokens_per_byte

    def place(self, replicas: Sequence[ReplicaObservation], prompt: PromptHead, now_s: float) -> Placement:
        # The router's hottest loop: columns instead of an object per replica.
        matched = self.index.match(prompt.hashes, now_s) if prompt.hashes else {}
        session = self._sessions.get(prompt.session) if prompt.session else None
        wanted = session[0] if session is not None else None
        able: list[ReplicaObservation] = []
        loads: list[int] = []
        cached: list[int] = []  # bytes of the prompt
        for replica in replicas:
            load = load_of(replica)
            if has_room(replica, load):
                num = matched.get(replica.replica_id, 0)
                num_cached = min(num * BLOCK_BYTES, prompt.num_bytes) if num else 0
                if session is not None and wanted == replica.replica_id:
                    num_cached = self._cached_by_session(replica.replica_id, prompt, num, session[1])
                able.append(replica)
                loads.append(load)
                cached.append(num_cached)
        if not able:
            return must_wait({replica.replica_id: float(load_of(replica)) for replica in replicas})
        costs = self._estimate(able, loads, cached, prompt, now_s)
        scores = costs[0] if costs is not None else [float(load) for load in loads]
        limit = min(scores)
        limit = limit * (1 + _TIE_RATIO) + _TIE_S if costs is not None else limit + LOAD_WINDOW
        best, best_key = 0, None
        for position, score in enumerate(scores):
            if score <= limit:
                replica = able[position]
                preference = replica.replica_id != wanted if costs is not None else -cached[position]
                key = (preference, loads[position], replica.num_assigned)
                if best_key is None or key < best_key:
                    best, best_key = position, key
        return Placement(
            able[best].replica_id,
            _reason(able[best].replica_id, cached[best], max(cached), wanted),
            {replica.replica_id: score for replica, score in zip(able, scores)},
            cached[best] / prompt.num_bytes if prompt.num_bytes else 0.0,
            costs[1][best] if costs is not None else 0.0,
        )

    def bound(self, placement: Placement, prompt: PromptHead, now_s: float) -> None:
        replica_id = placement.replica_id
        assert replica_id is not None, "a request that waits is not bound"
        if prompt.hashes:
            self.index.expect(replica_id, prompt.hashes, now_s)
        if placement.prefill_s:
            busy_until_s = self._busy_until_s.get(replica_id, 0.0)
            self._busy_until_s[replica_id] = max(busy_until_s, now_s) + placement.prefill_s
        if prompt.session:
            self._sessions[prompt.session] = (replica_id, prompt.num_bytes)
            self._sessions.move_to_end(prompt.session)
            if len(self._sessions) > self._max_sessions:
                self._sessions.popitem(last=False)

    def report(self, replica_id: str, epoch: Hashable, added: Sequence[int], removed: Sequence[int]) -> None:
        self.index.report(replica_id, epoch, added, removed)

    def finished(self, num_bytes: int, num_tokens: int) -> None:
        if num_bytes >= BLOCK_BYTES and 0 < num_tokens <= 2 * num_bytes:
            ratio = num_tokens / num_bytes
            self._tokens_per_byte += (ratio - self._tokens_per_byte) * _LEARNING_RATE

    def forget(self, replica_id: str) -> None:
        self.index.forget(replica_id)
        self._busy_until_s.pop(replica_id, None)

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
        self,
        able: Sequence[ReplicaObservation],
        loads: Sequence[int],
        cached: Sequence[int],
        prompt: PromptHead,
        now_s: float,
    ) -> tuple[list[float], list[float]] | None:
        """Return each replica's cost and the prefill in it, in seconds. None: nothing is
        measured yet."""
        prefill_token_s = _mean([replica.prefill_token_s for replica in able])
        if prefill_token_s <= 0:
            return None
        decode_token_s = _mean([replica.decode_token_s for replica in able])
        horizon = min(HORIZON_TOKENS, prompt.max_output_tokens or HORIZON_TOKENS)
        num_bytes, tokens_per_byte, busy_until_s = prompt.num_bytes, self._tokens_per_byte, self._busy_until_s
        scores, prefills_s = [], []
        for replica, load, num_cached in zip(able, loads, cached):
            token_s = replica.prefill_token_s or prefill_token_s
            num_tokens = (num_bytes - num_cached) * tokens_per_byte
            score = prefill_s = num_tokens * token_s
            if load:
                backlog_s = busy_until_s.get(replica.replica_id, 0.0) - now_s
                if backlog_s > 0:
                    score += backlog_s
                score += (replica.decode_token_s or decode_token_s) * horizon * load
            num_free = replica.num_free_tokens
            if 0 <= num_free < num_tokens + horizon:
                # It pushes out what others have to compute again.
                score += (num_tokens + horizon - num_free) * token_s
            scores.append(score)
            prefills_s.append(prefill_s)
        return scores, prefills_s


def _reason(replica_id: str, num_cached: int, most_cached: int, wanted: str | None) -> PlacementReason:
    if num_cached < most_cached:
        return "spread"
    if num_cached == 0:
        return "least_loaded"
    return "session" if wanted == replica_id else "prefix"


def _mean(costs: Sequence[float]) -> float:
    """Return the mean of what was measured; 0 if nothing was."""
    if costs[0] > 0 and min(costs) == max(costs):
        return costs[0]  # replicas of one kind
    measured = [cost for cost in costs if cost > 0]
    return sum(measured) / len(measured) if measured else 0.0
