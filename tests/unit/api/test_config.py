"""The config: every mistake is told with its path, what was got and what is allowed, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.api.config import Config, Gateway
from headrace.api.config_loader import dump_config, load_config, parse_config
from headrace.api.endpoint_config import Endpoint, NativeEngine, Queue, Replicas, SimulatedEngine
from headrace.errors import ConfigError

GOOD: dict[str, Any] = {"endpoints": {"chat": {"model": "m"}}}


def endpoint(**fields: Any) -> dict[str, Any]:
    return {"endpoints": {"chat": {"model": "m", **fields}}}


def problems_of(tree: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, source="x.yaml")
    return caught.value.problems


def write(directory: Path, text: str) -> Path:
    path = directory / "config.yaml"
    path.write_text(text)
    return path


def test_a_model_is_all_that_must_be_given() -> None:
    config = parse_config(GOOD)
    assert config.endpoints["chat"].replicas == Replicas(min=1, max=1)
    assert config.gateway.bind == "127.0.0.1:8000"


@pytest.mark.parametrize(
    ("section", "path"),
    [
        (Config, ()),
        (Endpoint, ("endpoints", "chat")),
        (Replicas, ("endpoints", "chat", "replicas")),
        (NativeEngine, ("endpoints", "chat", "native")),
        (SimulatedEngine, ("endpoints", "chat", "simulated")),
        (Queue, ("endpoints", "chat", "queue")),
        (Gateway, ("gateway",)),
    ],
)
def test_an_unknown_key_in_any_section_is_refused_with_the_known_ones(
    section: Any, path: tuple[str, ...]
) -> None:
    tree: dict[str, Any] = {"endpoints": {"chat": {"model": "m"}}}
    place = tree
    for key in path:
        place = place.setdefault(key, {})
    place["surprise"] = 1
    (problem,) = problems_of(tree)
    assert problem.startswith(f"x.yaml: {'.'.join((*path, 'surprise'))}: unknown key.")
    for field in section.model_fields:
        assert field in problem


@pytest.mark.parametrize(
    ("tree", "path", "words"),
    [
        ({}, "endpoints", "missing"),
        ({"endpoints": {}}, "endpoints", "at least 1"),
        ({"endpoints": {"chat": {}}}, "endpoints.chat.model", "missing"),
        ({"endpoints": {"a b": {"model": "m"}}}, "endpoints", "letters, digits"),
        (endpoint(model=""), "endpoints.chat.model", "at least 1"),
        (endpoint(model=3), "endpoints.chat.model", "string"),
        (endpoint(engine="vlm"), "endpoints.chat.engine", "'native', 'vllm' or 'simulated'"),
        (endpoint(replicas={"min": 3, "max": 2}), "endpoints.chat.replicas", "min must be at most max"),
        (
            endpoint(replicas={"min": 1, "max": 2, "standby": 3}),
            "endpoints.chat.replicas",
            "standby is 3 and",
        ),
        (endpoint(replicas="many"), "endpoints.chat.replicas", "got 'many'"),
        (endpoint(replicas=-1), "endpoints.chat.replicas.min", "greater than or equal to 0"),
        (endpoint(replicas=True), "endpoints.chat.replicas", "got True"),
        (endpoint(native={"block_size": 20}), "endpoints.chat.native.block_size", "power of two >= 8"),
        (endpoint(native={"token_budget": 1}), "endpoints.chat.native.token_budget", "16"),
        (endpoint(native={"num_threads": "two"}), "endpoints.chat.native.num_threads", "got 'two'"),
        (endpoint(engine="vllm", replicas={"min": 1, "standby": 1}), "endpoints.chat", "cannot sleep"),
        (endpoint(engine="vllm", shared_prefix="be kind"), "endpoints.chat", "cannot share the first part"),
        (endpoint(vllm={"lora": {"poet": "/x"}}), "endpoints.chat", "only engine vllm serves them"),
        (endpoint(engine="vllm", vllm={"lora": {"chat": "/x"}}), "endpoints", "chat: named twice"),
        (endpoint(engine="vllm", vllm={"lora": {"no good": "/x"}}), "endpoints", "'no good'"),
        (endpoint(vllm={"max_model_len": 5}), "endpoints.chat.vllm.max_model_len", "unknown key"),
        (endpoint(queue={"max_wait_s": 0}), "endpoints.chat.queue.max_wait_s", "greater than 0"),
        (endpoint(drain_grace_s=-1), "endpoints.chat.drain_grace_s", "greater than or equal to 0"),
        ({**GOOD, "launcher": "kubernetes"}, "launcher", "'local' or 'ray'"),
        ({**GOOD, "ray": {"address": "ray://head"}}, "ray.address", "neither auto nor host:port"),
        (endpoint(nodes={"resources": {"GPU": 0}}), "endpoints.chat.nodes.resources", "more than 0"),
        (endpoint(nodes={"resources": {"GPU": 1.5}}), "endpoints.chat.nodes.resources", "a whole number"),
        (endpoint(nodes={"resources": {"a b": 1}}), "endpoints.chat.nodes.resources", "resource name 'a b'"),
        (endpoint(nodes={"labels": {"zone": "in(a,b)"}}), "endpoints.chat.nodes.labels", "zone=in(a,b)"),
        (endpoint(nodes={"accelerator_type": "H100"}), "endpoints.chat.nodes", "ask for no GPU"),
        (
            endpoint(nodes={"prefer": [{"wait_s": 0}]}),
            "endpoints.chat.nodes.prefer.0.wait_s",
            "greater than 0",
        ),
        ({**GOOD, "notice_file": "notice"}, "notice_file", "absolute path"),
        ({**GOOD, "notice_url": "ftp://host/x"}, "notice_url", "must be http://host/path"),
        ({**GOOD, "notice_url": "http:///x"}, "notice_url", "must be http://host/path"),
        ({**GOOD, "notice_url": "http://host:70000/x"}, "notice_url", "is no address"),
        ({**GOOD, "notice_url": "http://host/a b"}, "notice_url", "in ASCII"),
        ({**GOOD, "notice_url": "http://me:secret@host/"}, "notice_url", "no user, password"),
        ({**GOOD, "notice_headers": {"A b": "x"}}, "notice_headers", "'A b' cannot be set"),
        ({**GOOD, "notice_headers": {"Host": "x"}}, "notice_headers", "'Host' cannot be set"),
        ({**GOOD, "notice_headers": {"A": "x\r\nB: y"}}, "notice_headers", "printable ASCII"),
        ({**GOOD, "notice_headers": {"X-Token": "x"}}, "notice_headers", "secrets are refused"),
        ({**GOOD, "gateway": {"bind": "8000"}}, "gateway.bind", "not host:port"),
        ({**GOOD, "gateway": {"bind": "example.org:80"}}, "gateway.bind", "not an IP address"),
        ({**GOOD, "gateway": {"bind": "127.0.0.1:70000"}}, "gateway.bind", "not host:port"),
        ({**GOOD, "gateway": {"max_body_mb": 0}}, "gateway.max_body_mb", "greater than or equal to 1"),
    ],
)
def test_a_wrong_value_is_refused_with_path_and_rule(tree: dict[str, Any], path: str, words: str) -> None:
    (problem,) = problems_of(tree)
    assert problem.startswith(f"x.yaml: {path}: ")
    assert words in problem


def test_all_problems_are_told_together_and_near_misses_are_guessed() -> None:
    problems = problems_of({"endpoints": {"chat": {"modle": "m", "max_open": "x"}}, "gatway": {}})
    assert len(problems) == 4
    assert any("Did you mean 'model'?" in problem for problem in problems)
    assert any("Did you mean 'gateway'?" in problem for problem in problems)


def test_a_number_of_replicas_is_min_and_max() -> None:
    def replicas(value: Any) -> tuple[int, int]:
        chosen = parse_config(endpoint(replicas=value)).endpoints["chat"].replicas
        return chosen.min, chosen.max

    assert replicas(3) == (3, 3)
    assert replicas(0) == (0, 1)
    assert replicas({"min": 2}) == (2, 2)
    assert replicas({"min": 0, "max": 4}) == (0, 4)


def test_the_environment_wins_over_the_file_and_set_wins_over_both(tmp_path: Path) -> None:
    path = write(tmp_path, "endpoints: {chat: {model: file, max_open: 1, drain_grace_s: 1}}")
    environment = {
        "HEADRACE__ENDPOINTS__CHAT__MAX_OPEN": "2",
        "HEADRACE__ENDPOINTS__CHAT__DRAIN_GRACE_S": "2",
    }
    config = load_config(path, environment=environment, settings=["endpoints.chat.drain_grace_s=3"])
    chat = config.endpoints["chat"]
    assert (chat.model, chat.max_open, chat.drain_grace_s) == ("file", 2, 3)


def test_a_config_can_come_from_settings_alone() -> None:
    config = load_config(settings=["endpoints.chat={model: m, replicas: 2}", "gateway.bind=127.0.0.1:0"])
    assert config.endpoints["chat"].replicas.min == 2


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("gateway.bind", "write section.field=value"),
        ("=1", "write section.field=value"),
        ("gateway.bind.port=1", "is '127.0.0.1:1', not a section"),
        ("gateway={", "not valid YAML"),
    ],
)
def test_a_malformed_setting_is_refused(setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(settings=["gateway.bind=127.0.0.1:1", setting])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("endpoints: {chat: {model: a}}\nendpoints: {}", "key 'endpoints' appears twice"),
        ("endpoints: {chat: {model: a, model: b}}", "key 'model' appears twice"),
        ("endpoints: [", "not valid YAML"),
        ("- a\n- b", "the top level is a list"),
        ("endpoints: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("", "endpoints: missing"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(write(tmp_path, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


def test_what_is_shown_loads_again_to_the_same(tmp_path: Path) -> None:
    config = parse_config(endpoint(replicas={"min": 1, "max": 3}, native={"token_budget": 64}))
    text = dump_config(config)
    assert load_config(write(tmp_path, text)) == config
    assert yaml.safe_load(text)["endpoints"]["chat"]["queue"]["max_requests"] == 1024


HASH = "sha256:" + "0" * 64


def with_tenants(
    bind: str = "127.0.0.1:8000", tls: bool = False, admin: str = "", **tenants: Any
) -> dict[str, Any]:
    gateway: dict[str, Any] = {"bind": bind, "admin_bind": admin}
    if tls:
        gateway["tls"] = {"certificate": "c.pem", "key": "k.pem"}
    return {**GOOD, "gateway": gateway, "tenants": tenants}


def test_mistakes_in_tenants_are_told_all_at_once_with_their_paths() -> None:
    tree = with_tenants(
        **{
            "a b": {},
            "acme": {"endpoints": ["chat", "nope"], "keys": [HASH]},
            "small": {"keys": [HASH, HASH]},
        }
    )
    assert [problem.split(": ")[1] for problem in problems_of(tree)] == [
        "tenants",
        "tenants.acme.endpoints",
        "tenants.small.keys",
        "tenants.small.keys",
    ]
    problems = "\n".join(problems_of(tree))
    assert "'a b'" in problems
    assert "nope: no such endpoint; there are: chat" in problems
    assert "a key of tenant acme, too" in problems


def test_a_key_in_clear_is_refused_and_not_shown() -> None:
    (problem,) = problems_of(with_tenants(acme={"keys": ["hr-secret"]}))
    assert "tenants.acme.keys" in problem
    assert "headrace keys create" in problem
    assert "hr-secret" not in problem


@pytest.mark.parametrize("bind", ["0.0.0.0:8000", "[::]:8000", "192.0.2.1:8000"])
def test_without_tenants_the_gateway_stays_on_loopback(bind: str) -> None:
    (problem,) = problems_of(with_tenants(bind))
    assert f"gateway.bind: {bind} can be reached from other machines" in problem
    assert "headrace keys create" in problem
    assert parse_config(with_tenants(bind, acme={})).gateway.bind == bind


@pytest.mark.parametrize("bind", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_loopback_needs_no_tenants(bind: str) -> None:
    assert parse_config(with_tenants(bind, admin=bind))


def test_the_admin_api_leaves_the_machine_only_with_tenants_and_tls() -> None:
    (problem,) = problems_of(with_tenants(admin="0.0.0.0:9", acme={}))
    assert "gateway.admin_bind: 0.0.0.0:9" in problem
    assert "gateway.tls" in problem
    (problem,) = problems_of(with_tenants(admin="0.0.0.0:9", tls=True))
    assert "tenants" in problem
    assert parse_config(with_tenants(admin="0.0.0.0:9", tls=True, acme={}))
