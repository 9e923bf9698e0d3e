"""From the config to what processes are started with: replica, engine and gateway specs, and their hash.

Must not know: which processes run, or what the processes do with their specs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import msgspec

from headrace.api.config import Config, Tenant
from headrace.api.endpoint_config import Endpoint
from headrace.api.messages import (
    EndpointRule,
    EngineSpec,
    GatewaySpec,
    ProcessSpec,
    ReplicaSpec,
    TenantRule,
    gateway_group,
)
from headrace.api.notation import split_bind
from headrace.api.run_paths import (
    CONTROLLER_SOCKET,
    HEARTBEAT_FILE,
    HOST_PLACEHOLDER,
    IDENTITY_FILE,
    IDENTITY_PLACEHOLDER,
    LOG_DIRECTORY,
    NODE_PLACEHOLDER,
    PYTHON_PLACEHOLDER,
    RUN_DIR_PLACEHOLDER,
    rank_socket_path,
    router_socket_path,
)
from headrace.control.places import gateway_place, place_of
from headrace.units import MIB

ADMIN_SOCKET = "admin.sock"
CONFIG_FILE = "config.json"
ROLLOUTS_FILE = "rollouts.json"
ENDING_FILE = "ending"
"""There is one once the system was told to end."""
MAX_DURABLE_OPEN = 4000
"""Requests of one durable front: its server takes a few connections more."""
MAX_OPEN = 65_536
"""Requests of one replica, by whichever gateways: as many as an engine takes."""
PRIORITIES = ("high", "normal", "low")
"""Bands, from the one that is served first."""
LEASE_S = 3.0
"""How long a replica counts as present after its last load report."""


def python_process(name: str, module: str, argument: str, run_directory: Path) -> ProcessSpec:
    """Return the spec of `python -m module argument`. -P: the working directory must not shadow modules."""
    argv = [sys.executable, "-P", "-m", module, argument]
    return ProcessSpec(name, argv, log_path=str(run_directory / LOG_DIRECTORY / f"{name}.log"))


def controller_process(run_directory: Path) -> ProcessSpec:
    return python_process("controller", "headrace.control", str(run_directory), run_directory)


def cluster_controller_process(config: Config, system: str) -> ProcessSpec:
    """Return the spec of the controller of `system` for a host of a cluster, with its first config."""
    spec = controller_process(Path(RUN_DIR_PLACEHOLDER))
    argv = [PYTHON_PLACEHOLDER, *spec.argv[1:], system]
    files = {CONFIG_FILE: config.model_dump_json(), HEARTBEAT_FILE: ""}
    return msgspec.structs.replace(
        spec, argv=argv, files=files, is_restarted=True, heartbeat_file=HEARTBEAT_FILE
    )


def cluster_replica_process(
    config: Config, endpoint: str, replica_id: str, run_directory: Path, is_standby: bool = False
) -> ProcessSpec:
    """Like `replica_process`, for whichever host of a cluster gets it."""
    spec = replica_process(config, endpoint, replica_id, Path(RUN_DIR_PLACEHOLDER), is_standby)
    front = msgspec.json.decode(spec.argv[-1], type=ReplicaSpec)
    host, identity = HOST_PLACEHOLDER, IDENTITY_PLACEHOLDER
    if config.gateway.placement is not None:  # any host may have a gateway that is not this one's
        host, identity = NODE_PLACEHOLDER, f"{RUN_DIR_PLACEHOLDER}/{IDENTITY_FILE}"
    front = msgspec.structs.replace(front, host=host, identity=identity, node_address=NODE_PLACEHOLDER)
    can_span = config.endpoints[endpoint].nodes.rank_strategy == "pack"
    ranks = _rank_processes(replica_id, front.engine, [NODE_PLACEHOLDER] if can_span else [])
    if ranks:
        socket_path = rank_socket_path(RUN_DIR_PLACEHOLDER, replica_id)
        address = NODE_PLACEHOLDER if can_span else ""
        engine = msgspec.structs.replace(front.engine, rank_socket=socket_path, rank_address=address)
        front = msgspec.structs.replace(front, engine=engine)
    argv = [PYTHON_PLACEHOLDER, *spec.argv[1:-1], msgspec.json.encode(front).decode()]
    place = place_of(config.endpoints[endpoint])
    return msgspec.structs.replace(spec, argv=argv, place=place, companions=ranks)


def _rank_processes(replica_id: str, engine: EngineSpec, address: list[str]) -> list[ProcessSpec]:
    """Return what holds ranks 1 and up of a replica on a cluster, in the order of the ranks. address: of
    their nodes, if these may be several."""
    processes = []
    for rank in range(1, engine.tensor_parallel if engine.kind == "native" else 1):
        name = f"{replica_id}-rank-{rank}"
        path = rank_socket_path(RUN_DIR_PLACEHOLDER, replica_id)
        spec = python_process(name, "headrace.engine.workers.holder", path, Path(RUN_DIR_PLACEHOLDER))
        argv = [PYTHON_PLACEHOLDER, *spec.argv[1:], str(rank), *address]
        processes.append(msgspec.structs.replace(spec, argv=argv, is_restarted=True))
    return processes


def placed_durable_process(
    config: Config, endpoint: str, front_id: str, gateway_id: str, run_directory: Path
) -> ProcessSpec:
    """Like `durable_process`, for the host of a gateway that has a place of its own."""
    where = Path(RUN_DIR_PLACEHOLDER), NODE_PLACEHOLDER
    spec = durable_process(config, endpoint, front_id, gateway_id, *where)
    place, group = gateway_place(config), gateway_group(gateway_id)
    return msgspec.structs.replace(spec, argv=[PYTHON_PLACEHOLDER, *spec.argv[1:]], place=place, group=group)


def replica_process(
    config: Config, endpoint: str, replica_id: str, run_directory: Path, is_standby: bool = False
) -> ProcessSpec:
    """Return what one replica's front is started with. is_standby: its engine sleeps once it is ready."""
    spec = _replica_spec(config, endpoint, replica_id, run_directory)
    if spec.engine.num_threads == 0:
        threads = threads_per_engine(config)
        if config.launcher == "ray":  # the cores that it is given, wherever it is
            cpus = place_of(config.endpoints[endpoint]).choices[0].resources["CPU"]
            threads = max(1, int(cpus))
        engine = msgspec.structs.replace(spec.engine, num_threads=threads)
        spec = msgspec.structs.replace(spec, engine=engine)
    spec = msgspec.structs.replace(spec, engine=msgspec.structs.replace(spec.engine, is_standby=is_standby))
    return python_process(replica_id, "headrace.replica", msgspec.json.encode(spec).decode(), run_directory)


