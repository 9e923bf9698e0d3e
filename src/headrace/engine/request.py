"""What the engine keeps of one request, and which requests it refuses.

Pure. Must not know blocks' contents, torch, or other requests.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from headrace.api.messages import FinishReason, GenerationRequest, SamplingParams
from headrace.engine.constraint import Constraint
from headrace.engine.kv_cache.prefix_cache import BlockHash, root_hash
from headrace.engine.penalties import Penalties
from headrace.engine.sample_settings import RowSettings
from headrace.engine.speculation.controller import DraftController
from headrace.errors import InvalidRequest

MAX_LOGPROBS = 64
"""Most alternatives reported per token."""
NO_TOKEN = -1
"""In place of a token id: the answer is complete, and its grammar allows nothing more."""


def check_request(
    request: GenerationRequest,
    vocab_size: int,
    max_context_tokens: int,
    *,
    knows_grammars: bool = False,
    adapters: Collection[str] = (),
) -> None:
    """Raise InvalidRequest, saying what was got and what is allowed, if `request` can never run."""
    prompt = request.prompt_token_ids
    if request.lora and request.lora not in adapters:
        known = ", ".join(adapters) or "none"
        raise InvalidRequest(
            f"LoRA {request.lora!r} was asked for; adapters of this engine are: {known}", param="lora"
        )
    if request.grammar and not knows_grammars:
        raise InvalidRequest("a grammar was given; this engine does not support grammars", param="grammar")
    if not prompt:
        raise InvalidRequest("the prompt has no tokens; send at least one", param="prompt")
    _check_ids("prompt", prompt, vocab_size)
    _check_ids("resume_from", request.resume_from, vocab_size)
    if not 0 <= request.num_shared_tokens <= len(prompt):
        raise InvalidRequest(
            f"num_shared_tokens is {request.num_shared_tokens}; it must be 0 to {len(prompt)}",
            param="num_shared_tokens",
        )
    num_context = len(prompt) + len(request.resume_from)
    if num_context >= max_context_tokens:
        raise InvalidRequest(
            f"the prompt has {num_context} tokens and the context holds {max_context_tokens}, "
            "which must leave room for at least one new token; shorten the prompt",
            param="prompt",
            code="context_length_exceeded",
        )
    check_sampling(request.sampling, vocab_size)
    if len(request.resume_from) >= request.sampling.max_tokens:
        raise InvalidRequest(
            f"resume_from has {len(request.resume_from)} tokens and max_tokens is "
            f"{request.sampling.max_tokens}; nothing is left to generate",
            param="max_tokens",
        )


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest naming the first parameter that is out of its range."""
    s = sampling
    checks = (
        ("max_tokens", s.max_tokens, s.max_tokens >= 1, ">= 1"),
        ("min_tokens", s.min_tokens, s.min_tokens >= 0, ">= 0"),
        ("temperature", s.temperature, 0 <= s.temperature < math.inf, ">= 0 and finite"),
        ("top_p", s.top_p, 0 < s.top_p <= 1, "> 0 and <= 1"),
        ("top_k", s.top_k, s.top_k >= 0, ">= 0 (0: all tokens)"),
        ("min_p", s.min_p, 0 <= s.min_p <= 1, ">= 0 and <= 1"),
        ("presence_penalty", s.presence_penalty, math.isfinite(s.presence_penalty), "finite"),
        ("frequency_penalty", s.frequency_penalty, math.isfinite(s.frequency_penalty), "finite"),
        ("repetition_penalty", s.repetition_penalty, 0 < s.repetition_penalty < math.inf, "> 0 and finite"),
        ("num_logprobs", s.num_logprobs, -1 <= s.num_logprobs <= MAX_LOGPROBS, f"-1 to {MAX_LOGPROBS}"),
    )
    for name, value, is_allowed, allowed in checks:
        if not is_allowed:
            raise InvalidRequest(f"{name} is {value}; it must be {allowed}", param=name)
    _check_ids("logit_bias", s.logit_bias, vocab_size)
    for token_id, bias in s.logit_bias.items():
        if not math.isfinite(bias):
            raise InvalidRequest(
                f"logit_bias of token {token_id} is {bias}; it must be finite", param="logit_bias"
            )
    _check_ids("stop_token_ids", s.stop_token_ids, vocab_size)


