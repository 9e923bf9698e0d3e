"""The system's state for people and programs: `headrace status` and `System.status()`.

Pure but for /proc, which it asks for resident memory. Must not know: who reads it.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

import headrace
from headrace.api.config import Gateway, is_loopback
from headrace.api.messages import (
    EndpointStatus,
    GatewayStatus,
    NodeStatus,
    ProcessStatus,
    ReplicaStatus,
    SystemStatus,
)
from headrace.api.notation import split_bind
from headrace.api.run_paths import NODE_HOST
from headrace.control.durable import is_durable_front
from headrace.control.fleet import Slot
from headrace.control.gateway_state import GatewayPair
from headrace.control.reconciler import DesiredEndpoint
from headrace.control.system_state import SystemState
from headrace.control.tenants import tenant_statuses


def describe(state: SystemState, run_directory: Path, now_s: float) -> SystemStatus:
    """Return a snapshot."""
    state.fleet.observe(now_s)
    state.durable.fleet.observe(now_s)
    desired = state.desired(now_s)
    counts = {endpoint.name: endpoint.count for endpoint in desired}
    etas = {outlook.endpoint: outlook.eta_s for outlook in state.outlooks(now_s)}
    slots = sorted(state.fleet.slots.values(), key=_slot_order)
    fronts = sorted(state.durable.fleet.slots.values(), key=_slot_order)
    in_flight = Counter[str]()
    for demand in state.gateway.demands():
        in_flight.update({view.replica_id: view.num_in_flight for view in demand.replicas})
    return SystemStatus(
        version=headrace.__version__,
        url=_url(state),
        uptime_s=now_s - state.started_s,
        is_ready=state.is_ready(now_s),
        endpoints=[_endpoint(state, endpoint, etas[endpoint.name]) for endpoint in desired],
        replicas=[_replica(slot, in_flight.get(slot.replica_id, 0), now_s) for slot in slots],
        processes=_processes(state),
        run_dir=str(run_directory),
        gateways=[_gateway(state, pair, now_s) for pair in state.gateway.pairs.values()],
        tenants=tenant_statuses(state.gateway.demands(), state.config.tenants),
        warnings=_warnings(state, now_s),
        rollouts=state.rollouts.statuses(slots, counts, now_s),
        nodes=_nodes(state, slots, now_s),
        durable_fronts=[
            _durable_front(state, slot, in_flight.get(slot.replica_id, 0), now_s) for slot in fronts
        ],
    )


def gateway_url(gateway: Gateway, node_address: str = "") -> str:
    """Return the address that a client uses for the gateway: on this machine, or anywhere if it is on a node
    of its own with `node_address` and does not listen on that node's loopback alone."""
    host, _, port = gateway.bind.rpartition(":")
    here = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104, compared only
    if node_address and host in (NODE_HOST, *here):
        host = f"[{node_address}]" if ":" in node_address else node_address
    host = here.get(host, host)
    return f"{'https' if gateway.tls else 'http'}://{host}:{port}/v1"


def _url(state: SystemState) -> str:
    pairs = sorted(state.gateway.pairs.values(), key=lambda pair: not pair.has_answered)  # stable
    urls = [url for pair in pairs if (url := _url_of(state, pair))]
    return urls[0] if urls else gateway_url(state.config.gateway)


def _url_of(state: SystemState, pair: GatewayPair) -> str:
    """Where clients reach a gateway; empty: it has no node yet."""
    if state.config.gateway.placement is None:
        return gateway_url(state.config.gateway)
    address = _node_address(state, pair.node)
    return gateway_url(state.config.gateway, address) if address and not pair.is_placeless else ""


def _node_address(state: SystemState, node_id: str) -> str:
    return next((node.address for node in state.nodes.nodes if node.node_id == node_id), "")


def _slot_order(slot: Slot) -> tuple[str, int]:
    number = slot.replica_id.rpartition("-")[2]
    return slot.endpoint, int(number) if number.isdigit() else 0


