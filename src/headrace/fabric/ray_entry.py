"""The way into a Ray cluster: is the right Ray installed, where is the cluster, does it let us in.

Owns these checks, which end within seconds where Ray itself takes long, and Ray's errors in one line.
Must not know: what is done on the cluster.
"""

from __future__ import annotations

import importlib.metadata
import os
import socket

from headrace.api.notation import split_host_port
from headrace.errors import text_of
from headrace.fabric.cluster import ClusterUnavailable

RAY_VERSION = "2.60"
REACH_LIMIT_S = 4.0
_MAX_REASON_CHARACTERS = 400


def reason_of(error: BaseException) -> str:
    """Return what matters of one of Ray's errors, in one line: they have many."""
    text = text_of(error)
    for mark in ("The actor is dead because ", "ModuleNotFoundError: ", "Version mismatch: "):
        if mark in text:
            text = mark + text.split(mark, 1)[1]
            break
    line = " ".join(text.split())
    return line if len(line) <= _MAX_REASON_CHARACTERS else line[:_MAX_REASON_CHARACTERS] + "…"


def check_installed() -> None:
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise ClusterUnavailable("ray is not installed; pip install headrace[ray]") from None
    if not version.startswith(f"{RAY_VERSION}."):
        raise ClusterUnavailable(
            f"ray {version} is installed, and headrace is made for {RAY_VERSION}; "
            "pip install headrace[ray], with the same version on the cluster"
        )


def resolve_address(address: str) -> str:
    """Return host:port of the cluster's head."""
    if address not in ("", "auto"):
        return address
    import ray._private.services as services

    found = os.environ.get("RAY_ADDRESS", "")
    if found and found != "auto":
        return found
    try:
        return str(services.canonicalize_bootstrap_address_or_die("auto"))
    except (ConnectionError, ValueError):
        raise ClusterUnavailable(
            "no Ray cluster runs on this machine. Start one (ray start --head), or say where it is: "
            "--address HOST:PORT, or ray.address in the config"
        ) from None


def why_unreachable(address: str) -> str:
    """Return why nobody can be connected to there; empty: somebody can. Takes `REACH_LIMIT_S` at most: Ray
    itself takes long to say that nobody listens."""
    host, port = split_host_port(address, "ray.address")
    try:
        socket.create_connection((host, port), REACH_LIMIT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def check_reachable(address: str) -> None:
    """Raise ClusterUnavailable unless somebody listens there."""
    if reason := why_unreachable(address):
        raise ClusterUnavailable(
            f"the Ray cluster at {address} cannot be reached: {reason}. Check --address "
            "(host:port of the head, usually port 6379), and that the cluster runs"
        )


def check_token(address: str) -> None:
    """Ray's own connection tries for 20 s and then says only that it failed."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RayError

    try:
        GcsClient(address=address)
    except AuthenticationError:
        mode = os.environ.get("RAY_AUTH_MODE", "") or "not set"
        raise ClusterUnavailable(
            f"the Ray cluster at {address} does not accept our token (RAY_AUTH_MODE is {mode}). Put the "
            "cluster's token into ~/.ray/auth_token, or set RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        ) from None
    except (RayError, RuntimeError, OSError) as error:
        raise ClusterUnavailable(f"the Ray cluster at {address} cannot be used: {reason_of(error)}") from None
