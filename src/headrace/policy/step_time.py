"""How long engine steps take, by the step model that an engine fitted. For scaling and planning. Pure.

Computes with `api.messages.StepModel`; `engine.step_model` fits it. Must not know engines or replicas.
"""

from __future__ import annotations

from headrace.api.messages import StepModel


def step_s(
    model: StepModel,
    num_prompt_tokens: float = 0.0,
    mean_context_tokens: float = 0.0,
    num_decoded_tokens: float = 0.0,
    num_kv_tokens: float = 0.0,
) -> float:
    """Return the seconds of one step: `num_prompt_tokens` uncached prompt tokens that attend to
    `mean_context_tokens` each, and `num_decoded_tokens` that read `num_kv_tokens` together."""
    return (
        model.a
        + model.b * num_prompt_tokens
        + model.q * num_prompt_tokens * mean_context_tokens
        + model.c * num_decoded_tokens
        + model.d * num_kv_tokens
    )


def decode_token_s(model: StepModel, num_decoding: float, mean_context_tokens: float) -> float:
    """Return the engine time per output token in a batch of `num_decoding` (> 0) requests: its part of the
    step's fixed time included."""
    return model.a / num_decoding + model.c + model.d * mean_context_tokens


def request_s(
    model: StepModel,
    num_uncached_tokens: int,
    num_output_tokens: float,
    num_cached_tokens: int = 0,
    num_decoding: float = 1.0,
) -> float:
    """Return the engine time of one request that decodes in a batch of `num_decoding`; its prompt's tokens
    bear no fixed time, since they ride in steps that others share."""
    num_prompt = num_uncached_tokens + num_cached_tokens
    prompt_s = num_uncached_tokens * (model.b + model.q * (num_cached_tokens + (num_uncached_tokens + 1) / 2))
    mean_context = num_prompt + num_output_tokens / 2
    return prompt_s + num_output_tokens * decode_token_s(model, num_decoding, mean_context)
