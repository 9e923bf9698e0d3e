"""The cluster's secret becomes the same key and certificate on every host."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from headrace.cluster_tls import client_context, server_context
from headrace.errors import ConfigError
from headrace.fabric.cluster_identity import identity_pem, make_secret, write_identity

SECRET = bytes(range(32))


def test_one_secret_gives_the_same_bytes_on_every_host_and_another_gives_others() -> None:
    assert identity_pem(SECRET) == identity_pem(SECRET)
    assert identity_pem(SECRET) != identity_pem(SECRET[::-1])


def test_secrets_are_made_at_random_and_long_enough() -> None:
    assert make_secret() != make_secret()
    assert identity_pem(make_secret())


def test_a_short_secret_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError, match=r"5 bytes.* at least 32") as raised:
        identity_pem(b"short")
    assert "short" not in str(raised.value).replace("cluster's", "")


def test_the_file_is_for_its_owner_alone_also_where_there_was_one_for_all(tmp_path: Path) -> None:
    path = tmp_path / "cluster.pem"
    path.touch(0o644)
    write_identity(SECRET, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == identity_pem(SECRET)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.touch()
    (tmp_path / "cluster.pem").symlink_to(target)
    write_identity(bytes(range(32)), tmp_path / "cluster.pem")
    assert not (tmp_path / "cluster.pem").is_symlink()
    assert target.read_bytes() == b""


def test_contexts_say_which_file_cannot_be_used(tmp_path: Path) -> None:
    damaged = tmp_path / "cluster.pem"
    damaged.write_text("not a key")
    for path in (damaged, tmp_path / "missing.pem"):
        for make in (server_context, client_context):
            with pytest.raises(ConfigError, match=path.name):
                make(path)
