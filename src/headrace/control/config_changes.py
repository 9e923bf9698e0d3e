"""What an applied config changes: what it may not, and what people are told of the rest. Pure.

Must not know how changes are carried out.
"""

from __future__ import annotations

from collections.abc import Mapping

from headrace.api.config import Config
from headrace.errors import ConfigError

_FIXED_GATEWAY_FIELDS = (
    "bind",
    "admin_bind",
    "count",
    "placement",
    "metrics_bind",
    "max_connections",
    "num_threads",
    "tls",
)


def keep_address(new: Config, old: Config) -> Config:
    """The gateway's address and size are set when it starts; port 0 means the one it has."""
    for field in ("bind", "admin_bind"):
        before: str = getattr(old.gateway, field)
        host, _, port = getattr(new.gateway, field).rpartition(":")
        if port == "0" and host == before.rpartition(":")[0]:
            new = new.model_copy(update={"gateway": new.gateway.model_copy(update={field: before})})
    if new.launcher == "local":  # not said: `headrace up` may have got it as an option
        new = new.model_copy(update={"launcher": old.launcher})
    new = new.model_copy(update={"ray": old.ray})
    if not new.state_dir:
        new = new.model_copy(update={"state_dir": old.state_dir})
    problems = [
        f"gateway.{field}: is {getattr(old.gateway, field)!r} and cannot become "
        f"{getattr(new.gateway, field)!r} while the system runs; stop it and start it with the new config"
        for field in _FIXED_GATEWAY_FIELDS
        if getattr(new.gateway, field) != getattr(old.gateway, field)
    ]
    if new.launcher != old.launcher:
        problems.append(
            f"launcher: is {old.launcher} and cannot become {new.launcher} while the system runs; "
            "stop it and start it with the new config"
        )
    if new.state_dir != old.state_dir:
        problems.append(
            f"state_dir: is {old.state_dir!r} and cannot become {new.state_dir!r} while the system runs; "
            "stop it and start it with the new config"
        )
    if problems:
        raise ConfigError(problems)
    return new


def describe_changes(old: Config, new: Config, versions: Mapping[str, str]) -> list[str]:
    """Return what changes, one line each. versions: what follows where a version changes, by endpoint."""
    notes = [f"{name}: removed; its replicas drain" for name in old.endpoints if name not in new.endpoints]
    for name, endpoint in new.endpoints.items():
        before = old.endpoints.get(name)
        if before is None:
            notes.append(f"{name}: added with {endpoint.replicas.min} replicas")
            continue
        if before.replicas != endpoint.replicas:
            notes.append(
                f"{name}: replicas {before.replicas.min} to {before.replicas.max} -> "
                f"{endpoint.replicas.min} to {endpoint.replicas.max}"
            )
        if name in versions:
            notes.append(f"{name}: {versions[name]}")
        elif before.queue != endpoint.queue:
            notes.append(f"{name}: queue limits changed")
    notes += _describe_tenants(old, new)
    return notes or ["nothing changed"]


def _describe_tenants(old: Config, new: Config) -> list[str]:
    notes = [
        f"tenant {name}: removed; its keys stop working" for name in old.tenants if name not in new.tenants
    ]
    notes += [f"tenant {name}: added" for name in new.tenants if name not in old.tenants]
    notes += [
        f"tenant {name}: changed"
        for name in new.tenants
        if name in old.tenants and new.tenants[name] != old.tenants[name]
    ]
    if bool(old.tenants) != bool(new.tenants):
        notes.append(f"the gateway {'asks for keys' if new.tenants else 'takes requests without keys'} now")
    return notes
