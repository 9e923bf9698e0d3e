"""Keys on disk: whole, private, locked, bounded, and never the keys themselves."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import stat
import threading
from pathlib import Path

import pytest

from headrace.control import key_store
from headrace.control.key_store import KeyStore, hash_key, state_directory
from headrace.errors import ConfigError


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "state" / "headrace", lock_limit_s=0.1)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_key_is_random_and_only_its_hash_is_kept(store: KeyStore) -> None:
    key, stored = store.create("acme", "laptop", 12.0)
    assert re.fullmatch(r"hr-[A-Za-z0-9_-]{43}", key)
    assert len(base64.urlsafe_b64decode(key.removeprefix("hr-") + "=")) == 32
    assert re.fullmatch(r"key-[0-9a-f]{8}", stored.key_id)
    assert (stored.tenant, stored.name, stored.created_s, stored.sha256) == (
        "acme",
        "laptop",
        12.0,
        hash_key(key),
    )
    assert key.removeprefix("hr-") not in store.path.read_text()
    assert store.create("acme", "", 13.0)[0] != key


def test_what_was_made_is_there_for_the_next_process_and_private(store: KeyStore) -> None:
    assert store.read() == []
    assert store.signature() is None
    assert not store.path.parent.exists(), "reading creates nothing"
    _, first = store.create("acme", "", 1.0)
    before = store.signature()
    _, second = store.create("small", "", 2.0)
    assert store.signature() != before
    assert KeyStore(store.path.parent).read() == [first, second]
    assert store.revoke(first.key_id) == first
    assert KeyStore(store.path.parent).read() == [second]
    assert mode_of(store.path.parent) == 0o700
    assert {mode_of(path) for path in store.path.parent.iterdir()} == {0o600}
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["keys.json", "keys.lock"]


def test_an_id_that_is_not_there_is_told(store: KeyStore) -> None:
    store.create("acme", "", 1.0)
    with pytest.raises(ConfigError, match="no key with the id 'key-00'; `headrace keys list`"):
        store.revoke("key-00")
    assert len(store.read()) == 1


@pytest.mark.parametrize("name", ["x" * 65, "two\nlines", "\x1b[31m"])
def test_a_name_that_could_not_be_shown_is_refused(store: KeyStore, name: str) -> None:
    with pytest.raises(ConfigError, match="64 printable characters"):
        store.create("acme", name, 1.0)


GOOD_KEY = {"key_id": "key-00000000", "tenant": "a", "name": "", "sha256": "0" * 64, "created_s": 1.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"format": 1, "keys": [{**GOOD_KEY, "surprise": 1}]}), "is damaged.*surprise"),
        (json.dumps({"format": 1, "keys": [{**GOOD_KEY, "sha256": "hr-clear"}]}), "is damaged.*a hash"),
        (json.dumps({"format": 1, "keys": [{**GOOD_KEY, "tenant": "a b"}]}), "is damaged.*'a b'"),
        (json.dumps({"format": 1, "keys": [GOOD_KEY, GOOD_KEY]}), "is damaged.*same id"),
        (json.dumps({"format": 2, "keys": []}), "format 2.*knows format 1 only"),
        ("\xff", "is damaged"),
    ],
)
def test_a_damaged_file_is_an_error_and_stays_as_it_is(store: KeyStore, text: str, words: str) -> None:
    store.path.parent.mkdir(0o700, parents=True)
    store.path.write_text(text, encoding="latin-1")
    store.path.chmod(0o600)
    for action in (store.read, lambda: store.create("a", "", 1.0), lambda: store.revoke("key-00000000")):
        with pytest.raises(ConfigError, match=words):
            action()
    assert store.path.read_text(encoding="latin-1") == text


def test_a_file_or_directory_that_others_can_use_is_refused(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create("acme", "", 1.0)
    store.path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 0640.*chmod 600"):
        store.read()
    store.path.chmod(0o600)
    store.path.parent.chmod(0o755)
    for action in (store.read, lambda: store.create("acme", "", 1.0)):
        with pytest.raises(ConfigError, match=r"mode 0755.*chmod 700"):
            action()
    store.path.parent.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(ConfigError, match="this is user 4242"):
        store.read()


def test_a_link_or_a_pipe_in_the_files_place_is_refused(store: KeyStore, tmp_path: Path) -> None:
    store.path.parent.mkdir(0o700, parents=True)
    (tmp_path / "other").write_text("{}")
    store.path.symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot be read"):
        store.read()
    store.path.unlink()
    os.mkfifo(store.path, 0o600)
    with pytest.raises(ConfigError, match="is damaged: it is not a file"):
        store.read()


def test_a_place_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used: Not a directory"):
        KeyStore(tmp_path / "file" / "headrace").create("a", "", 1.0)
    with pytest.raises(ConfigError, match="cannot be used: File exists"):
        KeyStore(tmp_path / "file").create("a", "", 1.0)
    with pytest.raises(ConfigError, match="is not a directory"):
        KeyStore(tmp_path / "file").read()


def test_a_full_disk_changes_nothing_and_leaves_nothing(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create("acme", "", 1.0)
    before = store.path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        store.create("acme", "", 2.0)
    assert store.path.read_bytes() == before
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["keys.json", "keys.lock"]


def test_two_writers_lose_nothing(store: KeyStore) -> None:
    patient = [KeyStore(store.path.parent, lock_limit_s=20.0) for _ in range(4)]

    def write(mine: KeyStore) -> None:
        for _ in range(5):
            mine.create("acme", "", 1.0)

    threads = [threading.Thread(target=write, args=(mine,)) for mine in patient]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.read()) == 20


def test_a_writer_that_hangs_is_not_waited_for_without_end(store: KeyStore) -> None:
    store.create("acme", "", 1.0)
    with (store.path.parent / "keys.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another process .* for 0\.1 s"):
            store.create("acme", "", 1.0)
        assert len(store.read()) == 1, "reading needs no lock"


def test_the_number_of_keys_is_bounded(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_store, "MAX_KEYS", 2)
    for _ in range(2):
        store.create("acme", "", 1.0)
    with pytest.raises(ConfigError, match="there are 2 keys, which is the limit"):
        store.create("acme", "", 1.0)


def test_the_state_directory_follows_the_setting_then_the_environment_then_the_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert state_directory("", {}) == Path("/home/me/.local/state/headrace")
    assert state_directory("", {"XDG_STATE_HOME": "relative"}) == Path("/home/me/.local/state/headrace")
    assert state_directory("", {"XDG_STATE_HOME": "/var/s"}) == Path("/var/s/headrace")
    assert state_directory("~/keys", {"XDG_STATE_HOME": "/var/s"}) == Path("/home/me/keys")


def test_the_admin_key_is_made_once_private_and_replaced_on_wish(store: KeyStore) -> None:
    assert store.admin_key_hash() == ""
    assert store.admin_signature() is None
    store.create_admin_key()
    first = store.admin_key_hash()
    assert mode_of(store.admin_key_path()) == 0o600
    assert hash_key(store.admin_key_path().read_text().strip()) == first
    store.create_admin_key()
    assert store.admin_key_hash() == first
    store.create_admin_key(replace=True)
    assert store.admin_key_hash() not in ("", first)
    assert store.read() == [], "it is no tenant's key"


@pytest.mark.parametrize("text", ["", "short", "has a space in it and is long enough", "\xff" * 40])
def test_an_admin_key_that_is_none_is_refused(store: KeyStore, text: str) -> None:
    store.create_admin_key()
    store.admin_key_path().write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"admin\.key: "):
        store.admin_key_hash()


def test_an_admin_key_that_others_can_read_is_refused(store: KeyStore) -> None:
    store.create_admin_key()
    store.admin_key_path().chmod(0o644)
    with pytest.raises(ConfigError, match=r"mode 0644.*chmod 600"):
        store.admin_key_hash()
