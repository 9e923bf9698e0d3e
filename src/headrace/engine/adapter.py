"""Somebody else's engine behind our contract: it steps by itself, and what a step gave is put in our words.

`Backend` is the seam (vLLM implements it). Owns which requests are open, how a generation is resumed, whose
time a step was, and the load. Must not know any backend's words, sockets, text or HTTP.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import msgspec

from headrace.api.messages import (
    EngineLoad,
    EngineReady,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StepBatch,
    StepOutput,
    TokenLogprobs,
)
from headrace.clock import Clock
from headrace.engine.request import check_request
from headrace.engine.step_model import StepContents
from headrace.engine.work import WorkAccount, decode_part, prompt_part
from headrace.errors import EngineDead, InvalidRequest

_SEED_BITS = 63


@dataclass(slots=True)
class BackendOutput:
    """What a backend's step gave one request."""

    request_id: str
    token_ids: list[int]
    """Without the token that ended it."""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int | None = None
    """Set once, when the prompt is complete: how many of its tokens were found in the prefix cache."""
    error: str = ""


@dataclass(slots=True)
class BackendStep:
    """One step of a backend. Counts are of this step alone."""

    outputs: list[BackendOutput] = field(default_factory=list)
    num_running: int = 0
    """After the step, as the backend counts."""
    kv_usage_ratio: float = 0.0
    num_prompt_tokens: int | None = None
    """Computed in the step, of all prompts. None: it does not say."""
    num_preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    evicted: list[bytes] = field(default_factory=list)


class Backend(Protocol):
    """An engine that steps by itself, in processes of its own. Used by one asyncio task at a time, but for
    next_step, which another one awaits."""

    ready: EngineReady
    adapters: Collection[str]
    """Names that a request's `lora` may have."""

    async def submit(self, request: GenerationRequest) -> None:
        """Take a request, whose `resume_from` is empty. Raises InvalidRequest if it refuses, EngineDead."""
        ...

    async def abort(self, request_id: str) -> None:
        """Forget a request. Outputs of it may still come."""
        ...

    async def next_step(self) -> BackendStep:
        """Wait for the next step's end. Raises EngineDead, at once if its processes are gone."""
        ...

    async def check(self) -> None:
        """Return once its processes have answered a question. Raises EngineDead; a hung one never answers."""
        ...

    def close(self) -> None:
        """End its processes, within seconds and whatever they do."""
        ...


class _OpenRequest:
    """One request in the backend."""

    __slots__ = ("engine_ns", "is_decoding", "num_computed", "num_context", "num_prompt", "request_id")

    def __init__(self, request_id: str, num_prompt: int) -> None:
        self.request_id = request_id
        self.num_prompt = num_prompt
        """What must be computed before it decodes: its prompt, and what was generated elsewhere."""
        self.num_computed = 0
        """Of those, as far as the backend told."""
        self.num_context = num_prompt
        self.is_decoding = False
        self.engine_ns = 0


