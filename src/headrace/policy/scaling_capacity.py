"""What one replica can serve within its SLO, and what demand costs it, in engine-seconds. Pure.

Owns the algebra over the step model. Must not know replicas, windows or decisions.

A replica that decodes B requests in steps of T seconds, with x requests arriving per second, each of work w
(its prompt's and its tokens' own time) and O output tokens, spends its time as T = a + x*T*w, so
T = a / (1 - x*w); by Little's law B = x*O*T. So
  T <= the SLO of ITL          <=>  x*w <= 1 - a/SLO
  B <= the largest batch M     <=>  x*(w + O*a/M) <= 1
and the demand of any number of requests, counted in replicas that do nothing else, is linear in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from headrace.api.messages import StepModel

MIN_STEP_ROOM = 0.05
"""An ITL below this much more than a step's fixed time cannot be kept by any number of replicas."""
MAX_STEP_S = 600.0


@dataclass(frozen=True, slots=True)
class RequestShape:
    """Mean tokens of the requests that finished lately."""

    prompt_tokens: float
    cached_ratio: float
    """Part of the prompt that prefix caches spared, 0 to 1."""
    output_tokens: float


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What bounds a step, and how long it may take."""

    max_running: float
    num_kv_tokens: float = 0.0
    """0: not known, no bound."""
    token_budget: float = 512.0
    itl_s: float = 0.0
    """0: nothing is promised."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What requests cost a replica that is as full as its limits allow, in seconds of it."""

    request_s: float
    """Per request, without its prompt."""
    prompt_token_s: float
    """Per token of a prompt, cached ones included."""
    mean_request_s: float
    """A mean request, all of it; 1 / this are the requests per second of a full replica."""
    work_s: float
    """The part of it that is the request's own, whatever else is in the batch."""
    max_batch: float
    """Requests that decode together in a full replica."""
    prefill_s: float
    """From the first step of a mean prompt to its first token, in a full replica."""
    bound: str
    """What a full replica is full of, for people."""


def mean_model(models: Iterable[StepModel]) -> StepModel | None:
    """Return the mean of the replicas' models; None without any that is usable. A fit may be a little below
    zero where recent steps said nothing: that counts as zero."""
    count, sums = 0, [0.0] * 5
    for model in models:
        values = (model.a, model.b, model.q, model.c, model.d)
        total = sum(values)
        if not (math.isfinite(total) and max(values) <= MAX_STEP_S and max(model.a, model.b, model.c) > 0):
            continue
        count += 1
        for index, value in enumerate(values):
            if value > 0:
                sums[index] += value
    if count == 0:
        return None
    a, b, q, c, d = (value / count for value in sums)
    return StepModel(a=a, b=b, q=q, c=c, d=d)


def times(model: StepModel, factor: float) -> StepModel:
    """Return the model of an engine that takes `factor` times as long."""
    return StepModel(
        a=factor * model.a, b=factor * model.b, q=factor * model.q, c=factor * model.c, d=factor * model.d
    )


def model_of_costs(
    prefill_token_s: float, decode_token_s: float, step_per_request_s: float, mean_running: float
) -> StepModel | None:
    """Return a model from the mean costs of an engine that fits none, decoding `mean_running` requests."""
    values = (prefill_token_s, decode_token_s, step_per_request_s)
    if not all(math.isfinite(value) and 0 <= value <= MAX_STEP_S for value in values) or decode_token_s <= 0:
        return None
    per_request_s = min(step_per_request_s, decode_token_s)
    fixed_s = (decode_token_s - per_request_s) * max(1.0, mean_running)
    return StepModel(fixed_s, prefill_token_s, 0.0, per_request_s, 0.0)


def capacity_of(model: StepModel, shape: RequestShape, limits: EngineLimits) -> Capacity:
    """Return what requests of `shape` cost a full replica."""
    num_prompt, num_output = max(1.0, shape.prompt_tokens), max(1.0, shape.output_tokens)
    num_uncached = num_prompt * (1 - min(1.0, max(0.0, shape.cached_ratio)))
    attended = num_prompt - num_uncached + (num_uncached + 1) / 2
    uncached_s = num_uncached * (model.b + model.q * attended)
    prompt_token_s = uncached_s / num_prompt
    decoded_s = model.c + model.d * (num_prompt + num_output / 2)
    work_s = uncached_s + num_output * decoded_s
    batch = max(1.0, limits.max_running)
    if limits.num_kv_tokens > 0:
        batch = max(1.0, min(batch, limits.num_kv_tokens / (num_prompt + num_output)))
    by_batch_s = work_s + num_output * model.a / batch
    room = 1 - model.a / limits.itl_s if limits.itl_s > 0 else 0.0
    is_itl_bound = room >= MIN_STEP_ROOM and work_s / room > by_batch_s
    if is_itl_bound:
        mean_s, factor, request_s = work_s / room, 1 / room, num_output * decoded_s / room
        batch = min(batch, num_output * limits.itl_s / mean_s)
        bound = (
            f"a batch of {max(1.0, batch):.3g} requests takes the SLO's {1e3 * limits.itl_s:g} ms per step"
        )
    else:
        mean_s, factor, request_s = by_batch_s, 1.0, num_output * (decoded_s + model.a / batch)
        bound = f"{batch:.3g} requests fit one batch"
        if limits.itl_s > 0 and room < MIN_STEP_ROOM:
            bound += ", and no replica keeps the SLO between tokens"
    batch = max(1.0, batch)
    num_steps = max(1.0, num_uncached / max(1.0, limits.token_budget))
    prefill_s = uncached_s + num_steps * (model.a + batch * decoded_s)
    return Capacity(request_s, prompt_token_s * factor, mean_s, work_s, batch, prefill_s, bound)


def measured_ratio(engine_s: float, model: StepModel, shape: RequestShape, mean_running: float) -> float:
    """Return how much more engine time requests took than the model says of them in batches of
    `mean_running`: speculation, preemption and whatever else it does not know. Within [0.5, 2]."""
    num_uncached = shape.prompt_tokens * (1 - shape.cached_ratio)
    attended = shape.prompt_tokens - num_uncached + (num_uncached + 1) / 2
    context = shape.prompt_tokens + shape.output_tokens / 2
    token_s = model.a / max(1.0, mean_running) + model.c + model.d * context
    expected_s = num_uncached * (model.b + model.q * attended) + shape.output_tokens * token_s
    if not (expected_s > 0 and math.isfinite(engine_s) and engine_s > 0):
        return 1.0
    return min(2.0, max(0.5, engine_s / expected_s))
