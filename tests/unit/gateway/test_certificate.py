"""A certificate's files: read, checked, refused with words that help; and taken again when they change."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.clock import VirtualClock
from headrace.errors import ConfigError
from headrace.gateway.certificate import _validity, load_certificate, valid_until
from headrace.gateway.certificate_keeper import CertificateKeeper
from headrace.gateway.haproxy_runtime import HaproxyRefused, HaproxyRuntime, HaproxyUnavailable

NOW_S = datetime.now(UTC).timestamp()
AUTHORITY = trustme.CA()


def write_pair(directory: Path, not_after: datetime | None = None) -> tuple[str, str]:
    """A certificate of our own authority and its key, in `c.pem` and `k.pem`."""
    pair = AUTHORITY.issue_cert("localhost", "127.0.0.1", not_after=not_after)
    certificate, key = directory / "c.pem", directory / "k.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    key.write_bytes(pair.private_key_pem.bytes())
    return str(certificate), str(key)


def test_a_good_pair_becomes_one_text_without_blank_lines(tmp_path: Path) -> None:
    certificate, key = write_pair(tmp_path)
    text = Path(certificate).read_text()
    Path(certificate).write_text("Certificate:\n    Version: 3\n\n" + text.replace("\n", "\r\n"))
    pem = load_certificate(certificate, key, NOW_S)
    assert "\n\n" not in pem
    assert "\r" not in pem
    assert pem.index("BEGIN CERTIFICATE") < pem.index("PRIVATE KEY")
    assert pem.endswith("-----\n")
    assert load_certificate(certificate, key, NOW_S) == pem


def test_one_file_may_hold_both(tmp_path: Path) -> None:
    certificate, key = write_pair(tmp_path)
    Path(certificate).write_text(Path(certificate).read_text() + Path(key).read_text())
    assert load_certificate(certificate, certificate, NOW_S)


def test_its_end_is_read_from_the_certificate(tmp_path: Path) -> None:
    end = datetime(2051, 3, 4, 5, 6, 7, tzinfo=UTC)  # beyond 2049 another kind of time is used
    pem = load_certificate(*write_pair(tmp_path, end), NOW_S)
    assert valid_until(pem) == end.timestamp()
    with pytest.raises(ValueError, match="cut off"):
        valid_until("nothing")


def missing(certificate: Path, key: Path) -> None:
    certificate.unlink()


def unreadable(certificate: Path, key: Path) -> None:
    key.unlink()
    key.mkdir()


def foreign_key(certificate: Path, key: Path) -> None:
    key.write_bytes(AUTHORITY.issue_cert("other").private_key_pem.bytes())


def swapped(certificate: Path, key: Path) -> None:
    certificate.write_bytes(key.read_bytes())


def no_key(certificate: Path, key: Path) -> None:
    key.write_bytes(certificate.read_bytes())


def encrypted(certificate: Path, key: Path) -> None:
    key.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIF\n-----END ENCRYPTED PRIVATE KEY-----\n")


def damaged(certificate: Path, key: Path) -> None:
    certificate.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")


def not_base64(certificate: Path, key: Path) -> None:
    certificate.write_text("-----BEGIN CERTIFICATE-----\n#é#\n-----END CERTIFICATE-----\n")


def endless(certificate: Path, key: Path) -> None:
    certificate.write_bytes(b"x" * 100_000)


def damaged_key(certificate: Path, key: Path) -> None:
    key.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (missing, r"gateway\.tls\.certificate: \S+/c\.pem cannot be read: No such file"),
        (unreadable, r"gateway\.tls\.key: \S+/k\.pem cannot be read: Is a directory"),
        (foreign_key, r"gateway\.tls\.key: \S+/k\.pem is not the key of \S+/c\.pem"),
        (swapped, r"c\.pem holds no CERTIFICATE block"),
        (no_key, r"k\.pem holds 0 private keys"),
        (encrypted, r"k\.pem is encrypted.*decrypt it"),
        (damaged, r"c\.pem is damaged"),
        (not_base64, r"c\.pem is damaged"),
        (endless, r"c\.pem has more than 65536 bytes"),
        (damaged_key, r"cannot be used with \S+/k\.pem"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_file(
    tmp_path: Path, spoil: Callable[[Path, Path], None], words: str
) -> None:
    certificate, key = write_pair(tmp_path)
    spoil(Path(certificate), Path(key))
    with pytest.raises(ConfigError, match=words):
        load_certificate(certificate, key, NOW_S)


def test_an_expired_and_a_future_one_are_refused_with_their_dates(tmp_path: Path) -> None:
    end = datetime.now(UTC) + timedelta(days=30)
    pair = write_pair(tmp_path, end)
    with pytest.raises(ConfigError, match=rf"expired on {end:%Y-%m-%d}.*renewed"):
        load_certificate(*pair, NOW_S + 31 * 86_400)
    with pytest.raises(ConfigError, match=r"not valid before .*clock"):
        load_certificate(*pair, 0.0)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_the_reader_of_der_gives_a_time_or_a_valueerror(data: bytes) -> None:
    for text in (data, b"\x30\x80" + data, b"\x30\x05\x30" + data):
        with pytest.raises(ValueError):
            _validity(text)


# ---- the keeper


class FakeRuntime:
    """HAProxy's certificate store."""

    def __init__(self) -> None:
        self.pem = ""
        self.error: Exception | None = None

    async def set_certificate(self, path: str, pem: str) -> None:
        if self.error is not None:
            raise self.error
        self.pem = pem


