"""One endpoint's part of the config tree: model, engine, replicas, and what its users are promised.

Owns meaning, unit and default of each of these settings. Must not know files, the environment or processes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from headrace.api.node_config import NodeSettings
from headrace.api.section import Section


class Replicas(Section):
    """How many replicas an endpoint has. A plain number N means {min: N, max: N}."""

    min: Annotated[int, Field(ge=0, le=1024)] = 1
    """Replicas that are always there. 0: none until a request comes."""
    max: Annotated[int, Field(ge=1, le=1024)] = 1
    """Most replicas that `headrace scale` or demand may ask for."""
    standby: Annotated[int, Field(ge=0, le=1024)] = 0
    """Replicas beyond those that serve: loaded, without KV memory, promoted in milliseconds. Within max."""

    @model_validator(mode="before")
    @classmethod
    def _fill_max(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"min": value, "max": max(value, 1)}
        if isinstance(value, dict) and "max" not in value and isinstance(value.get("min"), int):
            return {**value, "max": max(value["min"], 1)}
        return value

    @model_validator(mode="after")
    def _check_order(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}; min must be at most max")
        if self.standby > self.max:
            raise ValueError(
                f"standby is {self.standby} and max is {self.max}; standby must be at most max, since all of "
                "them may be needed at once"
            )
        return self


class Slo(Section):
    """What an endpoint's users may expect: scaling keeps it, rollouts judge by it. 0: nothing is promised."""

    ttft_ms: Annotated[float, Field(ge=0, le=3_600_000)] = 0.0
    """Time to first token, in milliseconds."""
    itl_ms: Annotated[float, Field(ge=0, le=3_600_000)] = 0.0
    """Mean time between tokens, in milliseconds."""
    attainment_ratio: Annotated[float, Field(ge=0.5, le=0.9999)] = 0.99
    """Part of the requests that scaling is to keep within ttft_ms. More costs more replicas."""


class CustomMetric(Section):
    """A number of yours that asks for replicas: value / per_replica of them, at least."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_:][A-Za-z0-9_:]{0,127}$")]
    """The metric's name in the source. Samples that differ in labels are added up."""
    source: Annotated[str, Field(min_length=1)]
    """Where it is read every few seconds, in Prometheus's text format: a file, or an http(s) address."""
    per_replica: Annotated[float, Field(gt=0)]
    """How much of it one replica serves."""
    max_age_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """An older value, or none, asks for nothing."""

    @field_validator("source")
    @classmethod
    def _check_source(cls, value: str) -> str:
        scheme, separator, rest = value.partition("://")
        if separator and (scheme not in ("http", "https") or not rest):
            raise ValueError(f"source is {value!r}; write the path of a file, or an http(s) address")
        return value


class Scaling(Section):
    """How the number of replicas follows demand between replicas.min and replicas.max."""

    target_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Most of its engines' time that an endpoint is meant to use. Left out: where slo.ttft_ms is set, as much
    as slo.attainment_ratio allows, learned from demand; elsewhere, and until enough was seen, 0.7."""
    down_after_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """A lower count must have been enough for this long, or for what a start costs if that is longer."""
    idle_to_zero_s: Annotated[float, Field(ge=0, le=86_400)] = 300.0
    """With replicas.min 0: without any request for this long it goes to zero."""
    metrics: Annotated[list[CustomMetric], Field(max_length=16)] = []
    """Further reasons for replicas."""


class Rollout(Section):
    """How a change of model, engine or settings reaches an endpoint's replicas."""

    surge: Annotated[int, Field(ge=0, le=64)] = 1
    """Replicas beyond the wanted count while versions change. 0: there is room for no more: the old one is
    stopped first, and requests are held meanwhile."""
    traffic: list[Annotated[float, Field(gt=0, le=1)]] = [0.1, 0.5, 1.0]
    """Parts of the requests that the new version gets, stage after stage."""
    min_requests: Annotated[int, Field(ge=0, le=1_000_000)] = 20
    """Finished requests of the new version before a stage is judged."""
    stage_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """Longest time in a stage: with fewer requests it is judged by what there was."""
    max_failed_ratio: Annotated[float, Field(ge=0, le=1)] = 0.02
    """More of its requests failing than this, and than the old version's, rolls back, where so many make it
    sure that chance did not do it. 0: a single one does, unless the old version fails, too."""
    max_slow_ratio: Annotated[float, Field(ge=0, le=1)] = 0.2
    """More of its requests beyond the SLO than the old version's by this much rolls back, likewise."""
    start_limit_s: Annotated[float, Field(gt=0, le=86_400)] = 900.0
    """A new version without a ready replica by then is rolled back, as is one that fails repeatedly."""

    @field_validator("traffic")
    @classmethod
    def _check_traffic(cls, value: list[float]) -> list[float]:
        if not value or value[-1] != 1 or sorted(set(value)) != value:
            raise ValueError(f"traffic is {value}; write rising parts that end with 1, like [0.1, 0.5, 1]")
        return value


