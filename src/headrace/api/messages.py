"""The messages between headrace's processes, as msgpack structs. One union per channel and direction.

    front  -> engine      EngineCommand       submit, abort, drain
    engine -> front       EngineEvent         starting, ready, one StepBatch per step, failed
    front  -> router and controller           LoadReport (`ReportAck` comes back)
    router -> controller  Demand              (`GatewaySpec` comes back when the config changes)
    controller -> supervisor  LauncherCommand (`LauncherEvent` comes back)
    CLI    -> controller  AdminCommand        (`AdminReply` comes back)

Every channel is a UNIX stream socket with mode 0600, framed by `headrace.api.framing`.
Must not know: who sends what when. Token ids are plain ints; seconds are floats.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

PROTOCOL_VERSION = 1


class TerminalState(StrEnum):
    """How a request ended. Every accepted request ends in exactly one of these."""

    FINISHED = "finished"
    """The whole answer was sent."""
    ABORTED = "aborted"
    """The client left."""
    REFUSED = "refused"
    """Admission or validation said no."""
    FAILED = "failed"
    """It was accepted, and something of ours broke."""


class Message(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """Base of messages that travel in a union; the tag is the class name."""


class Record(msgspec.Struct, frozen=True, array_like=True):
    """Base of parts that are inside a message. Positional on the wire: append fields, never reorder them."""


# ---- front <-> engine ----------------


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
    grammar: str = ""
    """LoRA name and grammar: reserved; engines that do not support them refuse the request."""


class TokenLogprobs(Record, frozen=True):
    """Natural-log probabilities at one position, from the logits after penalties and before temperature."""

    logprob: float
    top: list[tuple[int, float]] = []
    """(token id, logprob), most likely first."""


FinishReason = Literal["stop", "length", "aborted", "error"]


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


class EngineSpec(msgspec.Struct, frozen=True):
    """What to start an engine process with. Zeros mean: the engine measures or decides."""

    kind: Literal["native", "simulated"]
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
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    simulated_step_s: float = 0.005
    simulated_start_s: float = 0.0


class Submit(Message, frozen=True):
    request: GenerationRequest


class Abort(Message, frozen=True):
    request_id: str


class Drain(Message, frozen=True):
    """Finish what runs, then exit."""


EngineCommand = Submit | Abort | Drain


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


class StepBatch(Message, frozen=True):
    """All outputs of one step, and the load after it. Also sent once a second while idle, without outputs."""

    outputs: list[StepOutput]
    load: EngineLoad


class EngineFailed(Message, frozen=True):
    """The engine cannot start, or must stop. `retryable` is false for a wrong model or setting."""

    error: str
    retryable: bool = True


EngineEvent = EngineStarting | EngineReady | StepBatch | EngineFailed


# ---- front -> router, controller ----------------

ReplicaState = Literal["starting", "ready", "draining", "failed"]


class FinishedRequest(Record, frozen=True):
    """One request's end, as its front measured it. Seconds count from the arrival at the front."""

    request_id: str
    state: TerminalState
    finish_reason: str
    tenant: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    ttft_s: float
    total_s: float


class LoadReport(Message, frozen=True):
    """A replica is known because it reports, and gone when its lease ends. Sent at least every 50 ms while
    busy, at once on a finish or a change of state, and every lease_s / 3 while idle."""

    replica_id: str
    endpoint: str
    model: str
    address: str
    """host:port of the front's HTTP server; empty until it listens."""
    pid: int
    sequence: int
    """Grows by one per report of one front process."""
    lease_s: float
    state: ReplicaState
    phase: str = ""
    """While starting: what it is doing."""
    num_open: int = 0
    max_open: int = 0
    engine: EngineLoad | None = None
    engine_info: EngineReady | None = None
    engine_pid: int = 0
    engine_restarts: int = 0
    last_error: str = ""
    is_retryable: bool = True
    """With state failed: false when starting again cannot help (a missing model, a wrong setting)."""
    finished: list[FinishedRequest] = []
    generation: str = ""
    """Hash of the spec it was started with: the controller replaces replicas whose spec changed."""
    socket_path: str = ""
    """UNIX socket on which the front serves gateways of its own machine; empty: only `address`."""


class ReportAck(Message, frozen=True):
    """Answers the reports of a draining replica; others may go unanswered.
    `is_released`: this router will send it no more requests."""

    sequence: int
    is_released: bool = False


class ReplicaSpec(msgspec.Struct, frozen=True):
    """What to start a replica with (`python -m headrace.replica JSON`)."""

    replica_id: str
    endpoint: str
    engine: EngineSpec
    run_dir: str
    report_sockets: list[str]
    """Paths of the UNIX sockets that want its load reports: routers and controllers."""
    host: str = "127.0.0.1"
    port: int = 0
    max_open: int = 64
    """Most requests open in the front: running and waiting in the engine."""
    max_body_bytes: int = 32 * 1024 * 1024
    drain_grace_s: float = 30.0
    lease_s: float = 3.0
    generation: str = ""


