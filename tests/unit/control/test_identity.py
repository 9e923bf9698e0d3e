"""Which keys count: those of the config and of the store, of the tenants that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.api.config import Config
from headrace.api.config_loader import parse_config
from headrace.api.messages import CreateKey, ListKeys, RevokeKey
from headrace.control.identity import Identity
from headrace.control.key_store import KeyStore, hash_key
from headrace.errors import ConfigError

IN_CONFIG = "0" * 64


def config(**tenants: Any) -> Config:
    return parse_config({"endpoints": {"chat": {"model": "m"}}, "tenants": tenants})


TWO = config(acme={"keys": [f"sha256:{IN_CONFIG}"]}, small={})


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity(tmp_path / "headrace")


def test_created_and_configured_keys_count_for_tenants_that_exist(identity: Identity) -> None:
    reply = identity.obey(CreateKey("small", "laptop"), TWO, 5.0)
    assert identity.valid_keys(TWO) == {IN_CONFIG: "acme", hash_key(reply.key): "small"}
    assert identity.valid_keys(config(acme={})) == {}
    assert identity.valid_keys(config()) == {}
    (info,) = reply.keys
    assert (info.tenant, info.name, info.created_s, info.source) == ("small", "laptop", 5.0, "created")
    assert hash_key(reply.key).startswith(info.hash_start)


def test_keys_are_listed_without_the_keys_and_those_that_do_not_count_are_told(identity: Identity) -> None:
    identity.obey(CreateKey("small"), TWO, 5.0)
    listed = identity.obey(ListKeys(), TWO, 6.0)
    assert [(key.tenant, key.source) for key in listed.keys] == [("small", "created"), ("acme", "config")]
    assert listed.notes == []
    assert [key.tenant for key in identity.obey(ListKeys("acme"), TWO, 6.0).keys] == ["acme"]
    assert identity.obey(ListKeys(), config(acme={}), 6.0).notes == [
        "the config has no tenant small: its keys are kept and do not count"
    ]


def test_a_revoked_key_does_not_count(identity: Identity) -> None:
    key_id = identity.obey(CreateKey("small"), TWO, 5.0).keys[0].key_id
    assert identity.obey(RevokeKey(key_id), TWO, 6.0).keys[0].tenant == "small"
    assert identity.valid_keys(TWO) == {IN_CONFIG: "acme"}


def test_mistakes_name_what_there_is(identity: Identity) -> None:
    for command in (CreateKey("nobody"), ListKeys("nobody")):
        with pytest.raises(ConfigError, match="tenant 'nobody' does not exist; there are: acme, small"):
            identity.obey(command, TWO, 5.0)
    with pytest.raises(ConfigError, match="add a `tenants` section"):
        identity.obey(CreateKey("nobody"), config(), 5.0)
    with pytest.raises(ConfigError, match="cannot be a tenant's name"):
        identity.obey(CreateKey("a b"), None, 5.0)
    with pytest.raises(ConfigError, match="is a key of the config; remove it"):
        identity.obey(RevokeKey(f"config-{IN_CONFIG[:12]}"), TWO, 5.0)


def test_without_a_config_a_key_can_be_made_for_a_tenant_to_come(identity: Identity) -> None:
    reply = identity.obey(CreateKey("later"), None, 5.0)
    assert identity.valid_keys(config(later={})) == {hash_key(reply.key): "later"}


def test_tenants_that_nobody_can_be_are_named(identity: Identity) -> None:
    assert identity.describe_keyless(TWO) == [
        "tenant small has no key yet; make one with: headrace keys create small"
    ]
    identity.obey(CreateKey("small"), TWO, 5.0)
    assert identity.describe_keyless(TWO) == []


def test_what_another_process_changed_is_noticed_once(identity: Identity, tmp_path: Path) -> None:
    other = KeyStore(tmp_path / "headrace")
    assert not identity.refresh()
    key, _ = other.create("small", "", 5.0)
    assert identity.refresh()
    assert not identity.refresh()
    assert identity.valid_keys(TWO) == {IN_CONFIG: "acme", hash_key(key): "small"}


def test_while_the_store_cannot_be_read_nobody_knows_the_keys(identity: Identity) -> None:
    key = identity.obey(CreateKey("small"), TWO, 5.0).key
    path = identity._store.path
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert not identity.refresh()
    assert identity.valid_keys(TWO) is None
    assert "is damaged" in identity.error
    assert identity.describe_keyless(TWO) == []
    for command in (ListKeys(), CreateKey("small")):
        with pytest.raises(ConfigError, match="is damaged"):
            identity.obey(command, TWO, 5.0)
    path.write_bytes(whole)
    assert identity.refresh()
    assert identity.valid_keys(TWO) == {IN_CONFIG: "acme", hash_key(key): "small"}


def test_a_new_admin_key_is_noticed_and_a_bad_one_closes_the_admin_api(
    identity: Identity, tmp_path: Path
) -> None:
    store = KeyStore(tmp_path / "headrace")
    assert identity.admin_key_hash == ""
    store.create_admin_key()
    assert identity.refresh()
    assert identity.admin_key_hash == store.admin_key_hash()
    assert not identity.refresh()
    store.admin_key_path().chmod(0o644)
    assert identity.refresh()
    assert identity.admin_key_hash == ""
