"""The end of a host that was given up because it was silent: it may live on, and be reachable again.

Owns how it is ended then: its processes are asked to leave, because routers that heard of them again may have
sent them requests meanwhile. Must not know: what the processes do, or what took their place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec

from headrace.api.messages import StopProcess
from headrace.fabric.cluster import Cluster, HostLost, HostSilent
from headrace.fabric.host_messages import HostReport

SILENT_LIMIT_S = 20.0
"""A host that is silent for so long after it was given up is ended as it is: what hangs must not keep its
place, and what is cut off for longer was replaced meanwhile, and gets no requests when it is back."""
LEAVE_LIMIT_S = 30.0
"""For its processes to finish or hand over what they have; then they are killed."""
CALL_LIMIT_S = 5.0
_POLL_S = 0.2
_log = logging.getLogger(__name__)


async def retire(cluster: Cluster, key: str) -> bool:
    """End the host `key` as soon as it can be reached or is lost for good, and give its place back. Returns
    whether it was heard of again. Raises ClusterUnavailable: then its place is not given back."""
    was_heard = False
    with contextlib.suppress(HostLost, TimeoutError):
        async with asyncio.timeout(SILENT_LIMIT_S):
            report = await _hear(cluster, key)
        was_heard = True
        async with asyncio.timeout(LEAVE_LIMIT_S):
            await _empty(cluster, key, report)
    await cluster.release(key)
    return was_heard


async def _hear(cluster: Cluster, key: str) -> HostReport:
    """Return the host's first word after its silence. Raises HostLost, TimeoutError."""
    while True:
        with contextlib.suppress(HostSilent):
            answer = await cluster.call(key, "describe", limit_s=CALL_LIMIT_S)
            return msgspec.msgpack.decode(answer, type=HostReport)


async def _empty(cluster: Cluster, key: str, report: HostReport) -> None:
    """Have its processes leave, and wait until they have. Raises HostLost, TimeoutError."""
    names = [process.name for process in report.processes]
    if names:
        _log.info("%s is heard of again after it was given up; told to leave: %s", key, ", ".join(names))
    for name in names:
        with contextlib.suppress(HostSilent):  # what was not told is ended with its host
            command = msgspec.msgpack.encode(StopProcess(name, LEAVE_LIMIT_S))
            await cluster.call(key, "obey", command, limit_s=CALL_LIMIT_S)
    while report.processes and not report.error:
        await asyncio.sleep(_POLL_S)
        report = await _hear(cluster, key)