def durable_process(
    config: Config, endpoint: str, front_id: str, gateway_id: str, run_directory: Path, node_address: str = ""
) -> ProcessSpec:
    """Return what one durable front of a gateway is started with. node_address: as in LoadReport."""
    spec = _durable_spec(config, endpoint, run_directory)
    spec = msgspec.structs.replace(
        spec,
        replica_id=front_id,
        gateway_id=gateway_id,
        node_address=node_address,
        generation=durable_generation_of(config, endpoint),
        report_sockets=[
            router_socket_path(str(run_directory), gateway_id),
            str(run_directory / CONTROLLER_SOCKET),
        ],
    )
    return python_process(front_id, "headrace.replica", msgspec.json.encode(spec).decode(), run_directory)


def durable_generation_of(config: Config, endpoint: str) -> str:
    """Hash of everything that a durable front of `endpoint` is started with and that the user decides."""
    return sha256(msgspec.json.encode(_durable_spec(config, endpoint, Path()))).hexdigest()[:12]


def generation_of(config: Config, endpoint: str) -> str:
    """Hash of everything that a replica of `endpoint` is started with and that the user decides."""
    spec = msgspec.structs.replace(_replica_spec(config, endpoint, "", Path()), generation="")
    place = [place_of(config.endpoints[endpoint])] if config.launcher == "ray" else []
    return sha256(b"".join(map(msgspec.json.encode, [spec, *place]))).hexdigest()[:12]