class Streams(Section):
    """What becomes of open answers when their engine goes away."""

    resume_attempts: Annotated[int, Field(ge=0, le=16)] = 6
    """Engines that an answer may be continued on, one after another. 0: a lost engine ends its answers."""
    resume_limit_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Longest time without an engine before an answer ends with an error."""
    handover_after_s: Annotated[float, Field(ge=0, le=86_400)] = 2.0
    """A replica that is taken away hands what is then still open to siblings, and frees its engine."""
    durable: bool = False
    """Answers survive the loss of a whole replica, its front and its host: fronts beside each gateway own
    them, for one more process on each token's way."""
    durable_fronts: Annotated[int, Field(ge=1, le=16)] = 1
    """With durable: such fronts per gateway. One that dies cuts its answers; each uses one core at most."""

    @model_validator(mode="after")
    def _check_durable(self) -> Streams:
        if self.durable and not self.resume_attempts:
            raise ValueError(
                "durable is true and resume_attempts is 0; a durable answer must be allowed another engine: "
                "set resume_attempts to 1 or more"
            )
        return self


class Speculation(Section):
    """Guessing tokens ahead, so that one step can yield several. Answers stay the same; requests for which it
    does not pay stop doing it."""

    method: Literal["off", "ngram", "draft"] = "off"
    """ngram: what followed the same words earlier in the text is guessed. draft: a small model guesses."""
    max_draft_tokens: Annotated[int, Field(ge=1, le=32)] = 7
    """Most tokens guessed per request and step."""
    draft_model: str = ""
    """With method draft: the small model, named like `model`. It must have the same vocabulary."""

    @model_validator(mode="after")
    def _check_draft_model(self) -> Speculation:
        if (self.method == "draft") != bool(self.draft_model):
            raise ValueError(
                f"method is {self.method} and draft_model is {self.draft_model!r}; "
                "method draft needs a draft_model, and only that method takes one"
            )
        return self


class NativeEngine(Section):
    """Settings of the native engine. The defaults fit a small model on a laptop."""

    max_running: Annotated[int, Field(ge=1, le=1024)] = 32
    """Most requests that one step computes together."""
    token_budget: Annotated[int, Field(ge=16, le=65536)] = 512
    """Most tokens that one step computes: bounds how long a long prompt can delay running streams."""
    block_size: int = 16
    """Tokens per KV block, a power of two >= 8. Smaller blocks share prefixes finer, larger cost less."""
    kv_cache_mb: Annotated[int, Field(ge=0)] = 0
    """Memory for the KV cache in MiB. 0: max_running requests of 1,024 tokens, within free memory."""
    max_context_tokens: Annotated[int, Field(ge=0)] = 0
    """Longest prompt plus answer. 0: what the model was trained for."""
    num_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Threads of one engine's step. 0: the machine's cores divided by the local replicas."""
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that compute the model together, each a part of every matrix and of the KV heads: at most as
    many as it has heads. They share num_threads. Pays where one process cannot reach all cores or memory."""
    dtype: Literal["auto", "int8", "bfloat16", "float32"] = "auto"
    """Arithmetic of the weights. auto: the fastest that keeps the model's quality on this machine."""
    kv_dtype: Literal["auto", "int8", "bfloat16", "float32"] = "auto"
    """What keys and values are kept in. int8 takes half the memory of bfloat16. auto: int8 where the
    weights' arithmetic is int8, else what that is."""
    packed_dir: str = "auto"
    """Directory of packed weights: packed at the first start, shared by all engines of the machine from then
    on. auto: `packed` in the state directory. off: none; each start packs them anew."""
    speculation: Speculation = Speculation()
    """Guessing tokens ahead."""

    @field_validator("block_size")
    @classmethod
    def _check_block_size(cls, value: int) -> int:
        if value < 8 or value & (value - 1):
            raise ValueError(f"block_size is {value}; it must be a power of two >= 8")
        return value


