"""What a front and its engine say to each other."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from headrace.api.messages.base import PROTOCOL_VERSION, Message, Record


class SamplingParams(Record, frozen=True):
    """How to choose each next token. The defaults are greedy-free OpenAI defaults (temperature 1)."""

    max_tokens: int = 16
    """Most tokens to generate, >= 1."""
    temperature: float = 1.0
    """>= 0; 0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Presence and frequency penalties count generated tokens only (OpenAI)."""
    repetition_penalty: float = 1.0
    """Counts prompt and generated tokens (CTRL, arXiv:1909.05858)."""
    logit_bias: dict[int, float] = {}
    num_logprobs: int = -1
    """-1: none; 0: of the sampled token; k: also of the k most likely."""
    seed: int = 0
    """The random number of the token at index i of a generation is a pure function of (seed, i)."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0


class Placed(Record, frozen=True):
    """What a durable front tells a replica of a guest that a router placed there: the replica reports it as
    if the client had come to its own front."""

    request_id: str
    """The client's request: several guests may be its choices."""
    replica_id: str
    """Where its place is. Another replica has it as a guest like any other."""
    prefix_hashes: list[int] = []
    """Of the prompt's head (`policy.prompt`), and its length."""
    num_prompt_bytes: int = 0


KV_MEMORY_NAME = "headrace-kv"
"""By which the system calls memory for keys and values that outlives its engine (memfd_create(2))."""


class KvPlace(Record, frozen=True):
    """Where an engine's keys and values can be read by processes of its machine, also when the engine is
    gone: memory that its front holds, as a descriptor of the front's. Whoever reads there checks what it
    finds; elsewhere the numbers mean nothing."""

    pid: int
    descriptor: int


class GenerationRequest(Record, frozen=True):
    """One generation: token ids in. `resume_from` are tokens already emitted elsewhere: the next token has
    index len(resume_from), and max_tokens counts them."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    resume_from: list[int] = []
    tenant: str = ""
    priority: int = 0
    cache_salt: str = ""
    """Mixed into the block hashes, so that only requests with the same salt share cached blocks."""
    lora: str = ""
    """Public name of the adapter; empty: the model itself. Engines that do not have it refuse the request."""
    grammar: str = ""
    """What the answer must match, as a grammar of `llguidance` (JSON); empty: anything. Tokens in
    `resume_from` are matched first."""
    num_shared_tokens: int = 0
    """The full KV blocks among this many first tokens are shared with other salts: a prefix that the
    endpoint declared public. Blocks after them depend on cache_salt."""
    stream_class: str = ""
    """Of a guest: only an engine of this class continues it. Its host looks at it; engines do not."""
    is_suspect: bool = False
    """Of a guest: engines were lost with it, so a host tries one such stream at a time."""
    placed: Placed | None = None
    """Of a durable front's guest. Engines do not see it."""
    kv_place: KvPlace | None = None
    """Of the engine that had it last: what it computed need not be computed again."""


class TokenLogprobs(Record, frozen=True):
    """Natural-log probabilities at one position, from the logits after penalties and before temperature."""

    logprob: float
    top: list[tuple[int, float]] = []
    """(token id, logprob), most likely first."""


FinishReason = Literal["stop", "length", "aborted", "error"]
"""aborted: only from a host, of a guest that it does not take or no longer carries; others may."""


class StepOutput(Record, frozen=True):
    """What one step gave one request."""

    request_id: str
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    """stop: an end or stop token, which is not in token_ids; length: max_tokens or the context is full."""
    logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache; set on the request's first output."""
    error: str = ""
    engine_ns: int = 0
    """Engine time spent on this request so far, in nanoseconds: its parts of the steps it was in. Told with
    every output, since a request whose client left, or whose stop string came, has no last one."""


class StepModel(Record, frozen=True):
    """Seconds of a step, fitted to recent ones: a + b*P + q*P*C + c*D + d*KV, with P uncached prompt tokens,
    C the mean context they attend to, D tokens decoded (one per request, guessed ones besides, whose P*C
    counts, too), KV tokens read by those. `policy.step_time` computes with it."""

    a: float
    b: float
    q: float
    c: float
    d: float
    relative_error: float = 0.0
    """Mean of |predicted - measured| / measured over the last steps, predicted before they were taken in."""
    num_steps: int = 0