# ---- gateway ----------------


class EndpointRule(Record, frozen=True):
    """What the router must know of an endpoint."""

    name: str
    model: str
    max_queue: int
    max_wait_s: float


class GatewaySpec(Message, frozen=True):
    """What to start a router with (`python -m headrace.gateway JSON`); sent again when the config changes."""

    run_dir: str
    bind: str
    endpoints: list[EndpointRule]
    metrics_bind: str = ""
    max_connections: int = 0
    """0: as many as the file-descriptor limit allows."""
    max_body_bytes: int = 32 * 1024 * 1024
    request_timeout_s: float = 600.0
    num_threads: int = 1


class EndpointDemand(Record, frozen=True):
    """One endpoint as one router sees it. Totals count since the router's start."""

    endpoint: str
    num_held: int
    oldest_held_s: float
    num_in_flight: int
    arrived: int
    finished: int
    aborted: int
    refused: int
    failed: int


class ReplicaView(Record, frozen=True):
    """One replica as one router sees it."""

    replica_id: str
    num_in_flight: int
    is_serving: bool
    """It is a server in HAProxy and may be chosen."""


class Demand(Message, frozen=True):
    """Router -> controller, every 200 ms and at once when a request finds no replica."""

    router_id: str
    pid: int
    endpoints: list[EndpointDemand]
    replicas: list[ReplicaView]


# ---- controller -> supervisor ----------------


class ProcessSpec(Record, frozen=True):
    """One child process. It dies with its supervisor."""

    name: str
    """Unique among live processes: `router`, `haproxy`, `chat-1`."""
    argv: list[str]
    environment: dict[str, str] = {}
    log_path: str = ""
    """Where stdout and stderr go; empty: inherited."""
    stop_signal: int = 15


class ProcessState(Record, frozen=True):
    """A process that the supervisor holds, or one that ended."""

    name: str
    pid: int
    is_alive: bool
    exit_code: int | None = None
    """Negative: the signal that ended it."""
    last_output: str = ""
    """The last lines of its log, after its end."""


class StartProcess(Message, frozen=True):
    spec: ProcessSpec


class StopProcess(Message, frozen=True):
    """Send the stop signal; after grace_s kill the whole process group."""

    name: str
    grace_s: float


class ListProcesses(Message, frozen=True):
    pass


LauncherCommand = StartProcess | StopProcess | ListProcesses


class Processes(Message, frozen=True):
    """All live processes: the answer to ListProcesses."""

    processes: list[ProcessState]


class ProcessStarted(Message, frozen=True):
    process: ProcessState


class ProcessEnded(Message, frozen=True):
    process: ProcessState


class LauncherError(Message, frozen=True):
    name: str
    error: str


LauncherEvent = Processes | ProcessStarted | ProcessEnded | LauncherError


# ---- CLI -> controller ----------------


class GetStatus(Message, frozen=True):
    pass


class ScaleEndpoint(Message, frozen=True):
    endpoint: str
    replicas: int


class ApplyConfig(Message, frozen=True):
    """The whole new config, as JSON text of the resolved tree."""

    config_json: str


class Shutdown(Message, frozen=True):
    """Drain everything and end."""


AdminCommand = GetStatus | ScaleEndpoint | ApplyConfig | Shutdown


class ReplicaStatus(msgspec.Struct, frozen=True):
    replica_id: str
    endpoint: str
    state: Literal["pending", "starting", "ready", "draining", "failed", "lost"]
    phase: str
    address: str
    pid: int
    engine_pid: int
    num_open: int
    num_running: int
    num_waiting: int
    kv_used_ratio: float
    restarts: int
    engine_restarts: int
    since_s: float
    last_error: str
    start_phases: dict[str, float] = {}
    """Seconds per phase of the engine's last start (EngineReady.phases); empty until it was ready."""


class EndpointStatus(msgspec.Struct, frozen=True):
    name: str
    model: str
    engine: str
    desired: int
    ready: int
    starting: int
    failed: int
    num_held: int
    oldest_held_s: float
    num_in_flight: int
    finished: int
    aborted: int
    refused: int
    failed_requests: int
    reason: str
    """Why `desired` is what it is."""
    arrived: int = 0
    """Requests that the gateway accepted: arrived = held + in flight + the four terminal states."""


class ProcessStatus(msgspec.Struct, frozen=True):
    name: str
    pid: int
    state: str
    restarts: int
    resident_bytes: int
    last_error: str = ""


class SystemStatus(msgspec.Struct, frozen=True):
    version: str
    url: str
    """http://host:port/v1 of the gateway."""
    uptime_s: float
    is_ready: bool
    """The gateway answers and every endpoint has the replicas it wants."""
    endpoints: list[EndpointStatus]
    replicas: list[ReplicaStatus]
    processes: list[ProcessStatus]
    run_dir: str = ""


class AdminReply(Message, frozen=True):
    """`error` is empty when the command was carried out."""

    error: str = ""
    status: SystemStatus | None = None
    notes: list[str] = []
    """What was done, one line each."""
