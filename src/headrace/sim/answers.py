"""What the right answer to a prompt is: every token a pure function of prompt, seed and place.

Owns the oracles that clients compare with, and prompts that share beginnings. The oracle of the simulated
engine is one engine that answers the request alone; that of the native one computes each token from its
whole context, without blocks, batches or caches.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

import msgspec
import numpy as np

from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams
from headrace.clock import VirtualClock
from headrace.engine.fake_runner import fake_logits
from headrace.engine.simulated import SimulatedEngine

FAKE_VOCABULARY = 61
"""Of the native engine's runner; token 0 ends a text."""


class Question(msgspec.Struct, frozen=True):
    """What a client asks."""

    prompt: bytes
    max_tokens: int
    seed: int
    session: str = ""

    def body(self) -> bytes:
        """The HTTP request's body, as far as routers read it."""
        fields = {
            "model": "m",
            "messages": [{"role": "user", "content": self.prompt.decode("ascii")}],
            "max_tokens": self.max_tokens,
            "stream": True,
            "user": self.session,
        }
        return msgspec.json.encode(fields)

    def request(self, request_id: str, kind: str, tenant: str, salt: str) -> GenerationRequest:
        """What a front makes of it for an engine of this kind."""
        sampling = SamplingParams(max_tokens=self.max_tokens, temperature=0.0, seed=self.seed)
        return GenerationRequest(
            request_id, token_ids(self.prompt, kind), sampling, tenant=tenant, cache_salt=salt
        )


def token_ids(prompt: bytes, kind: str) -> list[int]:
    """A tokenizer: one token per byte."""
    if kind == "simulated":
        return list(prompt)
    return [byte % (FAKE_VOCABULARY - 1) + 1 for byte in prompt]


@lru_cache(maxsize=4096)
def expected_tokens(question: Question, kind: str) -> tuple[int, ...]:
    """The whole answer."""
    request = question.request("oracle", kind, "", "")
    return _simulated(request) if kind == "simulated" else _native(request)


def _simulated(request: GenerationRequest) -> tuple[int, ...]:
    clock = VirtualClock()
    engine = SimulatedEngine(EngineSpec("simulated", "m", simulated_step_s=0.0), clock, clock.advance)
    engine.submit(request)
    tokens: list[int] = []
    while engine.has_work():
        for output in engine.step().outputs:
            tokens += output.token_ids
    return tuple(tokens)


def _native(request: GenerationRequest) -> tuple[int, ...]:
    context: list[int] = list(request.prompt_token_ids)
    tokens: list[int] = []
    while len(tokens) < request.sampling.max_tokens:
        token = int(np.argmax(fake_logits(context, FAKE_VOCABULARY)))
        if token == 0:
            break
        tokens.append(token)
        context.append(token)
    return tuple(tokens)


def make_prompt(random: Random, num_families: int) -> bytes:
    """Return a prompt that begins like others of its family, for a part of its length."""
    family = random.randrange(num_families)
    shared = f"{family:03d} is what this family of prompts begins with. ".encode() * random.choice((1, 6, 12))
    return shared + bytes(random.choices(b"abcdefghij ", k=random.randint(4, 120)))
