"""The admin API's frontend: its key, its way to the controller, and TLS where the public address has it."""

from __future__ import annotations

from headrace.api.messages import EndpointRule, GatewaySpec
from headrace.gateway.haproxy_admin import admin_sections
from headrace.gateway.paths import GatewayPaths

PATHS = GatewayPaths("/run/x")


def sections(**settings: str) -> str:
    rules = [EndpointRule("chat", "m", 1, 1.0)]
    return admin_sections(GatewaySpec("/run/x", "127.0.0.1:1", rules, **settings), PATHS)  # type: ignore[arg-type]


def test_the_key_is_checked_before_anything_is_relayed_and_does_not_go_on() -> None:
    text = sections(admin_bind="127.0.0.1:8001")
    check, forget, relay = (
        text.index(words)
        for words in (f"map_str({PATHS.admin_key_map})", "del-header authorization", "default_backend")
    )
    assert check < forget < relay
    assert "server controller unix@/run/x/admin-http.sock" in text
    assert PATHS.key_map not in text, "tenants' keys do not count"


def test_it_speaks_tls_where_the_public_address_does() -> None:
    assert " ssl " not in sections(admin_bind="0.0.0.0:8001")
    text = sections(admin_bind="0.0.0.0:8001", certificate="c.pem", certificate_key="k.pem")
    assert f"bind 0.0.0.0:8001 ssl crt {PATHS.certificate}" in text
