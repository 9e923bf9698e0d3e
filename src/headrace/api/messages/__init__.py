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

from headrace.api.messages.admin import (
    AdminCommand,
    AdminReply,
    ApplyConfig,
    CreateKey,
    EndpointStatus,
    GetStatus,
    KeyInfo,
    ListKeys,
    ProcessStatus,
    ReplicaStatus,
    RevokeKey,
    ScaleEndpoint,
    Shutdown,
    SystemStatus,
    TenantStatus,
)
from headrace.api.messages.base import (
    PROTOCOL_VERSION,
    Message,
    Record,
    TerminalState,
)
from headrace.api.messages.engine import (
    Abort,
    Drain,
    EngineCommand,
    EngineEvent,
    EngineFailed,
    EngineLoad,
    EngineReady,
    EngineSpec,
    EngineStarting,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StepBatch,
    StepOutput,
    Submit,
    TokenLogprobs,
)
from headrace.api.messages.gateway import (
    Demand,
    EndpointDemand,
    EndpointRule,
    GatewaySpec,
    RelaySpec,
    ReplicaView,
    TenantDemand,
    TenantRule,
)
from headrace.api.messages.launcher import (
    LauncherCommand,
    LauncherError,
    LauncherEvent,
    ListProcesses,
    ProcessEnded,
    Processes,
    ProcessSpec,
    ProcessStarted,
    ProcessState,
    StartProcess,
    StopProcess,
)
from headrace.api.messages.replica import (
    FinishedRequest,
    LoadReport,
    ReplicaSpec,
    ReplicaState,
    ReportAck,
    gateway_of,
)

__all__ = [
    "PROTOCOL_VERSION",
    "Abort",
    "AdminCommand",
    "AdminReply",
    "ApplyConfig",
    "CreateKey",
    "Demand",
    "Drain",
    "EndpointDemand",
    "EndpointRule",
    "EndpointStatus",
    "EngineCommand",
    "EngineEvent",
    "EngineFailed",
    "EngineLoad",
    "EngineReady",
    "EngineSpec",
    "EngineStarting",
    "FinishReason",
    "FinishedRequest",
    "GatewaySpec",
    "GenerationRequest",
    "GetStatus",
    "KeyInfo",
    "LauncherCommand",
    "LauncherError",
    "LauncherEvent",
    "ListKeys",
    "ListProcesses",
    "LoadReport",
    "Message",
    "ProcessEnded",
    "ProcessSpec",
    "ProcessStarted",
    "RelaySpec",
    "ProcessState",
    "ProcessStatus",
    "Processes",
    "Record",
    "ReplicaSpec",
    "ReplicaState",
    "ReplicaStatus",
    "ReplicaView",
    "ReportAck",
    "RevokeKey",
    "SamplingParams",
    "ScaleEndpoint",
    "Shutdown",
    "StartProcess",
    "StepBatch",
    "StepOutput",
    "StopProcess",
    "Submit",
    "SystemStatus",
    "TenantDemand",
    "TenantRule",
    "TenantStatus",
    "TerminalState",
    "TokenLogprobs",
    "gateway_of",
]
