"""Decides what each step computes: which requests, how many tokens of each, in which KV blocks.

There is no prefill or decode: each step lets num_computed_tokens catch up with a request's tokens, within
one token budget. Turn: schedule, (run), update. Owns the queues, the block pool and the counters.
Pure. Must not know torch, time, sampling or sockets.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from headrace.engine.kv_cache.block_pool import BlockPool
from headrace.engine.kv_cache.prefix_cache import BlockHash, extend_hashes
from headrace.engine.prompt_budget import Streams
from headrace.engine.request import EngineRequest

_order = attrgetter("order")


class Scheduled(NamedTuple):
    """One request's part of a step: tokens [num_computed_tokens, num_computed_tokens + num_new_tokens)."""

    request: EngineRequest
    num_new_tokens: int
    is_sampled: bool
    """Its tokens are complete after this step, so that the next one can be chosen."""
    draft_token_ids: Sequence[int] = ()
    """Guesses that are computed behind its tokens, so that several can be chosen."""

    @property
    def is_decoding(self) -> bool:
        """Computes its last token only (and guesses)."""
        return self.is_sampled and self.num_new_tokens == 1


class Preemption(NamedTuple):
    """A running request that lost its blocks, and why."""

    request_id: str
    reason: str


@dataclass(slots=True)
class Decision:
    """What one step does. Valid until the next call of the scheduler."""

    scheduled: list[Scheduled] = field(default_factory=list)
    preempted: list[Preemption] = field(default_factory=list)
    num_tokens: int = 0
    """Rows of the step: tokens, and guesses or the room that is reserved for them."""
    has_lookahead: bool = False
    """Some request was given room for guesses."""


def _all(streams: Streams) -> int:
    """Bound prompts by nothing but the step's token budget."""
    return sys.maxsize