class EngineLoad(Record, frozen=True):
    """The engine's state after a step."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    """Free or cached: allocatable at once."""
    num_total_blocks: int = 0
    step_s: float = 0.0
    num_preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    steps: int = 0
    prefill_token_s: float = 0.0
    """Measured engine time per uncached prompt token and per output token (its part of the step's fixed cost
    included), fitted over recent steps. 0: nothing measured yet."""
    decode_token_s: float = 0.0
    num_uncomputed_tokens: int = 0
    """Of prompts, running and waiting: what must be computed before a prompt that comes now."""
    step_per_request_s: float = 0.0
    """Measured time by which each decoding request lengthens a step; decode_token_s without the step's fixed
    cost. 0: nothing measured yet, or nothing worth measuring."""
    num_draft_tokens: int = 0
    """Tokens guessed and verified since the start, and how many of them were right."""
    num_accepted_tokens: int = 0
    busy_ns: int = 0
    """Engine time since it was ready: while it had requests, up to its last step (equals the sum of all
    requests' shares, those of aborted ones included), and while it had none. Together they are the time from
    ready to the last step, or to now if there is nothing to do."""
    idle_ns: int = 0
    step_model: StepModel | None = None
    sleep_level: int = 0
    """0: awake. 1: without KV memory. 2: also without weights. A sleeping engine refuses requests."""
    sleep_error: str = ""
    """After a Sleep or Wake that could not be done: why. In one message only."""
    num_imported_tokens: int = 0
    """Tokens whose keys and values were copied from another engine's memory since the start."""


class EngineSpec(msgspec.Struct, frozen=True):
    """What to start an engine process with. Zeros mean: the engine measures or decides."""

    kind: Literal["native", "vllm", "simulated"]
    model: str
    max_running: int = 32
    """Most requests in one step's batch."""
    token_budget: int = 512
    """Most tokens computed in one step."""
    block_size: int = 16
    """Tokens per KV block, a power of two >= 8."""
    kv_cache_bytes: int = 0
    max_context_tokens: int = 0
    num_threads: int = 0
    """Of all ranks together."""
    tensor_parallel: int = 1
    """Processes that compute the model together, each a part of every matrix."""
    rank_socket: str = ""
    """UNIX socket where the other ranks come to the engine, placed by a launcher; empty: it starts them."""
    rank_address: str = ""
    """Of the engine's machine, for ranks of others; empty: all ranks are on it."""
    dtype: Literal["auto", "int8", "bfloat16", "float32"] = "auto"
    kv_dtype: Literal["auto", "int8", "bfloat16", "float32"] = "auto"
    speculation: Literal["off", "ngram", "draft"] = "off"
    max_draft_tokens: int = 7
    """Most tokens guessed per request and step."""
    draft_model: str = ""
    """With speculation draft: a small model with the same vocabulary."""
    packed_dir: str = ""
    """Where packed weights are kept between starts; empty: nowhere."""
    is_standby: bool = False
    """Start asleep at level 1: everything loaded but the KV memory."""
    simulated_step_s: float = 0.005
    simulated_start_s: float = 0.0
    simulated_prefill_token_s: float = 0.0
    """Added to a step per uncached prompt token in it."""
    vllm_args: dict[str, Any] = {}
    """Of kind vllm: arguments of its engine, by vLLM's names. What is above does not concern it."""
    kv_descriptor: int = -1
    """Inherited: memory for keys and values that outlives this engine, a file that may have content from the
    one before it; negative: it has memory of its own."""
    lora: dict[str, str] = {}
    """Of kind vllm: adapters by their public names, and the directory of each."""


class Submit(Message, frozen=True):
    request: GenerationRequest


class Abort(Message, frozen=True):
    request_id: str


class Drain(Message, frozen=True):
    """Finish what runs, then exit."""


class Sleep(Message, frozen=True):
    """Give memory back: 1: KV, 2: KV and weights. Refused (the load says level 0) while requests are open."""

    level: Literal[1, 2] = 1


class Wake(Message, frozen=True):
    """Take the memory again. The next StepBatch's load says sleep_level 0."""


EngineCommand = Submit | Abort | Drain | Sleep | Wake


class EngineStarting(Message, frozen=True):
    """Sent at the beginning of each start phase."""

    phase: str
    elapsed_s: float


class EngineReady(Message, frozen=True):
    """The engine takes requests."""

    kind: str
    architecture: str
    vocab_size: int
    max_context_tokens: int
    block_size: int
    num_total_blocks: int
    max_running: int
    path: str
    """Which arithmetic runs: `bfloat16 mkldnn, 2 threads`."""
    phases: dict[str, float]
    """Seconds per start phase."""
    version: int = PROTOCOL_VERSION
    sleep_level: int = 0
    """As in EngineLoad: an engine may start asleep."""


class StepBatch(Message, frozen=True):
    """All outputs of one step, and the load after it. Also sent once a second while idle, without outputs."""

    outputs: list[StepOutput]
    load: EngineLoad
    evicted: list[bytes] = []
    """Hashes of the KV blocks whose content was forgotten since the last batch."""


class EngineFailed(Message, frozen=True):
    """The engine cannot start, or must stop. `retryable` is false for a wrong model or setting."""

    error: str
    retryable: bool = True


EngineEvent = EngineStarting | EngineReady | StepBatch | EngineFailed
"""On a peer socket only StepBatch and EngineFailed: the host's engine is lost, and its guests with it."""
PeerCommand = Submit | Abort
"""What a front may ask of a sibling's engine."""
PeerEvent = StepBatch | EngineFailed