class VllmEngine(Section):
    """Settings of vLLM (extra `headrace[vllm]`). `native` does not concern it."""

    args: dict[str, Any] = {}
    """Arguments of vLLM's engine by its own names (max_model_len, tensor_parallel_size, ...), checked by vLLM
    when a replica starts. The model, its tokenizer and data parallelism are not among them."""
    lora: dict[str, str] = {}
    """LoRA adapters of the model: public model name -> directory with adapter_config.json and
    adapter_model.safetensors. Each is served under its name, by the endpoint's replicas."""


class SimulatedEngine(Section):
    """Settings of the simulated engine (tests, planning): it computes nothing, and its answers say so."""

    step_ms: Annotated[float, Field(ge=0, le=60_000)] = 5.0
    """Duration of one step, in milliseconds."""
    prefill_ms_per_token: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Added to a step per prompt token in it that the prefix cache does not hold, in milliseconds."""
    start_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """Time from start to ready, in seconds."""


class Queue(Section):
    """What happens to requests that no replica has room for."""

    max_requests: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    """Most requests held per endpoint; further ones get 503 with Retry-After."""
    max_wait_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Longest time that a request is held before it gets 503. Must cover a replica's start."""
    tell_after_s: Annotated[float, Field(ge=0, le=3600)] = 3.0
    """A stream that is held for longer begins with comment lines that say so, which keeps clients and proxies
    from giving up. Its later errors are events of the stream. 0: never."""


class Endpoint(Section):
    """A public model name and its policy."""

    model: Annotated[str, Field(min_length=1)]
    """A known name (smollm2-135m-instruct), a Hugging Face id, a directory, or a .gguf file."""
    engine: Literal["native", "vllm", "simulated"] = "native"
    """vllm: vLLM's engine, for models that the native one does not know; a Hugging Face id or a directory.
    simulated: a step-time model for tests and planning; its answers are not a model's."""
    replicas: Replicas = Replicas()
    native: NativeEngine = NativeEngine()
    vllm: VllmEngine = VllmEngine()
    simulated: SimulatedEngine = SimulatedEngine()
    queue: Queue = Queue()
    slo: Slo = Slo()
    scaling: Scaling = Scaling()
    rollout: Rollout = Rollout()
    streams: Streams = Streams()
    nodes: NodeSettings = NodeSettings()
    """Which nodes of a cluster its replicas may be on, with launcher ray."""
    max_open: Annotated[int, Field(ge=1, le=65536)] = 64
    """Most requests bound to one replica at a time, running or waiting in its engine."""
    drain_grace_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """How long a replica that is taken away may finish its open requests."""
    placement: Literal["prefix", "least_loaded", "round_robin"] = "prefix"
    """prefix: weigh cached prefixes and sessions against load. The others look at load or turns alone."""
    shared_prefix: Annotated[str, Field(max_length=262_144)] = ""
    """System prompt whose KV blocks all tenants may share. Empty: tenants share nothing."""

    @model_validator(mode="after")
    def _check_ranks(self) -> Endpoint:
        if self.nodes.rank_strategy == "pack" and self.engine != "native":
            raise ValueError(
                f"nodes.rank_strategy is pack and engine is {self.engine}; only the ranks of engine native "
                "can be on several nodes: leave it strict_pack"
            )
        return self

    @model_validator(mode="after")
    def _check_vllm(self) -> Endpoint:
        if self.engine != "vllm" and self.vllm.lora:
            raise ValueError(
                f"engine is {self.engine} and vllm.lora names adapters; only engine vllm serves them"
            )
        if self.engine == "vllm" and self.replicas.standby:
            raise ValueError(
                f"engine is vllm and replicas.standby is {self.replicas.standby}; vLLM engines cannot sleep, "
                "so none can stand by: set standby to 0 and replicas.min higher"
            )
        if self.engine == "vllm" and self.shared_prefix:
            raise ValueError(
                "engine is vllm and shared_prefix is set; vLLM cannot share the first part of a prompt "
                "between tenants: leave it out (one tenant's prompts share their prefixes anyway)"
            )
        return self
