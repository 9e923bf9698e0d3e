"""A step-time model behind the Engine seam: for tests and planning, never for answers.

Owns nothing of a model: token ids are bytes (256 ends a text), and every generated text says that it is
simulated. The token at index i is a pure function of (prompt, seed, i), so a generation can be resumed.
Where prompt tokens cost time, prompts live in the real block pool with its prefix cache (answers are not
cached; when it is full, they go on without blocks); where they cost none, blocks are only counted.
Must not know torch, sockets or text's meaning.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections import deque
from collections.abc import Callable
from typing import Literal

import xxhash

from headrace.api.messages import (
    EngineLoad,
    EngineReady,
    EngineSpec,
    FinishReason,
    GenerationRequest,
    StepBatch,
    StepOutput,
    TokenLogprobs,
)
from headrace.clock import Clock
from headrace.engine.kv_cache.block_pool import BlockPool
from headrace.engine.kv_cache.prefix_cache import BlockHash, extend_hashes, root_hash
from headrace.engine.request import check_request
from headrace.engine.step_model import StepContents
from headrace.engine.work import WorkAccount, decode_part, prompt_part
from headrace.errors import InvalidRequest, Overloaded

VOCAB_SIZE = 257
"""256 bytes, and 256 for the end of a text."""
MAX_CONTEXT_TOKENS = 32768
_PREFIX = b"[simulated] "
_WORDS = (
    b"channel ",
    b"turbine ",
    b"current ",
    b"pouring ",
    b"flowing ",
    b"streams ",
    b"brimful ",
    b"sluices ",
)
_WORD_BYTES = 8
_MIX = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1
_KV_TOKENS_PER_REQUEST = 1024
"""Size of the pretended KV memory, per request of max_running, unless the spec gives bytes."""
KV_BYTES_PER_TOKEN = 1024
_MAX_BLOCKS = 1 << 20


class _SimulatedRequest:
    """One request: where it is, its KV blocks, and the hash that decides its words."""

    __slots__ = (
        "block_hashes",
        "block_table",
        "engine_ns",
        "key",
        "max_tokens",
        "num_cached_tokens",
        "num_context",
        "num_generated",
        "num_uncomputed",
        "request",
    )

    def __init__(self, request: GenerationRequest, max_context_tokens: int) -> None:
        prompt = request.prompt_token_ids
        packed = struct.pack("<Q", request.sampling.seed & _MASK_64) + array("i", prompt).tobytes()
        self.request = request
        self.key = xxhash.xxh3_64_intdigest(packed)
        self.num_generated = len(request.resume_from)
        self.num_context = len(prompt) + self.num_generated
        self.max_tokens = min(request.sampling.max_tokens, max_context_tokens - len(prompt))
        self.num_uncomputed = 0
        """Tokens of the prompt, and of what was generated elsewhere, that are still to be computed."""
        self.num_cached_tokens = 0
        """Of the prompt; told with the first output, then 0."""
        self.block_table: list[int] = []
        self.block_hashes: list[BlockHash] = []
        """Of the prompt's full blocks."""
        self.engine_ns = 0
        """Its parts of the steps it was in."""

    def next_token(self) -> int:
        """Return the token at index `num_generated` and advance."""
        index = self.num_generated
        self.num_generated += 1
        self.num_context += 1
        if index < len(_PREFIX):
            return _PREFIX[index]
        word, letter = divmod(index - len(_PREFIX), _WORD_BYTES)
        return _WORDS[((self.key + word * _MIX) & _MASK_64) >> 61][letter]


