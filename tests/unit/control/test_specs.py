"""From config to process specs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.api.config import Config, Gateway, Tenant, Tls
from headrace.api.config_loader import parse_config
from headrace.api.endpoint_config import Endpoint
from headrace.api.messages import ReplicaSpec, TenantRule
from headrace.api.run_paths import NODE_PLACEHOLDER, RUN_DIR_PLACEHOLDER, rank_socket_path
from headrace.control import specs
from headrace.control.specs import (
    cluster_replica_process,
    durable_process,
    gateway_spec,
    generation_of,
    replica_process,
    stream_class_of,
    threads_per_engine,
)
from headrace.control.status import gateway_url
from headrace.errors import ConfigError


def config(gateway: dict[str, Any] | None = None, **fields: Any) -> Config:
    return parse_config({"endpoints": {"chat": {"model": "m.gguf", **fields}}, "gateway": gateway or {}})


def test_a_replica_is_told_everything_that_the_config_says() -> None:
    native = {"token_budget": 256, "kv_cache_mb": 2, "num_threads": 3}
    process = replica_process(config(native=native, max_open=5), "chat", "chat-1", Path("/run/x"))
    spec = msgspec.json.decode(process.argv[-1], type=ReplicaSpec)
    assert process.name == "chat-1"
    assert process.log_path == "/run/x/logs/chat-1.log"
    assert process.argv[1:4] == ["-P", "-m", "headrace.replica"]
    assert (spec.engine.token_budget, spec.engine.kv_cache_bytes, spec.engine.num_threads) == (
        256,
        2 << 20,
        3,
    )
    assert (spec.max_open, spec.endpoint, spec.run_dir) == (5, "chat", "/run/x")
    assert spec.report_sockets == ["/run/x/g1/router.sock", "/run/x/controller.sock"]
    assert spec.generation == generation_of(config(native=native, max_open=5), "chat")


@pytest.mark.parametrize(
    "change",
    [{"model": "other.gguf"}, {"max_open": 1}, {"drain_grace_s": 1}, {"native": {"token_budget": 64}}],
)
def test_what_a_replica_is_started_with_changes_its_generation(change: dict[str, Any]) -> None:
    assert generation_of(config(**change), "chat") != generation_of(config(), "chat")


@pytest.mark.parametrize("change", [{"replicas": 3}, {"queue": {"max_wait_s": 1}}])
def test_counts_and_queue_do_not_change_the_generation(change: dict[str, Any]) -> None:
    assert generation_of(config(**change), "chat") == generation_of(config(), "chat")


def test_a_replica_is_told_what_becomes_of_its_streams() -> None:
    streams = {"resume_attempts": 2, "resume_limit_s": 9, "handover_after_s": 0.5}
    changed = config(streams=streams).model_copy(update={"notice_file": "/run/notice"})
    process = replica_process(changed, "chat", "chat-1", Path("/run/x"))
    spec = msgspec.json.decode(process.argv[-1], type=ReplicaSpec)
    assert (spec.resume_attempts, spec.resume_limit_s, spec.handover_after_s) == (2, 9.0, 0.5)
    assert (spec.notice_file, len(spec.stream_class)) == ("/run/notice", 12)


def test_cores_are_shared_by_the_native_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [threads_per_engine(config(replicas=count)) for count in (1, 2, 3, 9)] == [8, 4, 2, 1]
    tree = {"a": {"model": "m", "replicas": 2}, "b": {"model": "m", "engine": "simulated", "replicas": 5}}
    assert threads_per_engine(parse_config({"endpoints": tree})) == 4


def test_the_gateway_learns_endpoints_and_limits() -> None:
    spec = gateway_spec(
        config({"max_body_mb": 2}, queue={"max_requests": 7, "max_wait_s": 3}), Path("/run/x")
    )
    (rule,) = spec.endpoints
    assert (rule.name, rule.max_queue, rule.max_wait_s) == ("chat", 7, 3)
    assert spec.max_body_bytes == 2 << 20


def test_the_gateway_learns_tenants_limits_and_keys() -> None:
    limits = {"requests_per_minute": 5, "tokens_per_minute": 7, "max_concurrent": 3, "max_queued": 2}
    acme = {"weight": 2, "priority": "high", "endpoints": ["chat"], "limits": {**limits, "max_wait_s": 9}}
    tree = {"endpoints": {"chat": {"model": "m"}}, "tenants": {"acme": acme, "small": {}}}
    spec = gateway_spec(parse_config(tree), Path("/run/x"), {"ab": "acme"})
    assert spec.tenants == [TenantRule("acme", 2.0, 0, ["chat"], 5, 7, 3, 2, 9.0), TenantRule("small")]
    assert spec.keys == {"ab": "acme"}


def test_the_first_tenant_replaces_replicas_and_further_changes_of_tenants_do_not() -> None:
    def generation(**tenants: Any) -> str:
        return generation_of(config().model_copy(update={"tenants": tenants}), "chat")

    one = generation(acme=Tenant())
    assert one != generation()
    assert one == generation(
        acme=Tenant(weight=3, endpoints=["chat"]), small=Tenant(keys=["sha256:" + "0" * 64])
    )


def test_the_url_is_one_that_a_client_can_use() -> None:
    assert gateway_url(Gateway(bind="0.0.0.0:80")) == "http://127.0.0.1:80/v1"
    assert gateway_url(Gateway(bind="[::]:80")) == "http://[::1]:80/v1"
    tls = Tls(certificate="c.pem", key="k.pem")
    assert gateway_url(Gateway(bind="127.0.0.1:8000", tls=tls)) == "https://127.0.0.1:8000/v1"


@pytest.mark.parametrize(
    ("state_dir", "setting", "packed_dir"),
    [
        ("/state", "auto", "/state/packed"),
        ("/state", "off", ""),
        ("/state", "/fast/disk", "/fast/disk"),
        ("", "auto", ""),
    ],
)
def test_packed_weights_lie_in_the_state_directory_if_nothing_else_is_said(
    state_dir: str, setting: str, packed_dir: str
) -> None:
    tree = config(native={"packed_dir": setting}).model_copy(update={"state_dir": state_dir})
    process = replica_process(tree, "chat", "chat-1", Path("/run/x"))
    assert msgspec.json.decode(process.argv[-1], type=ReplicaSpec).engine.packed_dir == packed_dir


def test_adapters_reach_engines_gateways_and_durable_fronts_and_decide_the_class() -> None:
    def config(**lora: str) -> Config:
        tree = {"model": "m/m", "engine": "vllm", "vllm": {"lora": lora}}
        return parse_config({"endpoints": {"chat": tree}})

    poet, law = config(poet="/a"), config(poet="/b")
    process = replica_process(poet, "chat", "chat-1", Path("/run"))
    assert msgspec.json.decode(process.argv[-1], type=ReplicaSpec).engine.lora == {"poet": "/a"}
    assert gateway_spec(poet, Path("/run")).endpoints[0].adapters == ["poet"]
    front = durable_process(poet, "chat", "chat:g1-1", "g1", Path("/run"))
    assert msgspec.json.decode(front.argv[-1], type=ReplicaSpec).engine.lora == {"poet": "/a"}
    classes = {stream_class_of(c.endpoints["chat"]) for c in (config(), poet, law)}
    assert len(classes) == 3, "a stream goes on with the same weights only"
    assert generation_of(poet, "chat") != generation_of(law, "chat")


def test_vllms_arguments_reach_its_engines_and_decide_their_class() -> None:
    def specs(engine: str, **args: object) -> tuple[ReplicaSpec, Endpoint]:
        tree = {"model": "m/m", "engine": engine, "vllm": {"args": args}}
        config = parse_config({"endpoints": {"chat": tree}})
        process = replica_process(config, "chat", "chat-1", Path("/run"))
        return msgspec.json.decode(process.argv[-1], type=ReplicaSpec), config.endpoints["chat"]

    spec, endpoint = specs("vllm", max_model_len=512, dtype="bfloat16")
    assert (spec.engine.kind, spec.engine.vllm_args) == ("vllm", {"max_model_len": 512, "dtype": "bfloat16"})
    same, reordered = specs("vllm", dtype="bfloat16", max_model_len=512)
    assert stream_class_of(endpoint) == stream_class_of(reordered) == same.stream_class
    other, _ = specs("vllm", dtype="float16", max_model_len=512)
    assert other.stream_class != spec.stream_class
    assert other.generation != spec.generation
    native, _ = specs("native", dtype="float16")
    assert native.engine.vllm_args == {}


def test_a_replica_takes_what_all_gateways_may_send_it_in_one_moment() -> None:
    def limits(count: int, max_open: int) -> tuple[int, int]:
        endpoint = {"model": "simulated", "engine": "simulated", "max_open": max_open}
        gateway = {"bind": "127.0.0.1:8000", "count": count}
        spec = replica_process(
            parse_config({"endpoints": {"chat": endpoint}, "gateway": gateway}), "chat", "chat-1", Path("/r")
        )
        front = msgspec.json.decode(spec.argv[-1], type=ReplicaSpec)
        return front.max_open, front.max_open + front.max_surplus

    assert limits(1, 8) == (8, 8)
    assert limits(3, 8) == (8, 24)
    assert limits(3, 40_000) == (40_000, 65_536), "what an engine takes"


def ranked(strategy: str) -> Config:
    return config(native={"tensor_parallel": 3, "num_threads": 3}, nodes={"rank_strategy": strategy})


def test_ranks_that_may_be_on_several_nodes_are_told_where_they_are() -> None:
    def start(strategy: str) -> tuple[ReplicaSpec, list[list[str]], int]:
        process = cluster_replica_process(ranked(strategy), "chat", "chat-1", Path("/run/x"))
        assert process.place is not None
        front = msgspec.json.decode(process.argv[-1], type=ReplicaSpec)
        arguments = [each.argv[4:] for each in process.companions]
        return front, arguments, process.place.choices[0].num_parts

    socket_path = rank_socket_path(RUN_DIR_PLACEHOLDER, "chat-1")
    front, holders, num_parts = start("pack")
    assert (front.engine.rank_socket, front.engine.rank_address) == (socket_path, NODE_PLACEHOLDER)
    assert holders == [[socket_path, str(rank), NODE_PLACEHOLDER] for rank in (1, 2)]
    assert num_parts == 3
    front, holders, num_parts = start("strict_pack")
    assert (front.engine.rank_address, num_parts) == ("", 1)
    assert holders == [[socket_path, str(rank)] for rank in (1, 2)]


def test_only_native_engines_may_have_ranks_on_several_nodes() -> None:
    with pytest.raises(ConfigError, match="rank_strategy is pack and engine is simulated; only the ranks of"):
        config(engine="simulated", nodes={"rank_strategy": "pack"})