class World:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.certificate, self.key = write_pair(directory)
        self.target = directory / "gateway.pem"
        self.first = load_certificate(self.certificate, self.key, NOW_S)
        self.target.write_text(self.first)
        self.runtime = FakeRuntime()
        self.clock = VirtualClock(NOW_S)
        runtime = cast(HaproxyRuntime, self.runtime)
        self.keeper = CertificateKeeper(self.certificate, self.key, str(self.target), runtime, self.clock)

    def spoil(self, spoil: Callable[[Path, Path], None]) -> None:
        self._good = Path(self.certificate).read_bytes(), Path(self.key).read_bytes()
        spoil(Path(self.certificate), Path(self.key))

    def mend(self) -> None:
        Path(self.certificate).write_bytes(self._good[0])
        Path(self.key).write_bytes(self._good[1])

    def renew(self, days: int = 90) -> str:
        write_pair(self.directory, datetime.fromtimestamp(self.clock.wall_s(), UTC) + timedelta(days=days))
        return load_certificate(self.certificate, self.key, self.clock.wall_s())


async def test_what_is_in_use_already_is_left_alone(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.keeper.look()
    os.utime(world.certificate)
    await world.keeper.look()
    assert world.runtime.pem == ""
    assert world.keeper.problem == ""


async def test_a_new_pair_is_taken_and_kept_for_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.keeper.look()
    renewed = world.renew()
    await world.keeper.look()
    assert world.runtime.pem == renewed == world.target.read_text()
    assert world.target.stat().st_mode & 0o777 == 0o600


async def test_a_broken_pair_changes_nothing_and_is_said_until_it_is_mended(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.keeper.look()
    world.spoil(foreign_key)
    await world.keeper.look()
    assert "is not the key of" in world.keeper.problem
    assert "earlier certificate stays" in world.keeper.problem
    assert world.target.read_text() == world.first
    world.mend()
    await world.keeper.look()
    assert world.keeper.problem == ""
    assert world.runtime.pem == ""


async def test_what_haproxy_refuses_is_not_written_and_what_it_misses_is_tried_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    renewed = world.renew()
    world.runtime.error = HaproxyUnavailable("not there")
    await world.keeper.look()
    assert world.keeper.problem == ""
    world.runtime.error = HaproxyRefused("commit ssl cert: key too small")
    await world.keeper.look()
    assert "key too small" in world.keeper.problem
    assert world.target.read_text() == world.first
    world.runtime.error = None
    await world.keeper.look()
    assert world.runtime.pem == "", "the same files are not tried for ever"
    os.utime(world.certificate)
    await world.keeper.look()
    assert world.runtime.pem == renewed


async def test_the_last_week_is_announced(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.renew(days=10)
    await world.keeper.look()
    assert world.keeper.problem == ""
    world.clock.advance(4 * 86_400)
    assert "expires in 6.0 days" in world.keeper.problem
