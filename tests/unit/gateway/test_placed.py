"""A gateway on a node that was chosen for it: what is left to its host, and what is written there first."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest

from headrace.api.messages import EndpointRule, GatewaySpec, ProcessSpec, TenantRule
from headrace.api.run_paths import (
    KEEPER_PLACEHOLDER,
    NODE_PLACEHOLDER,
    PYTHON_PLACEHOLDER,
    RUN_DIR_PLACEHOLDER,
)
from headrace.errors import ConfigError
from headrace.gateway.paths import GatewayPaths
from headrace.gateway.placed import begin, localized, placed_specs

KEY_HASH = "a" * 64


def spec_of(run_dir: str = RUN_DIR_PLACEHOLDER, **fields: object) -> GatewaySpec:
    spec = GatewaySpec(
        run_dir,
        "node:8000",
        [EndpointRule("chat", "m", 8, 30.0)],
        tenants=[TenantRule("acme")],
        keys={KEY_HASH: "acme"},
        identity=f"{run_dir}/cluster.pem",
        node=NODE_PLACEHOLDER,
    )
    return msgspec.structs.replace(spec, **fields)


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_a_host_puts_its_own_in_and_what_was_written_in_full_stays() -> None:
    spec = spec_of(metrics_bind="0.0.0.0:9000", admin_bind="node:9001")
    here = localized(spec, "/run/here", "10.0.0.2")
    assert (here.run_dir, here.identity) == ("/run/here", "/run/here/cluster.pem")
    assert (here.bind, here.metrics_bind, here.admin_bind) == (
        "10.0.0.2:8000",
        "0.0.0.0:9000",
        "10.0.0.2:9001",
    )
    assert localized(spec, "/run/here", "fd00::2").bind == "[fd00::2]:8000"
    beside = spec_of("/run/of/the/controller", node="")
    assert localized(beside, "/run/here", "10.0.0.2") == beside


def test_arguments_name_nothing_of_the_controllers_machine_and_no_key() -> None:
    specs = placed_specs(spec_of())
    for process in specs:
        assert process.argv[0] == PYTHON_PLACEHOLDER
        assert KEY_HASH not in " ".join(process.argv)
        assert process.log_path.startswith(f"{RUN_DIR_PLACEHOLDER}/logs/")
        assert KEY_HASH in process.files["g1/keys.map"]
    assert [KEEPER_PLACEHOLDER in process.argv for process in specs] == [False, False, True]
    assert {type(process) for process in specs} == {ProcessSpec}


def test_the_first_start_writes_the_files_and_a_later_one_under_the_same_keeper_leaves_them(
    tmp_path: Path,
) -> None:
    spec = spec_of(str(tmp_path), bind=free_address(), identity="")
    config = Path(GatewayPaths(spec.run_dir, "g1").config)
    assert begin(spec, "keeper-1")[1:3] == ["-W", "-f"]
    config.write_text("# with the running replicas")
    begin(spec, "keeper-1")
    assert config.read_text() == "# with the running replicas"
    begin(spec, "keeper-2")
    assert "frontend" in config.read_text(), "what another keeper's gateway left is out of date"


def test_an_address_that_is_taken_is_an_error_unless_a_gateway_beside_it_shares_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        spec = spec_of(str(tmp_path), bind=f"127.0.0.1:{taken.getsockname()[1]}", identity="")
        with pytest.raises(ConfigError, match=r"gateway\.bind: .* is in use"):
            begin(spec, "keeper-1")
        assert not Path(GatewayPaths(spec.run_dir, "g1").config).exists()
        (tmp_path / "g2").mkdir()
        (tmp_path / "g2/keeper").write_text("keeper-2")
        begin(spec, "keeper-1")