class SimulatedEngine:
    """Gives each running request one token per step. A step takes `simulated_step_s`, whatever is in it, and
    `simulated_prefill_token_s` for each uncached prompt token; where those cost something, a step computes at
    most `token_budget` tokens, as a real one does, and long prompts take several."""

    def __init__(self, spec: EngineSpec, clock: Clock, sleep: Callable[[float], None]) -> None:
        self._spec = spec
        self._clock = clock
        self._sleep = sleep
        self._max_context_tokens = min(spec.max_context_tokens or MAX_CONTEXT_TOKENS, MAX_CONTEXT_TOKENS)
        num_kv_tokens = spec.kv_cache_bytes // KV_BYTES_PER_TOKEN or spec.max_running * _KV_TOKENS_PER_REQUEST
        self._pool = BlockPool(min(_MAX_BLOCKS, max(1, num_kv_tokens // spec.block_size)))
        self._block_mask = spec.block_size - 1
        self._has_cache = spec.simulated_prefill_token_s > 0
        self._running: dict[str, _SimulatedRequest] = {}
        self._prefilling: dict[str, _SimulatedRequest] = {}
        self._waiting: deque[_SimulatedRequest] = deque()
        self._step_end_s = -math.inf
        self._step_s = 0.0
        self._steps = 0
        self._prefix_hit_tokens = 0
        self._prefix_query_tokens = 0
        self._work = WorkAccount(clock.now_ns())
        self._sleep_level = 0

    def __repr__(self) -> str:
        running, waiting = len(self._running) + len(self._prefilling), len(self._waiting)
        return f"<SimulatedEngine {running} running, {waiting} waiting, {self._steps} steps>"

    def describe(self) -> EngineReady:
        spec = self._spec
        path = f"simulated, {spec.simulated_step_s * 1000:g} ms per step"
        if spec.simulated_prefill_token_s:
            path += f", {spec.simulated_prefill_token_s * 1000:g} ms per prompt token"
        return EngineReady(
            kind="simulated",
            architecture="simulated",
            vocab_size=VOCAB_SIZE,
            max_context_tokens=self._max_context_tokens,
            block_size=spec.block_size,
            num_total_blocks=self._pool.num_blocks,
            max_running=spec.max_running,
            path=path,
            phases={},
            sleep_level=self._sleep_level,
        )

    def submit(self, request: GenerationRequest) -> None:
        check_request(request, VOCAB_SIZE, self._max_context_tokens)
        if self._sleep_level:
            raise Overloaded("the engine is asleep; wake it or use another replica", retry_after_s=1.0)
        request_id = request.request_id
        is_known = request_id in self._running or request_id in self._prefilling
        if is_known or any(r.request.request_id == request_id for r in self._waiting):
            raise InvalidRequest(f"request id {request_id!r} is in use; ids must be unique")
        if not self.has_work():
            self._work.rest(self._clock.now_ns())
        self._waiting.append(_SimulatedRequest(request, self._max_context_tokens))

    def abort(self, request_id: str) -> None:
        request = self._running.pop(request_id, None) or self._prefilling.pop(request_id, None)
        if request is None:
            self._waiting = deque(r for r in self._waiting if r.request.request_id != request_id)
        else:
            self._pool.release(request.block_table)

    def num_waiting(self) -> int:
        return len(self._waiting)

    def has_work(self) -> bool:
        return bool(self._running or self._prefilling or self._waiting)

    def step(self) -> StepBatch:
        self._admit()
        parts = [(item, decode_part(1, item.num_context)) for item in self._running.values()]
        prompts = self._prefill()
        num_prompt_tokens = sum([part.num_prompt_tokens for _, part in prompts])
        self._wait_for_step_end(num_prompt_tokens * self._spec.simulated_prefill_token_s)
        self._share_time(parts + prompts)
        outputs = [self._advance(request) for request in list(self._running.values())]
        self._steps += 1
        return StepBatch(outputs, self.load(), self._pool.take_forgotten())

    def _share_time(self, parts: list[tuple[_SimulatedRequest, StepContents]]) -> None:
        shares = self._work.end_step(self._clock.now_ns(), [part for _, part in parts])
        for (item, _), share in zip(parts, shares, strict=True):
            item.engine_ns += share

    def load(self) -> EngineLoad:
        work = self._work
        if not self.has_work():
            work.rest(self._clock.now_ns())
        return EngineLoad(
            num_running=len(self._running) + len(self._prefilling),
            num_waiting=len(self._waiting),
            num_free_blocks=self._num_free_blocks(),
            num_total_blocks=self._pool.num_blocks,
            step_s=self._step_s,
            prefix_hit_tokens=self._prefix_hit_tokens,
            prefix_query_tokens=self._prefix_query_tokens,
            steps=self._steps,
            prefill_token_s=work.fit.prefill_token_s,
            decode_token_s=work.fit.decode_token_s,
            num_uncomputed_tokens=self._num_uncomputed_tokens(),
            step_per_request_s=work.fit.step_per_request_s,
            busy_ns=work.busy_ns,
            idle_ns=work.idle_ns,
            step_model=work.fit.model,
            sleep_level=self._sleep_level,
        )

    def sleep(self, level: Literal[1, 2]) -> list[BlockHash]:
        """Behave as if memory were given back."""
        if self.has_work():
            raise Overloaded("the engine cannot sleep: it has requests", retry_after_s=1.0)
        self._sleep_level = max(level, self._sleep_level)
        self._pool.forget_all()
        return self._pool.take_forgotten()

    def wake(self) -> None:
        self._sleep_level = 0

    def check_integrity(self) -> None:
        """Raise AssertionError, showing what failed, unless every block is accounted for."""
        requests = [*self._running.values(), *self._prefilling.values()]
        self._pool.check_integrity(request.block_table for request in requests)

    def _admit(self) -> None:
        """Move waiting requests, in their order, to where their prompts are computed, while blocks last."""
        running, prefilling = self._running, self._prefilling
        while self._waiting and len(running) + len(prefilling) < self._spec.max_running:
            item = self._waiting[0]
            if self._has_cache and not self._give_blocks(item):
                return
            self._waiting.popleft()
            num_prompt = len(item.request.prompt_token_ids)
            item.num_uncomputed = item.num_context - item.num_cached_tokens
            self._prefix_query_tokens += num_prompt
            self._prefix_hit_tokens += item.num_cached_tokens
            prefilling[item.request.request_id] = item

    def _give_blocks(self, item: _SimulatedRequest) -> bool:
        """Find its cached blocks and allocate the others. False: it must wait for some to become free."""
        pool, block_size = self._pool, self._spec.block_size
        request, hashes = item.request, item.block_hashes
        prompt = request.prompt_token_ids
        root = root_hash(request.cache_salt)
        extend_hashes(hashes, prompt, len(prompt) // block_size, block_size, root, request.num_shared_tokens)
        # The last token is always computed: a real engine needs its logits.
        cached = pool.find_prefix(hashes[: (item.num_context - 1) // block_size])
        num_missing = -(-item.num_context // block_size) - len(cached)
        num_allocatable = pool.num_allocatable - pool.count_evictable(cached)
        if num_missing > num_allocatable and (self._running or self._prefilling):
            return False
        pool.share(cached)
        item.block_table = cached + [pool.allocate() for _ in range(min(num_missing, num_allocatable))]
        item.num_cached_tokens = len(cached) * block_size
        return True

    def _num_uncomputed_tokens(self) -> int:
        if not self._prefilling and not self._waiting:
            return 0
        num_prefilling = sum([item.num_uncomputed for item in self._prefilling.values()])
        return num_prefilling + sum([item.num_context for item in self._waiting])

    def _num_free_blocks(self) -> int:
        pool = self._pool
        if self._has_cache:
            return pool.num_allocatable
        block_size = self._spec.block_size
        used = sum([-(-request.num_context // block_size) for request in self._running.values()])
        return max(0, pool.num_blocks - used)

    def _prefill(self) -> list[tuple[_SimulatedRequest, StepContents]]:
        """Compute prompts within this step's budget; complete ones run. Return what was computed of each."""
        is_free = not self._has_cache
        budget = self._spec.token_budget - len(self._running)
        parts = []
        for request_id, item in list(self._prefilling.items()):
            if budget <= 0 and not is_free:
                break
            num_new = item.num_uncomputed if is_free else min(item.num_uncomputed, budget)
            parts.append((item, prompt_part(num_new, item.num_context - item.num_uncomputed)))
            item.num_uncomputed -= num_new
            budget -= num_new
            if item.num_uncomputed == 0:
                for block, block_hash in zip(item.block_table, item.block_hashes):
                    self._pool.cache(block, block_hash)
                del self._prefilling[request_id]
                self._running[request_id] = item
        return parts

    def _wait_for_step_end(self, prefill_s: float) -> None:
        """Sleep to the end of this step. Busy steps are on a grid, so late wake-ups add no drift."""
        now_s = self._clock.now_s()
        step_s = self._spec.simulated_step_s
        follows_on = now_s - self._step_end_s < step_s
        begin_s = self._step_end_s if follows_on else now_s
        self._step_end_s = begin_s + step_s + prefill_s
        if self._step_end_s > now_s:
            self._sleep(self._step_end_s - now_s)
        self._step_s = self._clock.now_s() - now_s

    def _advance(self, request: _SimulatedRequest) -> StepOutput:
        token = request.next_token()
        if self._has_cache and not request.num_context & self._block_mask and self._pool.num_allocatable:
            request.block_table.append(self._pool.allocate())
        num_logprobs = request.request.sampling.num_logprobs
        logprobs = None
        if num_logprobs >= 0:
            logprobs = [TokenLogprobs(0.0, [(token, 0.0)] if num_logprobs else [])]
        finish_reason: FinishReason | None = None
        if request.num_generated >= request.max_tokens:
            finish_reason = "length"
            del self._running[request.request.request_id]
            self._pool.release(request.block_table)
        num_cached_tokens, request.num_cached_tokens = request.num_cached_tokens, 0
        request_id, engine_ns = request.request.request_id, request.engine_ns
        return StepOutput(request_id, [token], finish_reason, logprobs, num_cached_tokens, "", engine_ns)
