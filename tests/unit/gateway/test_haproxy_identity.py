"""Tenants' sets of endpoints and the maps that carry them."""

from __future__ import annotations

import pytest

from headrace.api.messages import EndpointRule, GatewaySpec, TenantRule
from headrace.errors import ConfigError
from headrace.gateway import haproxy_identity
from headrace.gateway.haproxy_identity import endpoint_sets, identity_files, identity_rules
from headrace.gateway.paths import GatewayPaths

PATHS = GatewayPaths("/run/x")


def spec_of(names: list[str], *tenants: TenantRule) -> GatewaySpec:
    return GatewaySpec(
        "/run/x", "127.0.0.1:1", [EndpointRule(name, "m", 1, 1.0) for name in names], tenants=[*tenants]
    )


def test_tenants_with_equal_lists_share_a_set_and_an_empty_list_is_all() -> None:
    tenants = [
        TenantRule("a"),
        TenantRule("b", endpoints=["y", "x"]),
        TenantRule("c", endpoints=["x"]),
        TenantRule("d", endpoints=["x", "gone"]),
    ]
    sets, set_of = endpoint_sets(spec_of(["x", "y"], *tenants))
    assert sets == {"s0": ["x", "y"], "s1": ["x"]}
    assert set_of == {"a": "s0", "b": "s0", "c": "s1", "d": "s1"}


def test_the_maps_name_what_each_set_may_use_and_its_only_endpoint() -> None:
    files = identity_files(spec_of(["x", "y"], TenantRule("a"), TenantRule("c", endpoints=["x"])), PATHS)
    assert files[PATHS.endpoint_map].splitlines() == ["s0/x ep-x", "s0/y ep-y", "s1/x ep-x", "s1 ep-x"]
    assert files[PATHS.tenant_map].splitlines() == ["a s0", "c s1"]
    lists = dict(line.split(" ", 1) for line in files[PATHS.model_map].splitlines())
    assert '"y"' in lists["s0"]
    assert '"y"' not in lists["s1"]
    assert PATHS.key_map not in files


def test_adapters_are_names_of_models_wherever_their_endpoint_may_be_used() -> None:
    rules = [EndpointRule("x", "m", 1, 1.0, adapters=["x-law", "poet"]), EndpointRule("y", "m", 1, 1.0)]
    spec = GatewaySpec("/run/x", "127.0.0.1:1", rules)
    files = identity_files(spec, PATHS)
    assert files[PATHS.endpoint_map].splitlines() == ["x ep-x", "x-law ep-x", "poet ep-x", "y ep-y"]
    assert '"poet"' in files[PATHS.models]
    assert files[PATHS.model_map].splitlines()[2].startswith('poet {"id":"poet"')
    tenants = [TenantRule("a", endpoints=["x"]), TenantRule("b", endpoints=["y"])]
    files = identity_files(GatewaySpec("/run/x", "127.0.0.1:1", rules, tenants=tenants), PATHS)
    assert files[PATHS.endpoint_map].splitlines() == [
        *("s0/x ep-x", "s0/x-law ep-x", "s0/poet ep-x", "s0 ep-x"),
        *("s1/y ep-y", "s1 ep-y"),
    ]


def test_too_many_different_lists_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy_identity, "MAX_MAP_LINES", 16)
    names = [f"e{number}" for number in range(5)]
    tenants = [TenantRule(f"t{k}", endpoints=names[:k] + names[k + 1 :]) for k in range(5)]
    assert identity_files(spec_of(names, *tenants[:4], *tenants[:4]), PATHS), "equal lists count once"
    with pytest.raises(ConfigError, match="5 different lists of 5 endpoints"):
        identity_files(spec_of(names, *tenants), PATHS)


def test_keys_are_taken_off_requests_even_without_tenants() -> None:
    assert "http_auth_bearer" not in identity_rules(spec_of(["x"]), PATHS)
    for spec in (spec_of(["x"]), spec_of(["x"], TenantRule("a"))):
        assert "del-header authorization" in identity_rules(spec, PATHS)
        assert "del-header x-api-key" in identity_rules(spec, PATHS)