def _check_ids(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = min(token_ids) if min(token_ids) < 0 else max(token_ids)
        raise InvalidRequest(f"{name} has token id {wrong}; ids are 0 to {vocab_size - 1}", param=name)


class EngineRequest:
    """One accepted request: its tokens, how far they are computed, and its KV blocks.

    The scheduler owns num_computed_tokens, the block table and the hashes; the sampler owns `penalties`,
    `constraint` and `row_settings`; speculation owns `draft_controller` and `proposer_state`. What is None at
    first is made when it is needed.
    """

    __slots__ = (
        "arrival",
        "block_hashes",
        "block_table",
        "constraint",
        "draft_controller",
        "end_token_ids",
        "engine_ns",
        "has_output",
        "is_resumed",
        "max_total_tokens",
        "num_admissions",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_shared_tokens",
        "order",
        "penalties",
        "proposer_state",
        "request_id",
        "root_hash",
        "row_settings",
        "sampling",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: GenerationRequest,
        arrival: int,
        eos_token_ids: frozenset[int],
        max_context_tokens: int,
    ) -> None:
        """`arrival`: grows by one per request; ties of priority go to the earlier one."""
        sampling = request.sampling
        self.request_id = request.request_id
        self.sampling = sampling
        self.arrival = arrival
        self.is_resumed = bool(request.resume_from or request.stream_class)
        """It ran in another engine before: its client has waited already."""
        self.order = (-request.priority, not self.is_resumed, arrival)
        """Sort key: higher priority first, then what is resumed, then the earlier arrival."""
        self.token_ids = [*request.prompt_token_ids, *request.resume_from]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_total_tokens = min(self.num_prompt_tokens + sampling.max_tokens, max_context_tokens)
        stops = frozenset(sampling.stop_token_ids)
        self.stop_token_ids = stops if sampling.ignore_eos else stops | eos_token_ids
        self.engine_ns = 0
        """Its parts of the steps it was in."""
        self.end_token_ids = self.stop_token_ids & eos_token_ids
        """What may end an answer where its grammar allows an end."""
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        """Prompt tokens that the prefix cache spared at the first admission; None before it."""
        self.num_admissions = 0
        """How often it was given a block table: a preemption takes it away."""
        self.has_output = False
        self.block_table: list[int] = []
        self.block_hashes: list[BlockHash] = []
        """Of the full blocks of token_ids, as far as they were needed."""
        self.root_hash = root_hash(request.cache_salt)
        self.num_shared_tokens = request.num_shared_tokens
        self.penalties = Penalties.of(sampling, self.stop_token_ids)
        self.row_settings: RowSettings | None = None
        self.draft_controller: DraftController | None = None
        self.proposer_state: object | None = None
        self.constraint: Constraint | None = None
        """Of a request with a grammar; set before it is scheduled."""

    def __repr__(self) -> str:
        return (
            f"<EngineRequest {self.request_id}: {self.num_computed_tokens} of {len(self.token_ids)} tokens "
            f"computed, {len(self.block_table)} blocks>"
        )

    @property
    def num_generated_tokens(self) -> int:
        """Generated here or, before a resume, elsewhere: the index of the next token."""
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token_id: int) -> FinishReason | None:
        """Take the sampled token; say whether it ends the generation. A stop token is not kept; a token after
        which the grammar allows nothing more is."""
        if token_id in self.stop_token_ids or token_id == NO_TOKEN:
            return "stop"
        self.token_ids.append(token_id)
        if self.constraint is not None and self.constraint.is_complete:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_total_tokens else None

    def take_num_cached_tokens(self) -> int:
        """Return num_cached_tokens for the first output, and 0 for every later one."""
        if self.has_output:
            return 0
        self.has_output = True
        return self.num_cached_tokens or 0