def stream_class_of(endpoint: Endpoint) -> str:
    """Hash of what decides the tokens of an answer: the model and its arithmetic. Speculation, memory and
    batch sizes do not."""
    native = endpoint.native
    parts = [endpoint.engine, endpoint.model]
    if endpoint.engine == "native":
        parts += [native.dtype, native.kv_dtype, str(native.block_size)]
    if endpoint.engine == "vllm":
        parts.append(msgspec.json.encode(endpoint.vllm.args, order="sorted").decode())
        parts += [f"{name} {path}" for name, path in sorted(endpoint.vllm.lora.items())]
    return sha256(msgspec.json.encode(parts)).hexdigest()[:12]


def threads_per_engine(config: Config) -> int:
    """This machine's usable cores shared by the native replicas that are wanted."""
    num_engines = sum(
        max(endpoint.replicas.min, 1) for endpoint in config.endpoints.values() if endpoint.engine == "native"
    )
    return max(1, len(os.sched_getaffinity(0)) // max(num_engines, 1))


def gateway_ids(config: Config) -> list[str]:
    """Return the ids of the gateways: g1, g2, ..."""
    return [f"g{number}" for number in range(1, config.gateway.count + 1)]


def gateway_specs(
    config: Config,
    run_directory: Path,
    keys: Mapping[str, str] | None = None,
    admin_key_hash: str = "",
    traffic: Mapping[str, dict[str, float]] | None = None,
) -> dict[str, GatewaySpec]:
    """Return what each gateway is started with, by its id. They differ in the id and in the metrics port.

    keys: SHA-256 of each valid key -> its tenant. admin_key_hash: SHA-256 of the admin API's key.
    traffic: by endpoint, the generations' parts of the requests.
    """
    if config.gateway.placement is not None:
        run_directory = Path(RUN_DIR_PLACEHOLDER)
    spec = gateway_spec(config, run_directory, keys)
    rules = [
        msgspec.structs.replace(rule, traffic=dict((traffic or {}).get(rule.name, {})))
        for rule in spec.endpoints
    ]
    spec = msgspec.structs.replace(spec, endpoints=rules)
    spec = msgspec.structs.replace(spec, admin_bind=config.gateway.admin_bind, admin_key_hash=admin_key_hash)
    return {
        gateway_id: msgspec.structs.replace(
            spec, gateway_id=gateway_id, metrics_bind=metrics_address(spec.metrics_bind, index)
        )
        for index, gateway_id in enumerate(gateway_ids(config))
    }


def metrics_address(bind: str, index: int) -> str:
    """Return where the gateway number `index` (from 0) offers its metrics: each has its own port, because a
    scraper must get every gateway's numbers, not those of one that the kernel picks."""
    return f"{bind.rpartition(':')[0]}:{split_bind(bind)[1] + index}" if bind else ""


def gateway_spec(config: Config, run_directory: Path, keys: Mapping[str, str] | None = None) -> GatewaySpec:
    """Return what the first gateway is started with, and told again when the config or the keys change.

    keys: SHA-256 of each valid key -> its tenant.
    """
    gateway = config.gateway
    return GatewaySpec(
        run_dir=str(run_directory),
        bind=gateway.bind,
        endpoints=[
            EndpointRule(
                name,
                endpoint.model,
                endpoint.queue.max_requests,
                endpoint.queue.max_wait_s,
                endpoint.placement,
                ttft_s=endpoint.slo.ttft_ms / 1000,
                itl_s=endpoint.slo.itl_ms / 1000,
                tell_after_s=endpoint.queue.tell_after_s,
                is_durable=endpoint.streams.durable,
                adapters=list(endpoint.vllm.lora),
            )
            for name, endpoint in config.endpoints.items()
        ],
        metrics_bind=gateway.metrics_bind,
        max_connections=gateway.max_connections,
        max_body_bytes=gateway.max_body_mb * MIB,
        request_timeout_s=gateway.request_timeout_s,
        num_threads=gateway.num_threads,
        tenants=[_tenant_rule(name, tenant) for name, tenant in config.tenants.items()],
        keys=dict(keys or {}),
        certificate=gateway.tls.certificate if gateway.tls else "",
        certificate_key=gateway.tls.key if gateway.tls else "",
        max_connections_per_address=gateway.max_connections_per_address,
        replica_protocol=gateway.replica_protocol,
        identity=str(run_directory / IDENTITY_FILE) if config.launcher == "ray" else "",
        node=NODE_PLACEHOLDER if gateway.placement is not None else "",
    )


def _tenant_rule(name: str, tenant: Tenant) -> TenantRule:
    limits = tenant.limits
    return TenantRule(
        name=name,
        weight=tenant.weight,
        priority=PRIORITIES.index(tenant.priority),
        endpoints=tenant.endpoints,
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        max_concurrent=limits.max_concurrent,
        max_queued=limits.max_queued,
        max_wait_s=limits.max_wait_s,
    )


def _replica_spec(config: Config, name: str, replica_id: str, run_directory: Path) -> ReplicaSpec:
    endpoint = config.endpoints[name]
    return ReplicaSpec(
        replica_id=replica_id,
        endpoint=name,
        engine=_engine_spec(endpoint, config.state_dir),
        run_dir=str(run_directory),
        report_sockets=[
            *(router_socket_path(str(run_directory), gateway_id) for gateway_id in gateway_ids(config)),
            str(run_directory / CONTROLLER_SOCKET),
        ],
        max_open=endpoint.max_open,
        max_surplus=min((len(gateway_ids(config)) - 1) * endpoint.max_open, MAX_OPEN - endpoint.max_open),
        max_body_bytes=config.gateway.max_body_mb * MIB,
        drain_grace_s=endpoint.drain_grace_s,
        lease_s=LEASE_S,
        generation=generation_of(config, name) if replica_id else "",
        needs_gateway=bool(config.tenants),
        shared_prefix=endpoint.shared_prefix,
        stream_class=stream_class_of(endpoint),
        handover_after_s=endpoint.streams.handover_after_s,
        resume_attempts=endpoint.streams.resume_attempts,
        resume_limit_s=endpoint.streams.resume_limit_s,
        notice_file=config.notice_file,
        notice_url=config.notice_url,
        notice_headers=config.notice_headers,
    )


def _durable_spec(config: Config, name: str, run_directory: Path) -> ReplicaSpec:
    """What all durable fronts of an endpoint have in common. Of the engine they know what turns text into
    tokens: other settings of it do not concern them."""
    endpoint = config.endpoints[name]
    num_open = endpoint.max_open * max(1, endpoint.replicas.max)
    return msgspec.structs.replace(
        _replica_spec(config, name, "", run_directory),
        engine=EngineSpec(endpoint.engine, endpoint.model, lora=endpoint.vllm.lora),
        report_sockets=[],
        max_open=min(num_open, MAX_DURABLE_OPEN),
        max_surplus=0,  # it has one gateway
        stream_class="",
    )


def _engine_spec(endpoint: Endpoint, state_dir: str) -> EngineSpec:
    native, simulated = endpoint.native, endpoint.simulated
    return EngineSpec(
        kind=endpoint.engine,
        model=endpoint.model,
        max_running=native.max_running,
        token_budget=native.token_budget,
        block_size=native.block_size,
        kv_cache_bytes=native.kv_cache_mb * MIB,
        max_context_tokens=native.max_context_tokens,
        num_threads=native.num_threads,
        tensor_parallel=native.tensor_parallel,
        dtype=native.dtype,
        kv_dtype=native.kv_dtype,
        speculation=native.speculation.method,
        max_draft_tokens=native.speculation.max_draft_tokens,
        draft_model=native.speculation.draft_model,
        packed_dir=_packed_dir(native.packed_dir, state_dir),
        simulated_step_s=simulated.step_ms / 1000,
        simulated_start_s=simulated.start_s,
        simulated_prefill_token_s=simulated.prefill_ms_per_token / 1000,
        vllm_args=endpoint.vllm.args if endpoint.engine == "vllm" else {},
        lora=endpoint.vllm.lora,
    )


def _packed_dir(setting: str, state_dir: str) -> str:
    """Where packed weights are kept; empty: nowhere."""
    if setting == "auto":
        return str(Path(state_dir) / "packed") if state_dir else ""
    return "" if setting == "off" else str(Path(setting).expanduser().absolute())
