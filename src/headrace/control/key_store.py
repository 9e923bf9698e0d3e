"""The API keys that were made at run time, in one file of the state directory: hashes, never the keys.

Owns the file's place, format, permissions and lock. A change is written whole or not at all (a new file,
synced, renamed over the old one); a file that is damaged or that others could touch is an error and stays as
it is. Must not know which tenants there are, or who asks for keys.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

import msgspec

from headrace.api.notation import TENANT_NAME
from headrace.errors import ConfigError

FILE_NAME = "keys.json"
ADMIN_FILE_NAME = "admin.key"
FORMAT = 1
MAX_KEYS = 20_000
"""All of them travel to each router in one message, and are written anew with every change."""
MAX_NAME_LENGTH = 64
MIN_ADMIN_KEY_LENGTH = 20
KEY_PREFIX = "hr-"
_MAX_FILE_BYTES = 16 * 1024 * 1024
_LOCK_POLL_S = 0.02
_HASH = re.compile(r"[0-9a-f]{64}")
_KEY_ID = re.compile(r"key-[0-9a-f]{8}")


class StoredKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key as it is kept."""

    key_id: str
    tenant: str
    name: str
    sha256: str
    created_s: float
    """Wall-clock time."""


class UnknownKey(ConfigError):
    """There is no key with this id."""


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file holds."""

    format: int
    keys: list[StoredKey]


def hash_key(key: str) -> str:
    """Return what is kept of a key. It has 256 random bits: a plain hash cannot be guessed back."""
    return sha256(key.encode()).hexdigest()


def _new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def state_directory(setting: str, environment: Mapping[str, str]) -> Path:
    """Return the directory that `state_dir` means; empty: the user's own. Raises ConfigError."""
    if setting:
        return Path(setting).expanduser().absolute()
    base = environment.get("XDG_STATE_HOME", "")
    if os.path.isabs(base):  # a relative one is to be ignored (XDG Base Directory Specification)
        return Path(base) / "headrace"
    try:
        return Path.home() / ".local" / "state" / "headrace"
    except RuntimeError:
        raise ConfigError(
            "state_dir: this user has no home directory; set state_dir to a directory"
        ) from None


class KeyStore:
    """The keys of one state directory. Every method raises ConfigError, and then nothing has changed."""

    def __init__(self, directory: Path, lock_limit_s: float = 5.0) -> None:
        """lock_limit_s: longest wait for another process that is changing the keys."""
        self._directory = directory
        self._lock_limit_s = lock_limit_s
        self.path = directory / FILE_NAME

    def __repr__(self) -> str:
        return f"KeyStore({self.path})"

    def read(self) -> list[StoredKey]:
        """Return all keys, oldest first; none if there is no file yet. Creates nothing."""
        try:
            check_directory(self._directory)
            data = _read_private(self.path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        try:
            file = msgspec.json.decode(data, type=KeyFile)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _damaged(self.path, str(error)) from None
        if file.format != FORMAT:
            raise ConfigError(
                f"{self.path}: has format {file.format}, and this headrace knows format {FORMAT} only; "
                "use the headrace that wrote it, or another state_dir"
            )
        _check_keys(self.path, file.keys)
        return file.keys

    def signature(self) -> tuple[int, ...] | None:
        """Return something that changes when the file does; None: there is no file."""
        return _signature(self.path)

    def admin_signature(self) -> tuple[int, ...] | None:
        """The same of the admin key's file."""
        return _signature(self.admin_key_path())

    def create(self, tenant: str, name: str, now_s: float) -> tuple[str, StoredKey]:
        """Make a key; return it in clear, this once, and what is kept of it."""
        if len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise ConfigError(f"the key's name must have at most {MAX_NAME_LENGTH} printable characters")
        with self._locked():
            keys = self.read()
            if len(keys) >= MAX_KEYS:
                raise ConfigError(f"there are {len(keys)} keys, which is the limit; revoke those not in use")
            taken = {key.key_id for key in keys}
            while (key_id := f"key-{secrets.token_hex(4)}") in taken:
                pass
            key = _new_key()
            stored = StoredKey(key_id, tenant, name, hash_key(key), round(now_s, 3))
            self._write([*keys, stored])
        return key, stored

    def revoke(self, key_id: str) -> StoredKey:
        """Remove a key; return what was kept of it."""
        with self._locked():
            keys = self.read()
            found = next((key for key in keys if key.key_id == key_id), None)
            if found is None:
                raise UnknownKey(
                    f"there is no key with the id {key_id[:40]!r}; `headrace keys list` shows all ids"
                )
            self._write([key for key in keys if key is not found])
        return found

    def admin_key_path(self) -> Path:
        return self._directory / ADMIN_FILE_NAME

    def admin_key_hash(self) -> str:
        """Return the hash of the admin API's key; empty if there is none yet."""
        path = self.admin_key_path()
        try:
            check_directory(self._directory)
            key = _read_private(path).decode("ascii").strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
        if len(key) < MIN_ADMIN_KEY_LENGTH or not key.isprintable() or " " in key:
            raise ConfigError(
                f"{path}: holds no key of at least {MIN_ADMIN_KEY_LENGTH} characters; "
                "`headrace keys admin --rotate` makes a new one"
            )
        return hash_key(key)

    def create_admin_key(self, *, replace: bool = False) -> None:
        """Make the admin API's key in its file. replace: even if there is one."""
        with self._locked():
            if replace or not self.admin_key_path().exists():
                try:
                    write_private(self.admin_key_path(), f"{_new_key()}\n".encode())
                except OSError as error:
                    raise ConfigError(
                        f"{self.admin_key_path()}: cannot be written: {error.strerror or error}"
                    ) from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the only right to change the file. The lock is its own file: the other one is replaced."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_directory(self._directory)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            lock = os.open(self._directory / "keys.lock", flags, 0o600)
        except OSError as error:
            raise ConfigError(f"{self._directory}: cannot be used: {error.strerror}") from None
        try:
            self._wait_for(lock)
            yield
        finally:
            os.close(lock)

    def _wait_for(self, lock: int) -> None:
        deadline_s = time.monotonic() + self._lock_limit_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise ConfigError(
                        f"another process has been changing the keys in {self._directory} for "
                        f"{self._lock_limit_s:g} s; try again, or end it"
                    ) from None
            time.sleep(_LOCK_POLL_S)

    def _write(self, keys: list[StoredKey]) -> None:
        data = msgspec.json.format(msgspec.json.encode(KeyFile(FORMAT, keys)), indent=1) + b"\n"
        try:
            write_private(self.path, data)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror or error}") from None