class AdaptedEngine:
    """What the loop drives: requests in, one StepBatch per step of the backend out."""

    def __init__(self, backend: Backend, clock: Clock) -> None:
        self._backend = backend
        self._clock = clock
        self._ready = backend.ready
        self._open: dict[str, _OpenRequest] = {}
        """In the order in which they came."""
        self._last = BackendStep()
        self._sums = BackendStep()
        """Counts since the start."""
        self._steps = 0
        self._step_s = 0.0
        self._last_step_ns = clock.now_ns()
        self._work = WorkAccount(clock.now_ns())

    def __repr__(self) -> str:
        return f"<AdaptedEngine {self._ready.kind}, {len(self._open)} open, step {self._steps}>"

    def has_work(self) -> bool:
        return bool(self._open)

    def num_waiting(self) -> int:
        """Requests that the backend does not count as running."""
        return max(0, len(self._open) - self._last.num_running)

    async def submit(self, request: GenerationRequest) -> None:
        """Hand `request` over. Raises InvalidRequest if it can never run, EngineDead."""
        request_id = request.request_id
        if request_id in self._open:
            raise InvalidRequest(f"request id {request_id!r} is in use; ids must be unique")
        ready = self._ready
        limits = ready.vocab_size, ready.max_context_tokens
        check_request(request, *limits, knows_grammars=True, adapters=self._backend.adapters)
        continued = continued_request(request)
        if not self._open:
            self._work.rest(self._clock.now_ns())
            self._last_step_ns = self._clock.now_ns()
            self._last = BackendStep(kv_usage_ratio=self._last.kv_usage_ratio)
        # Before anything is awaited: its first output may come at once.
        self._open[request_id] = _OpenRequest(request_id, len(continued.prompt_token_ids))
        try:
            await self._backend.submit(continued)
        except BaseException:
            del self._open[request_id]
            raise

    async def abort(self, request_id: str) -> None:
        """Forget a request. Unknown ids are ignored."""
        if self._open.pop(request_id, None) is not None:
            await self._backend.abort(request_id)

    async def next_batch(self) -> StepBatch:
        """Wait for the backend's next step; return it in our words. Raises EngineDead."""
        step = await self._backend.next_step()
        self._count(step)
        self._share_time(step)
        outputs = [output for item in step.outputs if (output := self._take(item)) is not None]
        return StepBatch(outputs, self.load(), step.evicted)

    async def check(self) -> None:
        """Return once the backend has answered. Raises EngineDead."""
        await self._backend.check()

    def load(self) -> EngineLoad:
        """The state after the last step."""
        work, last, sums = self._work, self._last, self._sums
        num_open = len(self._open)
        if not num_open:
            work.rest(self._clock.now_ns())
        num_total = self._ready.num_total_blocks
        num_waiting = self.num_waiting()
        return EngineLoad(
            num_running=num_open - num_waiting,
            num_waiting=num_waiting,
            num_free_blocks=round(num_total * (1.0 - last.kv_usage_ratio)),
            num_total_blocks=num_total,
            step_s=self._step_s,
            num_preemptions=sums.num_preemptions,
            prefix_hit_tokens=sums.prefix_hit_tokens,
            prefix_query_tokens=sums.prefix_query_tokens,
            steps=self._steps,
            prefill_token_s=work.fit.prefill_token_s,
            decode_token_s=work.fit.decode_token_s,
            num_uncomputed_tokens=self._num_uncomputed_tokens(),
            step_per_request_s=work.fit.step_per_request_s,
            num_draft_tokens=sums.num_draft_tokens,
            num_accepted_tokens=sums.num_accepted_tokens,
            busy_ns=work.busy_ns,
            idle_ns=work.idle_ns,
            step_model=work.fit.model,
        )

    # ---- one step

    def _count(self, step: BackendStep) -> None:
        now_ns = self._clock.now_ns()
        self._step_s = (now_ns - self._last_step_ns) * 1e-9
        self._last_step_ns = now_ns
        self._steps += 1
        self._last = step
        sums = self._sums
        sums.num_preemptions += step.num_preemptions
        sums.prefix_query_tokens += step.prefix_query_tokens
        sums.prefix_hit_tokens += step.prefix_hit_tokens
        sums.num_draft_tokens += step.num_draft_tokens
        sums.num_accepted_tokens += step.num_accepted_tokens

    def _share_time(self, step: BackendStep) -> None:
        """Split the time since the last step. If nothing is known of what a step computed, its time goes to
        the next one of which something is."""
        items: list[_OpenRequest] = []
        parts: list[StepContents] = []
        left = step.num_prompt_tokens
        for output in step.outputs:
            item = self._open.get(output.request_id)
            if item is None:
                continue
            if item.is_decoding:
                items.append(item)
                num_new = max(1, len(output.token_ids))
                parts.append(decode_part(num_new, item.num_context + num_new))
            elif output.num_cached_tokens is not None or output.token_ids:
                num_before = min(max(item.num_computed, output.num_cached_tokens or 0), item.num_prompt - 1)
                items.append(item)
                parts.append(prompt_part(item.num_prompt - num_before, num_before))
                item.num_computed, item.is_decoding = item.num_prompt, True
                left = None if left is None else left - (item.num_prompt - num_before)
        for item, num_new in self._chunks(left or 0):
            items.append(item)
            parts.append(prompt_part(num_new, item.num_computed))
            item.num_computed += num_new
        if parts:
            for item, share in zip(items, self._work.end_step(self._clock.now_ns(), parts), strict=True):
                item.engine_ns += share

    def _chunks(self, num_tokens: int) -> list[tuple[_OpenRequest, int]]:
        """Lay prompt tokens that were computed, of prompts that are not complete, on those in their order."""
        chunks = []
        for item in self._open.values():
            if num_tokens <= 0:
                break
            num_new = min(num_tokens, item.num_prompt - 1 - item.num_computed)
            if not item.is_decoding and num_new > 0:
                chunks.append((item, num_new))
                num_tokens -= num_new
        return chunks

    def _take(self, output: BackendOutput) -> StepOutput | None:
        """Return the output in our words; None if nobody waits for it."""
        item = self._open.get(output.request_id)
        if item is None:
            return None
        if output.finish_reason == "aborted":
            # Nobody asked for it: it is being shut down. With it lost, its streams go on elsewhere.
            raise EngineDead(f"{self._ready.kind} gave up a request by itself: it is shutting down")
        item.num_context += len(output.token_ids)
        if output.finish_reason is not None:
            del self._open[output.request_id]
        return StepOutput(
            output.request_id,
            output.token_ids,
            output.finish_reason,
            output.logprobs,
            output.num_cached_tokens or 0,
            output.error,
            item.engine_ns,
        )

    def _num_uncomputed_tokens(self) -> int:
        return sum([i.num_prompt - i.num_computed for i in self._open.values() if not i.is_decoding])


