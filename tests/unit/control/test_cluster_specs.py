"""What a replica's host on a cluster is told, and what it asks of its node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.api.config import Config
from headrace.api.config_loader import parse_config
from headrace.api.messages import NodeNeeds, Place, ReplicaSpec
from headrace.api.run_paths import NODE_PLACEHOLDER, PYTHON_PLACEHOLDER, RUN_DIR_PLACEHOLDER, rank_socket_path
from headrace.control.config_changes import keep_address
from headrace.control.places import gateway_place, place_of
from headrace.control.preflight import check_address
from headrace.control.specs import (
    CONFIG_FILE,
    cluster_controller_process,
    cluster_replica_process,
    gateway_specs,
    generation_of,
    placed_durable_process,
)
from headrace.errors import ConfigError


def config_of(launcher: str = "ray", **endpoint: Any) -> Config:
    return parse_config({"launcher": launcher, "endpoints": {"chat": {"model": "m", **endpoint}}})


def needs_of(**endpoint: Any) -> list[NodeNeeds]:
    return place_of(config_of(**endpoint).endpoints["chat"]).choices


def test_a_native_replica_takes_as_many_cores_as_it_has_threads() -> None:
    assert needs_of() == [NodeNeeds({"CPU": 1.0})]
    assert needs_of(native={"num_threads": 4}) == [NodeNeeds({"CPU": 4.0})]
    assert needs_of(native={"num_threads": 2, "tensor_parallel": 2}) == [NodeNeeds({"CPU": 2.0})]
    assert needs_of(native={"tensor_parallel": 3}) == [NodeNeeds({"CPU": 3.0})]
    assert needs_of(nodes={"resources": {"CPU": 2, "GPU": 1}}) == [NodeNeeds({"CPU": 2.0, "GPU": 1.0})]
    assert needs_of(engine="simulated") == [NodeNeeds({"CPU": 0.1})]


def test_its_engine_has_the_threads_of_the_cores_that_it_takes() -> None:
    spec = cluster_replica_process(config_of(nodes={"resources": {"CPU": 3}}), "chat", "chat-1", Path("/run"))
    assert msgspec.json.decode(spec.argv[-1], type=ReplicaSpec).engine.num_threads == 3


def test_each_further_rank_is_held_by_a_companion_that_finds_the_engine_by_its_socket() -> None:
    config = config_of(native={"tensor_parallel": 3}, nodes={"resources": {"CPU": 6}})
    spec = cluster_replica_process(config, "chat", "chat-1", Path("/run"))
    engine = msgspec.json.decode(spec.argv[-1], type=ReplicaSpec).engine
    assert engine.rank_socket == rank_socket_path(RUN_DIR_PLACEHOLDER, "chat-1")
    assert engine.num_threads == 6
    assert [each.name for each in spec.companions] == ["chat-1-rank-1", "chat-1-rank-2"]
    assert [each.argv[-2:] for each in spec.companions] == [
        [engine.rank_socket, "1"],
        [engine.rank_socket, "2"],
    ]
    assert all(each.is_restarted and each.argv[0] == PYTHON_PLACEHOLDER for each in spec.companions)
    alone = cluster_replica_process(config_of(), "chat", "chat-1", Path("/run"))
    assert not alone.companions
    assert not msgspec.json.decode(alone.argv[-1], type=ReplicaSpec).engine.rank_socket


def test_preferences_add_to_what_the_section_asks() -> None:
    nodes = {
        "resources": {"GPU": 1},
        "accelerator_type": "L4",
        "labels": {"zone": "a"},
        "prefer": [{"labels": {"market": "spot"}, "wait_s": 20}, {"accelerator_type": "H100"}],
    }
    spot, other = needs_of(nodes=nodes)
    resources = {"CPU": 1.0, "GPU": 1.0}
    assert spot == NodeNeeds(resources, {"zone": "a", "market": "spot"}, "L4", 20.0)
    assert other == NodeNeeds(resources, {"zone": "a"}, "H100", 60.0)


def test_paths_are_left_to_the_host() -> None:
    spec = cluster_replica_process(config_of(), "chat", "chat-1", Path("/run/of/the/controller"))
    assert spec.argv[0] == PYTHON_PLACEHOLDER
    assert spec.log_path == f"{RUN_DIR_PLACEHOLDER}/logs/chat-1.log"
    replica = msgspec.json.decode(spec.argv[-1], type=ReplicaSpec)
    assert replica.run_dir == RUN_DIR_PLACEHOLDER
    assert replica.report_sockets == [
        f"{RUN_DIR_PLACEHOLDER}/g1/router.sock",
        f"{RUN_DIR_PLACEHOLDER}/controller.sock",
    ]


def test_a_controller_takes_its_first_config_along_and_is_restarted() -> None:
    spec = cluster_controller_process(config_of(), "demo")
    assert spec.argv[-2:] == [RUN_DIR_PLACEHOLDER, "demo"]
    assert spec.is_restarted
    assert Config.model_validate_json(spec.files[CONFIG_FILE]) == config_of()


def test_other_nodes_are_another_version_on_a_cluster_only() -> None:
    there = {"nodes": {"resources": {"CPU": 2}}, "native": {"num_threads": 1}}
    here = {"native": {"num_threads": 1}}
    assert generation_of(config_of(**there), "chat") != generation_of(config_of(**here), "chat")
    assert generation_of(config_of("local", **there), "chat") == generation_of(
        config_of("local", **here), "chat"
    )


def test_a_config_that_is_applied_stays_on_the_cluster_and_cannot_move_there() -> None:
    running = config_of()
    assert keep_address(config_of("local", native={"num_threads": 2}), running).launcher == "ray"
    with pytest.raises(ConfigError, match="launcher: is local and cannot become ray"):
        keep_address(config_of("ray"), config_of("local"))


def placed_config(bind: str = "node:8000", **gateway: Any) -> Config:
    chat = {"model": "m", "streams": {"durable": True}}
    keys = {"acme": {"keys": ["sha256:" + "a" * 64]}}
    section = {"bind": bind, "count": 2, "placement": {"labels": {"kind": "edge"}}, **gateway}
    return parse_config({"launcher": "ray", "endpoints": {"chat": chat}, "tenants": keys, "gateway": section})


def test_gateways_with_a_placement_are_kept_apart_on_nodes_of_that_kind() -> None:
    assert gateway_place(config_of()) is None
    assert gateway_place(placed_config(num_threads=2)) == Place(
        [NodeNeeds({"CPU": 2.0}, {"kind": "edge"})], "apart"
    )
    given = placed_config(placement={"resources": {"CPU": 0.5, "edge": 1}})
    assert gateway_place(given) == Place([NodeNeeds({"CPU": 0.5, "edge": 1.0})], "apart")


def test_gateways_elsewhere_are_told_nothing_of_the_controllers_machine() -> None:
    for spec in gateway_specs(
        placed_config(metrics_bind="node:9000"), Path("/run/of/the/controller")
    ).values():
        assert (spec.run_dir, spec.node) == (RUN_DIR_PLACEHOLDER, NODE_PLACEHOLDER)
        assert "/run/of/the/controller" not in msgspec.json.encode(spec).decode()
    assert spec.metrics_bind == "node:9001"


def test_fronts_listen_for_gateways_of_every_host_and_durable_ones_share_their_gateways_place() -> None:
    config = placed_config()
    replica = cluster_replica_process(config, "chat", "chat-1", Path("/run"))
    front = msgspec.json.decode(replica.argv[-1], type=ReplicaSpec)
    assert (front.host, front.identity) == (NODE_PLACEHOLDER, f"{RUN_DIR_PLACEHOLDER}/cluster.pem")
    durable = placed_durable_process(config, "chat", "chat:g2-1", "g2", Path("/run"))
    assert (durable.place, durable.group) == (gateway_place(config), "gateway-g2")
    assert "/run/" not in " ".join(durable.argv)


@pytest.mark.parametrize(
    ("gateway", "words"),
    [
        ({"bind": "10.0.0.7:8000"}, "write node:8000"),
        ({"bind": "127.0.0.1:8000", "metrics_bind": "10.0.0.7:9000"}, "write node:9000"),
        ({"placement": None}, "set gateway.placement"),
        ({"bind": "node:80000"}, "not host:port"),
        ({"placement": {"resources": {"edge": 0}}}, "must be more than 0"),
        ({"placement": {"label": {}}}, "label"),
    ],
)
def test_addresses_and_placements_that_cannot_be_are_refused_in_words(
    gateway: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        placed_config(**{"bind": "node:8000", **gateway})


def test_one_machine_has_no_nodes_for_gateways() -> None:
    config = placed_config("127.0.0.1:0").model_copy(update={"launcher": "local"})
    with pytest.raises(ConfigError, match="launcher: ray"):
        check_address(config)
    with pytest.raises(ConfigError, match=r"gateway\.placement: is .* while the system runs"):
        keep_address(placed_config(placement={"labels": {"kind": "other"}}), placed_config())
