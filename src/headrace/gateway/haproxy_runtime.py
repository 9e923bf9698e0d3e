"""HAProxy's runtime API: one command at a time over its UNIX sockets, each with limits of time and size.

Owns the commands' grammar and what their answers mean. Must not know which servers are wanted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from headrace.errors import HeadraceError, text_of
from headrace.gateway.server import Server

MAX_REPLY_BYTES = 4 * 1024 * 1024
COMMAND_TIMEOUT_S = 2.0
RELOAD_TIMEOUT_S = 10.0
MAP_CHUNK = 300
"""Entries per command: a command must fit into HAProxy's buffer."""


class HaproxyUnavailable(HeadraceError):
    """HAProxy does not answer on its socket: it is not running, restarting, or stopped."""


class HaproxyGone(HaproxyUnavailable):
    """Nobody listens on its socket: it is not running, or it stopped listening to end."""


class HaproxyRefused(HeadraceError):
    """HAProxy answered that it did not do it."""


class ServerState(NamedTuple):
    """One server as HAProxy has it."""

    path: str
    """`backend/server`."""
    address: str
    """`host:port`."""
    is_in_maintenance: bool
    is_up: bool


class HaproxyRuntime:
    """Commands to the running HAProxy. Every method raises HaproxyUnavailable or HaproxyRefused."""

    def __init__(self, runtime_socket: str, master_socket: str) -> None:
        self._runtime_socket = runtime_socket
        self._master_socket = master_socket
        self._lock = asyncio.Lock()

    async def show_servers(self) -> dict[str, ServerState]:
        """Return all servers by path."""
        return parse_servers_state(await self._command("show servers state"))

    async def add_server(self, server: Server) -> None:
        """Create a server; it is in maintenance until `enable_server`."""
        reply = await self._command(f"add server {server.path} {server.address} {server.options}")
        _expect(reply, "New server registered")

    async def enable_server(self, path: str) -> None:
        """Turn health checks on and let the server take requests."""
        _expect(await self._command(f"enable health {path}"), "")
        _expect(await self._command(f"enable server {path}"), "")

    async def disable_server(self, path: str) -> None:
        """Put a server in maintenance: it takes no new request; open ones go on."""
        _expect(await self._command(f"set server {path} state maint"), "")

    async def delete_server(self, path: str) -> bool:
        """Delete a server in maintenance. False while it still has open requests or connections."""
        reply = await self._command(f"del server {path}")
        if "Server deleted" in reply or "No such server" in reply:
            return True
        if "existing streams" in reply or "connections" in reply or "still has" in reply:
            return False
        raise HaproxyRefused(f"del server {path}: {reply.strip()}")

    async def set_certificate(self, path: str, pem: str) -> None:
        """Replace the certificate that HAProxy loaded from `path`. pem: without blank lines; new connections
        get it. Source: HAProxy management guide, 9.3, `set ssl cert`."""
        reply = await self._command(f"set ssl cert {path} <<\n{pem}")
        if "Transaction" not in reply:
            raise HaproxyRefused(f"set ssl cert: {reply.strip()[:500]}")
        reply = await self._command(f"commit ssl cert {path}")
        if "Success" not in reply:
            await self._command(f"abort ssl cert {path}")
            raise HaproxyRefused(f"commit ssl cert: {reply.strip()[:500]}")

    async def old_workers(self) -> list[int]:
        """Return the processes from before a reload that still finish what they have."""
        return parse_old_workers(await self._ask_master("show proc"))

    async def show_map(self, path: str, worker: int = 0) -> dict[str, str]:
        """Return the entries of the map that was read from the file `path`. worker: an old one's process."""
        if worker:
            return parse_map(await self._ask_master(f"@!{worker} show map {path}"))
        return parse_map(await self._command(f"show map {path}"))

    async def add_to_map(self, path: str, entries: Mapping[str, str]) -> None:
        """Add entries, whose keys the map does not have yet."""
        lines = [f"{key} {value}\n" for key, value in entries.items()]
        for start in range(0, len(lines), MAP_CHUNK):
            payload = "".join(lines[start : start + MAP_CHUNK])
            _expect(await self._command(f"add map {path} <<\n{payload}"), "")

    async def delete_from_map(self, path: str, keys: Sequence[str], worker: int = 0) -> None:
        """Delete entries; those that are gone already do not matter. worker: as for `show_map`."""
        prefix = f"@!{worker} " if worker else ""
        ask = self._ask_master if worker else self._command
        for start in range(0, len(keys), MAP_CHUNK):
            commands = ";".join(f"{prefix}del map {path} {key}" for key in keys[start : start + MAP_CHUNK])
            reply = await ask(commands)
            _expect(reply.replace("Key not found.", ""), "")

    async def reload(self) -> None:
        """Make the master load its config again in a new worker; the old one finishes its requests."""
        reply = await self._command("reload", self._master_socket, RELOAD_TIMEOUT_S)
        if "Success=1" not in reply:
            raise HaproxyRefused(f"reload: {reply.strip()[:2000]}")

    async def _ask_master(self, command: str) -> str:
        return await self._command(f"{command};quit", self._master_socket)  # it would wait for another one

    async def _command(self, command: str, socket: str = "", timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        async with self._lock:
            try:
                async with asyncio.timeout(timeout_s):
                    return await _exchange(socket or self._runtime_socket, command)
            except (OSError, TimeoutError) as error:
                reason = text_of(error)
                is_gone = isinstance(error, ConnectionRefusedError | FileNotFoundError)
                kind = HaproxyGone if is_gone else HaproxyUnavailable
                raise kind(f"{command.split()[0]}: {reason}") from error


async def _exchange(socket: str, command: str) -> str:
    reader, writer = await asyncio.open_unix_connection(socket)
    try:
        if writer.is_closing():
            raise ConnectionResetError("it ended the connection at once")
        writer.write(command.encode("ascii") + b"\n")
        await writer.drain()
        reply = bytearray()
        while data := await reader.read(65_536):
            reply += data
            if len(reply) > MAX_REPLY_BYTES:
                raise HaproxyRefused(
                    f"{command.split()[0]}: the answer is longer than {MAX_REPLY_BYTES} bytes"
                )
        return reply.decode("utf-8", "replace")
    finally:
        writer.transport.abort()


def _expect(reply: str, wanted: str) -> None:
    """Raise HaproxyRefused unless the reply is the wanted one; empty: a command that says nothing."""
    text = reply.strip()
    if (wanted and wanted not in text) or (not wanted and text):
        raise HaproxyRefused(text or "empty answer")


def parse_old_workers(text: str) -> list[int]:
    """Read `show proc` of the master (HAProxy management guide, 9.4): processes, in sections."""
    old: list[int] = []
    is_old = False
    for line in text.splitlines():
        if line.startswith("#"):
            is_old = line.strip() == "# old workers"
        elif is_old and line.split()[:1] and line.split()[0].isdigit():
            old.append(int(line.split()[0]))
    return old


def parse_map(text: str) -> dict[str, str]:
    """Read `show map FILE` (HAProxy management guide, 9.3): a reference, a key and a value per line.

    Raises HaproxyRefused if it is not of that form: HAProxy has no such map.
    """
    entries: dict[str, str] = {}
    for line in text.splitlines():
        fields = line.split(" ", 2)
        if len(fields) == 3 and fields[0].startswith("0x"):
            entries[fields[1]] = fields[2]
        elif line.strip():
            raise HaproxyRefused(f"show map: {line.strip()[:200]}")
    return entries


def parse_servers_state(text: str) -> dict[str, ServerState]:
    """Read `show servers state` (HAProxy management guide, 9.3): a version, a header, one line per server.

    Lines that are not understood are left out.
    """
    lines = text.splitlines()
    header = next((line for line in lines if line.startswith("# ")), "")
    columns = {name: index for index, name in enumerate(header.removeprefix("# ").split())}
    wanted = ["be_name", "srv_name", "srv_addr", "srv_port", "srv_op_state", "srv_admin_state"]
    if any(name not in columns for name in wanted):
        return {}
    positions = [columns[name] for name in wanted]
    servers: dict[str, ServerState] = {}
    for line in lines:
        fields = line.split()
        if line.startswith("#") or len(fields) <= max(positions):
            continue
        backend, name, host, port, operation, administration = (fields[index] for index in positions)
        if not operation.isdigit() or not administration.isdigit():
            continue
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        path = f"{backend}/{name}"
        servers[path] = ServerState(path, address, int(administration) != 0, int(operation) != 0)
    return servers