def check_directory(directory: Path) -> None:
    """Raise ConfigError unless `directory` is this user's alone, FileNotFoundError if there is none."""
    status = directory.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{directory}: is not a directory; set state_dir to one")
    _check_owner(directory, status, 0o700)


def write_private(path: Path, data: bytes) -> None:
    """Replace `path` by `data` with mode 0600, so that a crash at any moment leaves a whole file.

    Raises OSError.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with open(os.open(part, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # the new name itself must survive, too
    finally:
        os.close(directory)


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode, status.st_uid)


def _read_private(path: Path) -> bytes:
    """Return a file's content. Raises OSError; ConfigError if others could have read or written it."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE_BYTES:
            raise _damaged(path, f"it is not a file of at most {_MAX_FILE_BYTES} bytes")
        _check_owner(path, status, 0o600)
        return file.read(_MAX_FILE_BYTES)


def _check_owner(path: Path, status: os.stat_result, mode: int) -> None:
    if status.st_uid != os.getuid():
        raise ConfigError(
            f"{path}: belongs to user {status.st_uid}, and this is user {os.getuid()}; "
            "set state_dir to a directory of your own"
        )
    if status.st_mode & 0o077:
        raise ConfigError(
            f"{path}: others may use it (mode {stat.S_IMODE(status.st_mode):04o}); it decides who gets in, "
            f"so it must be yours alone. Look whether it was changed, then: chmod {mode:o} {path}"
        )


def _check_keys(path: Path, keys: list[StoredKey]) -> None:
    if len(keys) > MAX_KEYS:
        raise _damaged(path, f"it has {len(keys)} keys, and {MAX_KEYS} is the limit")
    ids, hashes = {key.key_id for key in keys}, {key.sha256 for key in keys}
    if len(ids) < len(keys) or len(hashes) < len(keys):
        raise _damaged(path, "two of its keys have the same id or hash")
    for key in keys:
        if not (_KEY_ID.fullmatch(key.key_id) and _HASH.fullmatch(key.sha256)):
            raise _damaged(path, f"key {key.key_id[:40]!r} has an id or a hash that is none")
        if not TENANT_NAME.fullmatch(key.tenant):
            raise _damaged(
                path, f"key {key.key_id} is of {key.tenant[:80]!r}, which cannot be a tenant's name"
            )


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path}: is damaged: {why}. It is left as it is; restore it from a copy, or move it away (then all "
        "keys that were made with `headrace keys create` stop working)"
    )
