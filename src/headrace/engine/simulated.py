"""A step-time model behind the Engine seam: for tests and planning, never for answers.

Owns nothing of a model: token ids are bytes (256 ends a text), and every generated text says that it is
simulated. The token at index i is a pure function of (prompt, seed, i), so a generation can be resumed.
Must not know torch, sockets or text's meaning.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Callable

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
from headrace.engine.request import check_request
from headrace.errors import InvalidRequest

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
"""Size of the pretended KV memory, per request of max_running."""


class _SimulatedRequest:
    """One request: where it is, and the hash that decides its words."""

    __slots__ = ("key", "max_tokens", "num_context", "num_generated", "request")

    def __init__(self, request: GenerationRequest, max_context_tokens: int) -> None:
        prompt = request.prompt_token_ids
        packed = struct.pack(f"<Q{len(prompt)}i", request.sampling.seed & _MASK_64, *prompt)
        self.request = request
        self.key = xxhash.xxh3_64_intdigest(packed)
        self.num_generated = len(request.resume_from)
        self.num_context = len(prompt) + self.num_generated
        self.max_tokens = min(request.sampling.max_tokens, max_context_tokens - len(prompt))

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
    """Gives each running request one token per step; a step takes `simulated_step_s`, whatever is in it."""

    def __init__(self, spec: EngineSpec, clock: Clock, sleep: Callable[[float], None]) -> None:
        self._spec = spec
        self._clock = clock
        self._sleep = sleep
        self._max_context_tokens = min(spec.max_context_tokens or MAX_CONTEXT_TOKENS, MAX_CONTEXT_TOKENS)
        self._num_total_blocks = spec.max_running * max(1, _KV_TOKENS_PER_REQUEST // spec.block_size)
        self._running: dict[str, _SimulatedRequest] = {}
        self._waiting: deque[_SimulatedRequest] = deque()
        self._step_end_s = -math.inf
        self._step_s = 0.0
        self._steps = 0

    def __repr__(self) -> str:
        running, waiting = len(self._running), len(self._waiting)
        return f"<SimulatedEngine {running} running, {waiting} waiting, {self._steps} steps>"

    def describe(self) -> EngineReady:
        return EngineReady(
            kind="simulated",
            architecture="simulated",
            vocab_size=VOCAB_SIZE,
            max_context_tokens=self._max_context_tokens,
            block_size=self._spec.block_size,
            num_total_blocks=self._num_total_blocks,
            max_running=self._spec.max_running,
            path=f"simulated, {self._spec.simulated_step_s * 1000:g} ms per step",
            phases={},
        )

    def submit(self, request: GenerationRequest) -> None:
        check_request(request, VOCAB_SIZE, self._max_context_tokens)
        request_id = request.request_id
        if request_id in self._running or any(r.request.request_id == request_id for r in self._waiting):
            raise InvalidRequest(f"request id {request_id!r} is in use; ids must be unique")
        self._waiting.append(_SimulatedRequest(request, self._max_context_tokens))

    def abort(self, request_id: str) -> None:
        if self._running.pop(request_id, None) is None:
            self._waiting = deque(r for r in self._waiting if r.request.request_id != request_id)

    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def step(self) -> StepBatch:
        while self._waiting and len(self._running) < self._spec.max_running:
            request = self._waiting.popleft()
            self._running[request.request.request_id] = request
        self._wait_for_step_end()
        outputs = [self._advance(request) for request in list(self._running.values())]
        self._steps += 1
        return StepBatch(outputs, self.load())

    def load(self) -> EngineLoad:
        block_size = self._spec.block_size
        used = sum(-(-request.num_context // block_size) for request in self._running.values())
        return EngineLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_free_blocks=max(0, self._num_total_blocks - used),
            num_total_blocks=self._num_total_blocks,
            step_s=self._step_s,
            steps=self._steps,
        )

    def _wait_for_step_end(self) -> None:
        """Sleep to the end of this step. Busy steps are on a grid, so late wake-ups add no drift."""
        now_s = self._clock.now_s()
        step_s = self._spec.simulated_step_s
        follows_on = now_s - self._step_end_s < step_s
        begin_s = self._step_end_s if follows_on else now_s
        self._step_end_s = begin_s + step_s
        if self._step_end_s > now_s:
            self._sleep(self._step_end_s - now_s)
        self._step_s = self._clock.now_s() - now_s

    def _advance(self, request: _SimulatedRequest) -> StepOutput:
        token = request.next_token()
        num_logprobs = request.request.sampling.num_logprobs
        logprobs = None
        if num_logprobs >= 0:
            logprobs = [TokenLogprobs(0.0, [(token, 0.0)] if num_logprobs else [])]
        finish_reason: FinishReason | None = None
        if request.num_generated >= request.max_tokens:
            finish_reason = "length"
            del self._running[request.request.request_id]
        return StepOutput(request.request.request_id, [token], finish_reason, logprobs)