def _endpoint(state: SystemState, desired: DesiredEndpoint, eta_s: float) -> EndpointStatus:
    section = state.rollouts.section(desired.name)
    demand = state.gateway.demand_of(desired.name)
    phases = [slot.phase for slot in state.fleet.slots.values() if slot.endpoint == desired.name]
    return EndpointStatus(
        name=desired.name,
        model=section.model,
        engine=section.engine,
        desired=desired.count,
        ready=phases.count("ready"),
        starting=phases.count("starting") + phases.count("pending"),
        failed=phases.count("failed") + phases.count("lost"),
        num_held=demand.num_held,
        oldest_held_s=demand.oldest_held_s,
        num_in_flight=demand.num_in_flight,
        finished=demand.finished,
        aborted=demand.aborted,
        refused=demand.refused,
        failed_requests=demand.failed,
        reason=desired.reason,
        arrived=demand.arrived,
        standby=phases.count("standby"),
        desired_standby=desired.num_standby,
        eta_s=eta_s,
    )


def _warnings(state: SystemState, now_s: float) -> list[str]:
    warnings = sorted({d.certificate_problem for d in state.gateway.demands() if d.certificate_problem})
    warnings += [
        text for pair in state.gateway.pairs.values() if (text := _gateway_warning(state, pair, now_s))
    ]
    for name in state.config.endpoints:
        hold_off = state.hold_off(name, now_s)
        if hold_off is not None:
            warnings.append(
                f"{name}: {hold_off.reason}; nothing is started for {math.ceil(hold_off.left_s)} s more"
            )
    own = state.nodes.own_node_id
    if own in state.fleet.drains:
        warnings.append(
            f"node {own[:8]} is {state.fleet.drains.describe(own, now_s)}: the controller and what is beside "
            "it are on it, and end with it"
        )
    return warnings


def _gateway_warning(state: SystemState, pair: GatewayPair, now_s: float) -> str:
    """What somebody should know of a gateway's place; empty: nothing."""
    if pair.leaving:
        return f"gateway {pair.gateway_id} takes no more connections: {pair.leaving}"
    if pair.waiting_for:
        return f"gateway {pair.gateway_id}: {pair.waiting_for}"
    if state.config.gateway.placement is None or not any(each.pid for each in pair.processes):
        return ""
    bind, where = state.config.gateway.bind, f"{pair.node[:8]} ({_node_address(state, pair.node)})"
    if pair.is_elsewhere and not pair.is_reached(now_s):
        return (
            f"gateway {pair.gateway_id}: nothing is heard of it on node {where}; it serves with what it "
            "knows. Nodes must reach each other on the ports that their kernels give out"
        )
    if is_loopback(bind):
        return (
            f"gateway {pair.gateway_id} listens on {bind} of node {where}, and only programs there reach it. "
            f"For others set gateway.bind to {NODE_HOST}:{split_bind(bind)[1]}"
        )
    return ""


def _gateway(state: SystemState, pair: GatewayPair, now_s: float) -> GatewayStatus:
    demand = pair.fresh_demand(now_s)
    views = demand.replicas if demand is not None else []
    endpoints = demand.endpoints if demand is not None else []
    router = pair.router.state if demand is not None or not pair.router.is_alive else "silent"
    return GatewayStatus(
        gateway_id=pair.gateway_id,
        router="waiting" if pair.is_placeless else router,
        haproxy="waiting" if pair.is_placeless else pair.haproxy.state,
        is_answering=pair.has_answered,
        num_held=sum(endpoint.num_held for endpoint in endpoints),
        oldest_held_s=max((endpoint.oldest_held_s for endpoint in endpoints), default=0.0),
        num_in_flight=sum(endpoint.num_in_flight for endpoint in endpoints),
        num_serving=sum(view.is_serving and not is_durable_front(view.replica_id) for view in views),
        url=_url_of(state, pair),
        node="" if pair.is_placeless else pair.node,
        waiting_for=pair.waiting_for,
    )