async def warm_up(backend: Backend) -> None:
    """Have the backend compute one answer with all that sampling can be asked for, before anyone waits: what
    is compiled at first use may take a minute. Raises EngineDead, InvalidRequest."""
    sampling = SamplingParams(
        max_tokens=2,
        temperature=0.7,
        top_p=0.9,
        top_k=10,
        presence_penalty=0.1,
        repetition_penalty=1.1,
        num_logprobs=1,
        ignore_eos=True,
    )
    await backend.submit(GenerationRequest("warm-up", [0, 1, 2], sampling))
    is_done = False
    while not is_done:
        is_done = any(output.finish_reason for output in (await backend.next_step()).outputs)


def continued_request(request: GenerationRequest) -> GenerationRequest:
    """Return `request` with the tokens emitted elsewhere as the end of its prompt. max_tokens and min_tokens
    count what is left, and the seed is another one, or the same random numbers would be drawn again.

    Raises InvalidRequest for what cannot begin in its middle: a grammar.
    """
    emitted = request.resume_from
    if not emitted:
        return request
    if request.grammar:
        raise InvalidRequest(
            f"an answer with a grammar was cut after {len(emitted)} tokens, and this engine can match a "
            "grammar from its beginning only; send the request again",
            param="grammar",
        )
    sampling = request.sampling
    return msgspec.structs.replace(
        request,
        prompt_token_ids=request.prompt_token_ids + emitted,
        resume_from=[],
        sampling=msgspec.structs.replace(
            sampling,
            max_tokens=sampling.max_tokens - len(emitted),
            min_tokens=max(0, sampling.min_tokens - len(emitted)),
            seed=_seed_at(sampling.seed, len(emitted)),
        ),
    )


def _seed_at(seed: int, index: int) -> int:
    """Return the seed of a generation that goes on at token `index`: a pure function of both."""
    digest = blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - _SEED_BITS)


def without_end(
    token_ids: Sequence[int], logprobs: list[TokenLogprobs] | None
) -> tuple[list[int], list[TokenLogprobs] | None]:
    """Return both without the last token: the one that ended the answer is no part of it."""
    return list(token_ids[:-1]), logprobs[: len(token_ids) - 1] if logprobs is not None else None
