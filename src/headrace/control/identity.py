"""Which keys are valid now: those of the config and those of the key store, of the tenants that exist.

Carries out the commands about keys, for a controller and, when no system runs, for the CLI. Keys of tenants
that the config does not have are kept and do not count. Must not know HAProxy, routers or sockets.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from headrace.api.config import Config
from headrace.api.messages import AdminReply, CreateKey, KeyInfo, ListKeys, RevokeKey
from headrace.api.notation import TENANT_NAME
from headrace.control.key_store import KeyStore, StoredKey, state_directory
from headrace.errors import ConfigError

KeyCommand = CreateKey | ListKeys | RevokeKey
CONFIG_KEY_PREFIX = "config-"
"""Begins the ids of keys that the config lists."""
_SHOWN_HASH = 12
_log = logging.getLogger(__name__)


class Identity:
    """The keys of one system."""

    def __init__(self, directory: Path, lock_limit_s: float = 5.0) -> None:
        """directory: the state directory."""
        self._store = KeyStore(directory, lock_limit_s)
        self._signature: tuple[int, ...] | None = None
        self._stored: list[StoredKey] | None = None
        """None: the store cannot be read, so nobody knows which keys are valid."""
        self.error = ""
        """Why the store cannot be read."""
        self._admin_signature: tuple[int, ...] | None = None
        self.admin_key_hash = ""
        """SHA-256 of the admin API's key; empty: nobody gets in."""
        self._read()
        self._read_admin_key()

    def __repr__(self) -> str:
        return f"Identity({self._store}, {len(self._stored or ())} keys)"

    def refresh(self) -> bool:
        """Read the files again that another process changed. True if the keys are others than before."""
        stored, admin_key_hash = self._stored, self.admin_key_hash
        if self._store.signature() != self._signature:
            self._read()
        if self._store.admin_signature() != self._admin_signature:
            self._read_admin_key()
        is_changed = self._stored is not None and self._stored != stored
        return is_changed or self.admin_key_hash != admin_key_hash

    def valid_keys(self, config: Config) -> dict[str, str] | None:
        """Return SHA-256 -> tenant of each valid key. None: they are not known, and what was told before
        must stay as it is."""
        if not config.tenants:
            return {}
        if self._stored is None:
            return None
        keys = {key.sha256: key.tenant for key in self._stored if key.tenant in config.tenants}
        keys.update(config_keys(config))
        return keys

    def describe_keyless(self, config: Config) -> list[str]:
        """Return a line for each tenant that nobody can be."""
        keys = self.valid_keys(config)
        if keys is None:
            return []
        with_keys = set(keys.values())
        return [
            f"tenant {name} has no key yet; make one with: headrace keys create {name}"
            for name in config.tenants
            if name not in with_keys
        ]

    def obey(self, command: KeyCommand, config: Config | None, now_s: float) -> AdminReply:
        """Carry a command out. config: None if it is not known, and then neither are the tenants.

        now_s: wall-clock time. Raises ConfigError, and then nothing has changed.
        """
        match command:
            case CreateKey(tenant, name):
                check_tenant(tenant, config)
                key, stored = self._store.create(tenant, name, now_s)
                self._read()
                return AdminReply(key=key, keys=[_describe(stored)])
            case ListKeys(tenant):
                if tenant:
                    check_tenant(tenant, config)
                keys = self._list(tenant, config)
                return AdminReply(keys=keys, notes=_describe_inactive(keys, config))
            case RevokeKey(key_id):
                self._refuse_config_key(key_id, config)
                stored = self._store.revoke(key_id)
                self._read()
                return AdminReply(keys=[_describe(stored)])

    def _list(self, tenant: str, config: Config | None) -> list[KeyInfo]:
        self._read()
        if self._stored is None:
            raise ConfigError(self.error)
        keys = [_describe(stored) for stored in self._stored]
        if config is not None:
            keys += [
                KeyInfo(
                    f"{CONFIG_KEY_PREFIX}{key[:_SHOWN_HASH]}", owner, "", key[:_SHOWN_HASH], 0.0, "config"
                )
                for key, owner in config_keys(config).items()
            ]
        return [key for key in keys if tenant in ("", key.tenant)]

    def _refuse_config_key(self, key_id: str, config: Config | None) -> None:
        if key_id.startswith(CONFIG_KEY_PREFIX):
            raise ConfigError(
                f"{key_id[:40]} is a key of the config; remove it from its tenant's `keys` there, "
                "and apply the config"
            )

    def _read_admin_key(self) -> None:
        self._admin_signature = self._store.admin_signature()
        try:
            self.admin_key_hash = self._store.admin_key_hash()
        except ConfigError as error:
            self.admin_key_hash = ""
            _log.error("the admin API is closed: %s", error)

    def _read(self) -> None:
        self._signature = self._store.signature()
        try:
            self._stored, self.error = self._store.read(), ""
        except ConfigError as error:
            if str(error) != self.error:
                _log.error("the keys of `headrace keys create` cannot be read: %s", error)
            self._stored, self.error = None, str(error)


def open_identity(config: Config, lock_limit_s: float = 5.0) -> Identity:
    """Return the identity of a config's state directory. Raises ConfigError."""
    return Identity(state_directory(config.state_dir, os.environ), lock_limit_s)


def config_keys(config: Config) -> dict[str, str]:
    """Return SHA-256 -> tenant of the keys that the config lists."""
    return {
        key.removeprefix("sha256:"): name for name, tenant in config.tenants.items() for key in tenant.keys
    }


def check_tenant(name: str, config: Config | None) -> None:
    """Raise ConfigError unless the tenant exists; without a config, unless it could."""
    if config is None:
        if not TENANT_NAME.fullmatch(name):
            raise ConfigError(f"{name[:80]!r} cannot be a tenant's name")
    elif name not in config.tenants:
        known = ", ".join(config.tenants) or "none; add a `tenants` section to the config and apply it"
        raise ConfigError(f"tenant {name[:80]!r} does not exist; there are: {known}")


def _describe_inactive(keys: list[KeyInfo], config: Config | None) -> list[str]:
    gone = sorted({key.tenant for key in keys} - set(config.tenants)) if config is not None else []
    return [f"the config has no tenant {name}: its keys are kept and do not count" for name in gone]


def _describe(stored: StoredKey) -> KeyInfo:
    start = stored.sha256[:_SHOWN_HASH]
    return KeyInfo(stored.key_id, stored.tenant, stored.name, start, stored.created_s, "created")
