"""The native engine: scheduler, model runner and sampler, joined into one step.

Owns request ids, reasons to end, and what a step reports. Must not know sockets, text, or how logits come.
"""

from __future__ import annotations

from itertools import count

import numpy as np

from headrace.api.messages import (
    EngineLoad,
    EngineReady,
    EngineSpec,
    GenerationRequest,
    StepBatch,
    StepOutput,
)
from headrace.clock import Clock
from headrace.engine.grammar_queue import GrammarQueue
from headrace.engine.kv_cache.block_pool import BlockPool
from headrace.engine.protocol import ModelRunner, StepInput
from headrace.engine.request import EngineRequest, check_request
from headrace.engine.sampler import Sampled, Sampler
from headrace.engine.scheduler import Decision, Scheduler
from headrace.engine.step_batch import StepInputBuilder
from headrace.engine.step_cost import StepCost
from headrace.errors import InvalidRequest, ModelError

_GRAMMAR_WAIT_S = 0.02
"""Longest wait for a grammar with nothing else to do: commands are read in between."""


class NativeEngine:
    """Generates with a model runner. Turn of a step: schedule, run, sample, update."""

    def __init__(
        self, spec: EngineSpec, runner: ModelRunner, clock: Clock, grammars: GrammarQueue | None = None
    ) -> None:
        """Without `grammars`, requests with a grammar are refused."""
        self._spec = spec
        self._runner = runner
        self._clock = clock
        capacity = runner.num_blocks * runner.block_size
        self._max_context_tokens = min(runner.max_context_tokens, capacity)
        if spec.max_context_tokens:
            self._max_context_tokens = min(self._max_context_tokens, spec.max_context_tokens)
        self._scheduler = Scheduler(
            BlockPool(runner.num_blocks), runner.block_size, spec.max_running, spec.token_budget
        )
        self._builder = StepInputBuilder(runner.block_size, spec.token_budget, spec.max_running)
        self._sampler = Sampler()
        self._grammars = grammars
        self._arrivals = count()
        self._steps = 0
        self._step_s = 0.0
        self._cost = StepCost()

    def __repr__(self) -> str:
        return f"<NativeEngine {self._runner.architecture}, step {self._steps}, {self._scheduler!r}>"

    def describe(self) -> EngineReady:
        runner = self._runner
        return EngineReady(
            kind="native",
            architecture=runner.architecture,
            vocab_size=runner.vocab_size,
            max_context_tokens=self._max_context_tokens,
            block_size=runner.block_size,
            num_total_blocks=runner.num_blocks,
            max_running=self._spec.max_running,
            path=runner.path,
            phases={},
        )

    def compute_first_step(self) -> None:
        """Compute one step before anyone waits for it. Raises ModelError if its logits are not finite."""
        num_tokens = min(self._runner.block_size, self._spec.token_budget)
        places = np.arange(num_tokens, dtype=np.int32)
        logits_SV = self._runner.execute(
            StepInput(
                token_ids_T=np.zeros(num_tokens, np.int32),
                positions_T=places,
                slots_T=places,
                query_starts=np.array([0, num_tokens], np.int32),
                context_lengths_R=np.array([num_tokens], np.int32),
                block_tables=[[0]],
                sampled_rows_S=places[-1:],
            )
        )
        if not bool(logits_SV.isfinite().all()):
            raise ModelError(
                "the model's first step gave logits that are not finite; its file is damaged, or its numbers "
                "do not fit into this dtype: set dtype to float32"
            )

    def submit(self, request: GenerationRequest) -> None:
        grammars = self._grammars
        if request.request_id in self._scheduler or (grammars and request.request_id in grammars):
            raise InvalidRequest(f"request id {request.request_id!r} is in use; ids must be unique")
        check_request(
            request,
            self._runner.vocab_size,
            self._max_context_tokens,
            knows_grammars=grammars is not None,
        )
        accepted = EngineRequest(
            request, next(self._arrivals), self._runner.eos_token_ids, self._max_context_tokens
        )
        if grammars is not None and request.grammar:
            grammars.add(accepted, request.grammar, self._clock.now_s())
        else:
            self._scheduler.add(accepted)

    def abort(self, request_id: str) -> None:
        self._scheduler.remove(request_id)
        if self._grammars is not None:
            self._grammars.remove(request_id)

    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting or self._grammars)

    def step(self) -> StepBatch:
        failures = self._settle_grammars() if self._grammars else []
        if not (self._scheduler.running or self._scheduler.waiting):
            return StepBatch(failures, self.load(), self._scheduler.pool.take_forgotten())
        begin_s = self._clock.now_s()
        decision = self._scheduler.schedule()
        assert decision.scheduled, f"a step without work: {self!r}"
        logits_SV = self._runner.execute(self._builder.build(decision.scheduled))
        requests = [item.request for item in decision.scheduled if item.is_sampled]
        sampled = self._sampler.sample(logits_SV, requests)
        outputs = self._update(decision, requests, sampled)
        self._steps += 1
        self._step_s = self._clock.now_s() - begin_s
        num_decoding = sum(item.num_new_tokens == 1 for item in decision.scheduled)
        self._cost.observe(self._step_s, decision.num_tokens - num_decoding, num_decoding)
        return StepBatch(failures + outputs, self.load(), self._scheduler.pool.take_forgotten())

    def _settle_grammars(self) -> list[StepOutput]:
        """Schedule the requests whose grammar is compiled; return the end of those whose grammar failed."""
        assert self._grammars is not None
        is_idle = not (self._scheduler.running or self._scheduler.waiting)
        settled = self._grammars.settle(self._clock.now_s(), _GRAMMAR_WAIT_S if is_idle else 0.0)
        for request in settled.ready:
            self._scheduler.add(request)
        return [StepOutput(name, finish_reason="error", error=error) for name, error in settled.failed]

    def load(self) -> EngineLoad:
        scheduler = self._scheduler
        return EngineLoad(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + (len(self._grammars) if self._grammars else 0),
            num_free_blocks=scheduler.pool.num_allocatable,
            num_total_blocks=scheduler.pool.num_blocks,
            step_s=self._step_s,
            num_preemptions=scheduler.num_preemptions,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            steps=self._steps,
            prefill_token_s=self._cost.prefill_token_s,
            decode_token_s=self._cost.decode_token_s,
            num_uncomputed_tokens=scheduler.num_uncomputed_tokens,
            step_per_request_s=self._cost.step_per_request_s,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError, showing what failed, unless every block and request is accounted for."""
        self._scheduler.check_integrity()

    def _update(
        self, decision: Decision, requests: list[EngineRequest], sampled: list[Sampled]
    ) -> list[StepOutput]:
        self._scheduler.update(decision)
        return [self._take(request, result) for request, result in zip(requests, sampled, strict=True)]

    def _take(self, request: EngineRequest, result: Sampled) -> StepOutput:
        """Give a request its sampled token; end it if that was the last, or if its logits were damaged."""
        request_id = request.request_id
        if result.error:
            self._scheduler.remove(request_id, is_damaged=True)
            return StepOutput(request_id, finish_reason="error", error=result.error)
        num_cached_tokens = request.take_num_cached_tokens()
        num_before = len(request.token_ids)
        finish_reason = request.append(result.token_id)
        if finish_reason is not None:
            self._scheduler.remove(request_id)
        if len(request.token_ids) == num_before:  # a stop token is not kept
            return StepOutput(request_id, [], finish_reason, num_cached_tokens=num_cached_tokens)
        logprobs = None if result.logprobs is None else [result.logprobs]
        return StepOutput(request_id, [result.token_id], finish_reason, logprobs, num_cached_tokens)
