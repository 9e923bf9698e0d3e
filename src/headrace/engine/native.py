"""The native engine: scheduler, model runner and sampler, joined into one step.

Owns request ids, reasons to end, and what a step reports. Must not know sockets, text, or how logits come.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Literal

import numpy as np

from headrace.api.messages import (
    EngineLoad,
    EngineReady,
    EngineSpec,
    GenerationRequest,
    KvPlace,
    StepBatch,
    StepOutput,
)
from headrace.clock import Clock
from headrace.engine.grammar_queue import GrammarQueue
from headrace.engine.kv_cache.block_pool import BlockPool
from headrace.engine.kv_import import import_prefix
from headrace.engine.prompt_budget import Streams, prompt_budget
from headrace.engine.protocol import ModelRunner, StepInput
from headrace.engine.request import EngineRequest, check_request
from headrace.engine.sampler import Sampler
from headrace.engine.scheduler import Decision, Scheduler
from headrace.engine.speculation.speculator import Speculator
from headrace.engine.speculation.verify import Verified, verify
from headrace.engine.step_batch import StepInputBuilder
from headrace.engine.work import WorkAccount, decode_part, prompt_part
from headrace.errors import InvalidRequest, ModelError, Overloaded

_GRAMMAR_WAIT_S = 0.02
"""Longest wait for a grammar with nothing else to do: commands are read in between."""


class NativeEngine:
    """Generates with a model runner. Turn of a step: schedule, guess, run, verify by sampling, update."""

    def __init__(
        self,
        spec: EngineSpec,
        runner: ModelRunner,
        clock: Clock,
        speculator: Speculator | None = None,
        grammars: GrammarQueue | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        """Without `grammars`, requests with a grammar are refused; without `sampler`, numpy samples."""
        self._spec = spec
        self._runner = runner
        self._clock = clock
        capacity = runner.num_blocks * runner.block_size
        self._max_context_tokens = min(runner.max_context_tokens, capacity)
        if spec.max_context_tokens:
            self._max_context_tokens = min(self._max_context_tokens, spec.max_context_tokens)
        self._scheduler = Scheduler(
            BlockPool(runner.num_blocks, runner.kv_file),
            runner.block_size,
            spec.max_running,
            spec.token_budget,
        )
        self._builder = StepInputBuilder(runner.block_size, spec.token_budget, spec.max_running)
        self._sampler = sampler or Sampler()
        self._speculator = speculator
        self._grammars = grammars
        self._arrivals = count()
        self._steps = 0
        self._step_s = 0.0
        self._num_imported_tokens = 0
        self._work = WorkAccount(clock.now_ns())
        self._sleep_level = 0

    def __repr__(self) -> str:
        return f"<NativeEngine {self._runner.architecture}, step {self._steps}, {self._scheduler!r}>"

    def describe(self) -> EngineReady:
        runner = self._runner
        path = runner.path
        if self._speculator is not None:
            path = f"{path}; speculation: {self._speculator.description}"
        return EngineReady(
            kind="native",
            architecture=runner.architecture,
            vocab_size=runner.vocab_size,
            max_context_tokens=self._max_context_tokens,
            block_size=runner.block_size,
            num_total_blocks=runner.num_blocks,
            max_running=self._spec.max_running,
            path=path,
            phases={},
            sleep_level=self._sleep_level,
        )

    def compute_first_step(self) -> None:
        """Compute one step before anyone waits for it. Raises ModelError if its logits are not finite."""
        num_tokens = min(self._runner.block_size, self._spec.token_budget)
        places = np.arange(num_tokens, dtype=np.int32)
        pool = self._scheduler.pool
        block = pool.allocate()
        logits_SV = self._runner.execute(
            StepInput(
                token_ids_T=np.zeros(num_tokens, np.int32),
                positions_T=places,
                slots_T=places + block * self._runner.block_size,
                query_starts=np.array([0, num_tokens], np.int32),
                context_lengths_R=np.array([num_tokens], np.int32),
                block_tables=[[block]],
                sampled_rows_S=places[-1:],
            )
        )
        pool.release([block])
        if not bool(logits_SV.isfinite().all()):
            raise ModelError(
                "the model's first step gave logits that are not finite; its file is damaged, or its numbers "
                "do not fit into this dtype: set dtype to float32"
            )
        self._work = WorkAccount(self._clock.now_ns())

    def submit(self, request: GenerationRequest) -> None:
        grammars = self._grammars
        if request.request_id in self._scheduler or (grammars and request.request_id in grammars):
            raise InvalidRequest(f"request id {request.request_id!r} is in use; ids must be unique")
        if self._sleep_level:
            raise Overloaded("the engine is asleep; wake it or use another replica", retry_after_s=1.0)
        check_request(
            request,
            self._runner.vocab_size,
            self._max_context_tokens,
            knows_grammars=grammars is not None,
        )
        accepted = EngineRequest(
            request, next(self._arrivals), self._runner.eos_token_ids, self._max_context_tokens
        )
        self._import_prefix(accepted, request.kv_place)
        if grammars is not None and request.grammar:
            grammars.add(accepted, request.grammar, self._clock.now_s())
        else:
            self._schedule(accepted)

    def abort(self, request_id: str) -> None:
        self._scheduler.remove(request_id)
        if self._grammars is not None:
            self._grammars.remove(request_id)

    def num_waiting(self) -> int:
        return len(self._scheduler.waiting) + (len(self._grammars) if self._grammars else 0)

    def has_work(self) -> bool:
        return self._is_computing() or bool(self._grammars)

    def step(self) -> StepBatch:
        failures = self._settle_grammars() if self._grammars else []
        if not self._is_computing():
            return StepBatch(failures, self.load(), self._scheduler.pool.take_forgotten())
        begin_s = self._clock.now_s()
        decision = self._scheduler.schedule(self._prompt_budget)
        assert decision.scheduled, f"a step without work: {self!r}"
        if self._speculator is not None:
            self._speculator.add_drafts(decision, self._scheduler, self._work.fit.coefficients)
        logits_SV = self._runner.execute(self._builder.build(decision.scheduled))
        verified = verify(
            decision.scheduled, lambda rows, requests: self._sampler.sample(logits_SV, requests, rows)
        )
        self._share_time(decision)
        outputs = self._update(decision, verified)
        self._steps += 1
        self._step_s = self._clock.now_s() - begin_s
        if self._speculator is not None:
            self._speculator.observe(verified)
        return StepBatch(failures + outputs, self.load(), self._scheduler.pool.take_forgotten())

    def _import_prefix(self, request: EngineRequest, place: KvPlace | None) -> None:
        """Have what another engine computed of it, as far as it can be had: the scheduler finds it cached."""
        file = self._runner.kv_file
        if place is not None and file is not None:
            hashes = self._scheduler.prefix_hashes(request)
            num_blocks = import_prefix(place, hashes, self._scheduler.pool, file)
            self._num_imported_tokens += num_blocks * self._runner.block_size

    def _prompt_budget(self, streams: Streams) -> int:
        return prompt_budget(self._work.fit.coefficients, streams, self._spec.token_budget)

    def _settle_grammars(self) -> list[StepOutput]:
        """Schedule the requests whose grammar is compiled; return the end of those whose grammar failed."""
        assert self._grammars is not None
        wait_s = 0.0 if self._is_computing() else _GRAMMAR_WAIT_S
        settled = self._grammars.settle(self._clock.now_s(), wait_s)
        for request in settled.ready:
            self._schedule(request)
        return [StepOutput(name, finish_reason="error", error=error) for name, error in settled.failed]

    def _is_computing(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def _schedule(self, request: EngineRequest) -> None:
        if not self._is_computing():
            self._work.rest(self._clock.now_ns())
        self._scheduler.add(request)

    def load(self) -> EngineLoad:
        scheduler, work, speculator = self._scheduler, self._work, self._speculator
        self._runner.check_health()
        if not self._is_computing():
            work.rest(self._clock.now_ns())
        return EngineLoad(
            num_running=len(scheduler.running),
            num_waiting=self.num_waiting(),
            num_free_blocks=scheduler.pool.num_allocatable,
            num_total_blocks=scheduler.pool.num_blocks,
            step_s=self._step_s,
            num_preemptions=scheduler.num_preemptions,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            steps=self._steps,
            prefill_token_s=work.fit.prefill_token_s,
            decode_token_s=work.fit.decode_token_s,
            num_uncomputed_tokens=scheduler.num_uncomputed_tokens,
            step_per_request_s=work.fit.step_per_request_s,
            num_draft_tokens=0 if speculator is None else speculator.num_draft_tokens,
            num_accepted_tokens=0 if speculator is None else speculator.num_accepted_tokens,
            busy_ns=work.busy_ns,
            idle_ns=work.idle_ns,
            step_model=work.fit.model,
            sleep_level=self._sleep_level,
            num_imported_tokens=self._num_imported_tokens,
        )

    def sleep(self, level: Literal[1, 2]) -> list[bytes]:
        if self.has_work():
            num_open = len(self._scheduler.running) + len(self._scheduler.waiting)
            raise Overloaded(f"the engine cannot sleep: it has {num_open} requests", retry_after_s=1.0)
        self._runner.sleep(level)
        if self._speculator is not None:
            self._speculator.sleep(level)
        self._sleep_level = max(level, self._sleep_level)
        self._scheduler.pool.forget_all()
        return self._scheduler.pool.take_forgotten()

    def wake(self) -> None:
        if self._sleep_level:
            self._runner.wake()
            if self._speculator is not None:
                self._wake_speculator(self._speculator)
            self._sleep_level = 0

    def _wake_speculator(self, speculator: Speculator) -> None:
        try:
            speculator.wake()
        except Exception:  # whatever it is: half awake is no state
            self._runner.sleep(2 if self._sleep_level == 2 else 1)
            raise

    def check_integrity(self) -> None:
        """Raise AssertionError, showing what failed, unless every block and request is accounted for."""
        self._scheduler.check_integrity()

    def _share_time(self, decision: Decision) -> None:
        """Split the time up to here over the step's requests. What is left of the step, and sending it, goes
        to the next one."""
        parts = [
            decode_part(1 + len(drafts), request.num_computed_tokens + 1 + len(drafts))
            if num_new == 1
            else prompt_part(num_new, request.num_computed_tokens)
            for request, num_new, _, drafts in decision.scheduled
        ]
        shares = self._work.end_step(self._clock.now_ns(), parts)
        for item, share in zip(decision.scheduled, shares, strict=True):
            item.request.engine_ns += share

    def _update(self, decision: Decision, verified: Sequence[Verified]) -> list[StepOutput]:
        self._scheduler.update(decision, [result.num_accepted for result in verified])
        return [self._take(result) for result in verified]

    def _take(self, result: Verified) -> StepOutput:
        """Turn what a request was given into its output; forget it if that was its end."""
        request, finish_reason = result.request, result.finish_reason
        request_id = request.request_id
        if finish_reason == "error":
            self._scheduler.remove(request_id, is_damaged=True)
            return StepOutput(
                request_id, finish_reason="error", error=result.error, engine_ns=request.engine_ns
            )
        if finish_reason is not None:
            self._scheduler.remove(request_id)
        num_cached_tokens = request.take_num_cached_tokens()
        return StepOutput(
            request_id,
            result.token_ids,
            finish_reason,
            result.logprobs,
            num_cached_tokens,
            engine_ns=request.engine_ns,
        )