def _replica(slot: Slot, num_in_flight: int, now_s: float) -> ReplicaStatus:
    report = slot.report
    load = report.engine if report is not None else None
    info = report.engine_info if report is not None else None
    total_blocks = load.num_total_blocks if load is not None else 0
    return ReplicaStatus(
        replica_id=slot.replica_id,
        endpoint=slot.endpoint,
        state=slot.phase,
        phase=slot.waiting_for or (report.phase if report is not None else ""),
        address=report.address if report is not None else "",
        pid=slot.pid,
        engine_pid=report.engine_pid if report is not None else 0,
        num_open=report.num_open if report is not None else 0,
        num_running=load.num_running if load is not None else 0,
        num_waiting=load.num_waiting if load is not None else 0,
        kv_used_ratio=1 - load.num_free_blocks / total_blocks if load is not None and total_blocks else 0.0,
        restarts=slot.num_starts - 1,
        engine_restarts=report.engine_restarts if report is not None else 0,
        since_s=now_s - slot.phase_since_s,
        last_error=slot.last_error,
        start_phases=info.phases if info is not None else {},
        cached_ratio=_ratio(load.prefix_hit_tokens, load.prefix_query_tokens) if load is not None else 0.0,
        num_in_flight=num_in_flight,
        step_model=load.step_model if load is not None else None,
        busy_ratio=_ratio(load.busy_ns, load.busy_ns + load.idle_ns) if load is not None else 0.0,
        arithmetic=info.path if info is not None else "",
        generation=slot.generation,
        num_guests=report.num_guests if report is not None else 0,
        num_hosted=report.num_hosted if report is not None else 0,
        node=slot.node,
    )


def _durable_front(state: SystemState, slot: Slot, num_in_flight: int, now_s: float) -> ReplicaStatus:
    endpoint = state.durable.endpoint_of(slot)
    return msgspec.structs.replace(_replica(slot, num_in_flight, now_s), endpoint=endpoint)


def _nodes(state: SystemState, slots: Sequence[Slot], now_s: float) -> list[NodeStatus]:
    """Nodes that are there, and those that are gone but had replicas that are still spoken of."""
    by_node: dict[str, list[str]] = {}
    gateways: dict[str, list[str]] = {}
    for pair in state.gateway.pairs.values():
        if pair.node and not pair.is_placeless:
            gateways.setdefault(pair.node, []).append(pair.gateway_id)
    for slot in slots:
        if slot.node:
            by_node.setdefault(slot.node, []).append(slot.replica_id)
    return [
        NodeStatus(
            node.node_id,
            node.address,
            node.is_alive,
            node.total,
            node.available,
            node.labels,
            by_node.get(node.node_id, []),
            gateways.get(node.node_id, []),
            _why_leaving(state, node.node_id, now_s),
        )
        for node in state.nodes.nodes
        if node.is_alive or node.node_id in by_node
    ]


def _why_leaving(state: SystemState, node_id: str, now_s: float) -> str:
    drain = state.fleet.drains.describe(node_id, now_s)
    if drain:
        return drain
    left_s = state.fleet.notices.avoided(now_s).get(node_id, 0.0)
    return f"goes away by a notice; avoided for {left_s:.0f} s more" if left_s else ""


def _ratio(part: int, whole: int) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0


def _processes(state: SystemState) -> list[ProcessStatus]:
    processes = [
        ProcessStatus(
            "keeper" if state.nodes.nodes else "up", os.getppid(), "running", 0, resident_bytes(os.getppid())
        ),
        ProcessStatus("controller", os.getpid(), "running", 0, resident_bytes(os.getpid())),
    ]
    for pair in state.gateway.pairs.values():
        for essential in pair.processes:
            restarts = max(essential.num_starts - 1, 0)
            memory = 0 if pair.is_elsewhere else resident_bytes(essential.pid)
            name, pid, error = essential.name, essential.pid, essential.last_error
            state_word = "waiting" if pair.is_placeless and essential.is_alive else essential.state
            processes.append(ProcessStatus(name, pid, state_word, restarts, memory, error))
    for slot in sorted(state.slots, key=_slot_order):
        restarts = slot.num_starts - 1
        is_here = slot.node in ("", state.nodes.own_node_id)
        memory = resident_bytes(slot.pid) if is_here else 0
        processes.append(ProcessStatus(f"front {slot.replica_id}", slot.pid, slot.phase, restarts, memory))
        if slot.report is not None and slot.report.engine_pid:
            pid = slot.report.engine_pid
            name = f"engine {slot.replica_id}"
            memory = resident_bytes(pid) if is_here else 0
            processes.append(ProcessStatus(name, pid, slot.phase, slot.report.engine_restarts, memory))
    return processes


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory; 0 if it is gone. Source: proc(5), /proc/PID/statm, in pages."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split() if pid else []
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0
