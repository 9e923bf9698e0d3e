"""Rank 1 of an engine in this process, in a host of its own that a real Ray cluster placed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from headrace.api.messages import NodeNeeds, ProcessSpec, StartProcess
from headrace.api.run_paths import PYTHON_PLACEHOLDER, RUN_DIR_PLACEHOLDER, rank_socket_path
from headrace.engine.workers.group import RankStarter
from headrace.engine.workers.placed import Lobby
from headrace.fabric.cluster import ClusterUnavailable
from headrace.fabric.host_keys import further_keys, make_key
from headrace.fabric.host_messages import HostReport, Membership
from headrace.fabric.ray_cluster import RayCluster

START_LIMIT_S = 60.0
SYSTEM = "benchmark"
KEY = make_key("chat-1", "1", 2)
HEAD = ("--head", "--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=80000000")


class RayMissing(Exception):
    """There is no Ray to be placed by."""


@contextlib.contextmanager
def rank_placed_by_ray() -> Iterator[RankStarter]:
    """Start a cluster of one node, and reserve two hosts there; rank 1 is started in the second. The first is
    this process's, and stays empty. Everything of it is gone at the end. Raises RayMissing."""
    directory = Path(tempfile.mkdtemp(prefix="hr-", dir="/tmp"))  # sockets need short paths
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *HEAD, "--num-cpus=2"]
    # Ray reads them when it is imported, here, too.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, "TMPDIR": str(directory), "RAY_USAGE_STATS_ENABLED": "0"}
    with open(directory / "ray.log", "wb") as log:
        head = subprocess.Popen(
            [*command, f"--port={port}", f"--temp-dir={directory}/ray", "--node-ip-address=127.0.0.1"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    loop = asyncio.new_event_loop()
    try:
        cluster = loop.run_until_complete(_connect(f"127.0.0.1:{port}", head))
        try:
            run_dir = loop.run_until_complete(_start_holder(cluster))
            with Lobby(rank_socket_path(run_dir, "chat-1")) as lobby:
                yield lobby.start_rank
        finally:
            loop.run_until_complete(cluster.release(KEY))
            cluster.close()
    finally:
        loop.close()
        head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


async def _connect(address: str, head: subprocess.Popen[bytes]) -> RayCluster:
    deadline_s = time.monotonic() + START_LIMIT_S
    while True:
        try:
            return await RayCluster.connect(SYSTEM, address)
        except ClusterUnavailable as error:
            if head.poll() is not None or time.monotonic() > deadline_s:
                raise RayMissing(str(error)) from error
            await asyncio.sleep(0.5)


async def _start_holder(cluster: RayCluster) -> str:
    """Have the second host hold rank 1; return the run directory of both."""
    needs = NodeNeeds({"CPU": 2.0})
    await cluster.reserve(KEY, needs, "", [])
    async with asyncio.timeout(START_LIMIT_S):
        while not (await cluster.reservation(KEY)).node_id:  # noqa: ASYNC110, Ray tells by being asked
            await asyncio.sleep(0.05)
    second = further_keys(KEY)[0]
    for key in (KEY, second):
        await cluster.start_host(key, needs, Membership(b"", cluster.own_address))
    answer = await cluster.call(second, "describe", limit_s=START_LIMIT_S)
    report = msgspec.msgpack.decode(answer, type=HostReport)
    if report.error:
        raise RayMissing(report.error)
    path = rank_socket_path(RUN_DIR_PLACEHOLDER, "chat-1")
    argv = [PYTHON_PLACEHOLDER, "-P", "-m", "headrace.engine.workers.holder", path, "1"]
    holder = ProcessSpec("chat-1-rank-1", argv, is_restarted=True)
    await cluster.call(second, "obey", msgspec.msgpack.encode(StartProcess(holder)), limit_s=START_LIMIT_S)
    return report.run_dir