class Scheduler:
    """Running requests first, by their order; then waiting ones, as room and budget allow."""

    def __init__(self, pool: BlockPool, block_size: int, max_running: int, token_budget: int) -> None:
        self.pool = pool
        self.running: list[EngineRequest] = []
        """By their order. The last one is the first to be preempted."""
        self.waiting: list[EngineRequest] = []
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._requests: dict[str, EngineRequest] = {}
        self._block_size = block_size
        self._block_shift = block_size.bit_length() - 1
        self._max_running = max_running
        self._token_budget = token_budget

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.running)} running, {len(self.waiting)} waiting, {self.pool!r}>"

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(self, request: EngineRequest) -> None:
        """Queue a request whose tokens fit into the pool (the caller has checked it)."""
        self._requests[request.request_id] = request
        insort(self.waiting, request, key=_order)

    def remove(self, request_id: str, is_damaged: bool = False) -> None:
        """Forget a request and release its blocks; unknown ids are ignored.

        `is_damaged`: its keys and values cannot be trusted, so none that only it holds stays cached.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        # Only admitted requests hold blocks, and each has at least one.
        queue = self.running if request.block_table else self.waiting
        del queue[bisect_left(queue, request.order, key=_order)]
        if is_damaged:
            self.pool.distrust(request.block_table)
        self._release(request)

    def schedule(self, prompt_budget: Callable[[Streams], int] = _all) -> Decision:
        """Choose the next step's tokens, and give them blocks.

        Every running request gets at least one token while the budget lasts, so that one long prompt does not
        stall the streams behind it; `prompt_budget` says how many prompts get together, and is asked only
        where there are any. Nobody is admitted in a step that had to preempt.
        """
        decision = Decision()
        budget = self._token_budget
        for_prompts: int | None = None
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            num_behind = len(self.running) - index - 1
            num_missing = len(request.token_ids) - request.num_computed_tokens
            num_new = 1
            if num_missing > 1:
                if for_prompts is None:
                    for_prompts = prompt_budget(self._streams())
                num_new = min(num_missing, max(1, min(budget - num_behind, for_prompts)))
                for_prompts -= num_new
            if not self._make_room(request, request.num_computed_tokens + num_new, decision):
                break  # It was the last one, and had to give way itself.
            decision.scheduled.append(Scheduled(request, num_new, num_new == num_missing))
            budget -= num_new
            index += 1
        if self.waiting and not decision.preempted and len(self.running) < self._max_running:
            if for_prompts is None:
                for_prompts = prompt_budget(self._streams())
            for_prompts = max(0, min(budget, for_prompts))
            budget -= for_prompts - self._admit(for_prompts, decision)
        decision.num_tokens = self._token_budget - budget
        return decision

    def draft_room(self, decision: Decision, request: EngineRequest, max_tokens: int) -> int:
        """Return how many guesses, at most `max_tokens`, the answer's end and the step's budget leave.

        One token of the answer comes without a guess.
        """
        num_to_come = request.max_total_tokens - len(request.token_ids) - 1
        return max(0, min(max_tokens, num_to_come, self._token_budget - decision.num_tokens))

    def reserve_drafts(self, decision: Decision, place: int, num_wanted: int) -> int:
        """Give the `place`-th scheduled request slots for up to `num_wanted` guesses; return for how many.

        `num_wanted` is within its `draft_room`. Never preempts: where blocks are short there are fewer
        guesses. `update` takes back the blocks that no token stays in.
        """
        request, num_new = decision.scheduled[place][:2]
        table = request.block_table
        num_tokens = request.num_computed_tokens + num_new
        num_blocks = self._num_blocks(num_tokens + num_wanted) - len(table)
        for _ in range(min(num_blocks, self.pool.num_allocatable)):
            table.append(self.pool.allocate())
        num_reserved = min(num_wanted, (len(table) << self._block_shift) - num_tokens)
        decision.num_tokens += num_reserved
        decision.has_lookahead = True
        return num_reserved

    def set_drafts(
        self, decision: Decision, place: int, num_reserved: int, draft_token_ids: Sequence[int]
    ) -> None:
        """Let the `place`-th scheduled request compute these guesses, at most as many as were reserved."""
        assert len(draft_token_ids) <= num_reserved, f"{len(draft_token_ids)} guesses, {num_reserved} slots"
        decision.scheduled[place] = decision.scheduled[place]._replace(draft_token_ids=draft_token_ids)
        decision.num_tokens -= num_reserved - len(draft_token_ids)

    def update(self, decision: Decision, num_accepted: Sequence[int] = ()) -> None:
        """Take note that the step was computed: advance each request, make its full blocks findable.

        `num_accepted`: of each sampled request in order, how many guesses became its tokens (and are appended
        to them); empty: nothing was guessed. Keys and values of other guesses are overwritten later.
        """
        accepted = iter(num_accepted)
        for item in decision.scheduled:
            num_new = item.num_new_tokens + (next(accepted, 0) if item.is_sampled else 0)
            self._advance(item.request, num_new)
            if decision.has_lookahead:
                self._return_unused(item.request)

    def _streams(self) -> Streams:
        """Say what runs and what waits. Looks at each running request: only where there are prompts."""
        num_decoding = num_kv_tokens = num_resumed = 0
        num_before: int | None = None
        for request in self.running:
            num_tokens, num_computed = len(request.token_ids), request.num_computed_tokens
            if num_tokens - num_computed == 1:
                num_decoding += 1
                num_kv_tokens += num_tokens
                continue
            num_resumed += request.is_resumed
            if num_before is None:
                num_before = num_computed
        num_running = len(self.running)
        num_to_admit = min(len(self.waiting), self._max_running - num_running)
        for request in self.waiting[:num_to_admit]:
            if not request.is_resumed:
                break  # as all behind it, or of a lower priority
            num_resumed += 1
        num_prompts = num_running - num_decoding + num_to_admit
        return Streams(num_decoding, num_kv_tokens, num_prompts, num_before or 0, num_resumed)

    def _advance(self, request: EngineRequest, num_new_tokens: int) -> None:
        shift = self._block_shift
        num_full_before = request.num_computed_tokens >> shift
        request.num_computed_tokens += num_new_tokens
        num_full = request.num_computed_tokens >> shift
        if num_full > num_full_before:
            self._cache_blocks(request, num_full_before, num_full)

    def _return_unused(self, request: EngineRequest) -> None:
        num_needed = self._num_blocks(request.num_computed_tokens)
        self.pool.release(request.block_table[num_needed:])
        del request.block_table[num_needed:]

    def prefix_hashes(self, request: EngineRequest) -> list[BlockHash]:
        """Return the hashes of the blocks that a request need not compute if they are cached. The last token
        is always computed: its logits are needed."""
        num_useful = (len(request.token_ids) - 1) >> self._block_shift
        self._extend_hashes(request, num_useful)
        return request.block_hashes[:num_useful]

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens to compute until every request here decodes; what the cache will spare counts, too."""
        num_running = sum(
            [
                num_missing
                for request in self.running
                if (num_missing := len(request.token_ids) - request.num_computed_tokens) > 1
            ]
        )
        return num_running + sum([len(request.token_ids) for request in self.waiting])

    def check_integrity(self) -> None:
        """Raise AssertionError, showing what failed, unless every block and request is accounted for."""
        self.pool.check_integrity(request.block_table for request in self.running)
        num_queued = len(self.running) + len(self.waiting)
        assert num_queued == len(self._requests), (
            f"running {len(self.running)} + waiting {len(self.waiting)} = {num_queued}, "
            f"not {len(self._requests)} requests"
        )
        assert len(self.running) <= self._max_running, f"{len(self.running)} running > {self._max_running}"
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=_order), "a queue is out of order"
        for request in self.waiting:
            assert not request.block_table, f"{request!r} waits with blocks"
            assert request.num_computed_tokens == 0, f"{request!r} waits with computed tokens"
        for request in self.running:
            needed = self._num_blocks(request.num_computed_tokens)
            assert needed == len(request.block_table), f"{request!r} needs {needed} blocks"

    def _num_blocks(self, num_tokens: int) -> int:
        return (num_tokens + self._block_size - 1) >> self._block_shift

    def _make_room(self, request: EngineRequest, num_tokens: int, decision: Decision) -> bool:
        """Give a running request blocks for `num_tokens` tokens, preempting from the end of the queue.

        False: it was the last one, and is preempted itself.
        """
        table = request.block_table
        num_needed = self._num_blocks(num_tokens) - len(table)
        if num_needed <= 0:
            return True
        while self.pool.num_allocatable < num_needed:
            victim = self.running.pop()
            reason = (
                f"{request.request_id} needs {num_needed} more blocks, {self.pool.num_allocatable} of "
                f"{self.pool.num_blocks} can be had"
            )
            self._release(victim)
            insort(self.waiting, victim, key=_order)
            self.num_preemptions += 1
            decision.preempted.append(Preemption(victim.request_id, reason))
            if victim is request:
                return False
        for _ in range(num_needed):
            table.append(self.pool.allocate())
        return True

    def _admit(self, budget: int, decision: Decision) -> int:
        """Move waiting requests to running, in order, as far as budget and blocks go; return the rest."""
        # What the running requests will still take: admitting past it would only preempt again.
        reserved = sum(self._num_blocks_to_come(request) for request in self.running)
        while self.waiting and budget > 0 and len(self.running) < self._max_running:
            request = self.waiting[0]
            cached = self._find_cached(request)
            num_total = self._num_blocks(len(request.token_ids) + 1)
            num_allocatable = self.pool.num_allocatable - self.pool.count_evictable(cached)
            if self.running and num_allocatable < num_total - len(cached) + reserved:
                break
            del self.waiting[0]
            self._start(request, cached)
            num_missing = len(request.token_ids) - request.num_computed_tokens
            num_new = min(num_missing, budget)
            has_room = self._make_room(request, request.num_computed_tokens + num_new, decision)
            assert has_room, f"{request!r} does not fit into an empty pool"
            reserved += self._num_blocks_to_come(request)
            decision.scheduled.append(Scheduled(request, num_new, num_new == num_missing))
            budget -= num_new
        return budget

    def _num_blocks_to_come(self, request: EngineRequest) -> int:
        return max(1, self._num_blocks(len(request.token_ids) + 1) - len(request.block_table))

    def _find_cached(self, request: EngineRequest) -> list[int]:
        """Return cached blocks of its prefix."""
        return self.pool.find_prefix(self.prefix_hashes(request))

    def _start(self, request: EngineRequest, cached: list[int]) -> None:
        request.num_admissions += 1
        self.pool.share(cached)
        request.block_table.extend(cached)
        request.num_computed_tokens = len(cached) << self._block_shift
        insort(self.running, request, key=_order)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self.prefix_query_tokens += request.num_prompt_tokens
            self.prefix_hit_tokens += request.num_cached_tokens

    def _cache_blocks(self, request: EngineRequest, first: int, end: int) -> None:
        self._extend_hashes(request, end)
        for index in range(first, end):
            self.pool.cache(request.block_table[index], request.block_hashes[index])

    def _extend_hashes(self, request: EngineRequest, num_blocks: int) -> None:
        extend_hashes(
            request.block_hashes,
            request.token_ids,
            num_blocks,
            self._block_size,
            request.root_hash,
            request.num_shared_tokens,
        )

    def _release(self, request: EngineRequest) -> None:
        self.pool.release(request.block_table)
        request.block_table = []
        request.num_computed_tokens = 0
