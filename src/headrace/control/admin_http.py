"""The admin API over HTTP: the commands of the CLI as JSON, on a UNIX socket that HAProxy alone relays to.

Whoever may open the socket is believed: HAProxy has checked the admin key, and nobody but the owner of the
system gets past the file's mode. Must not know how commands are carried out, or keys beyond what replies
show.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headrace.api.config_loader import parse_config
from headrace.api.messages import (
    AdminCommand,
    AdminReply,
    ApplyConfig,
    CreateKey,
    GetStatus,
    ListKeys,
    RevokeKey,
    ScaleEndpoint,
)
from headrace.api.openai import describe_error
from headrace.control.key_store import UnknownKey
from headrace.control.preflight import check_models
from headrace.errors import (
    ConfigError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    RequestError,
)
from headrace.private_socket import bind_private_socket

PREFIX = "/admin/v1"
MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_CONNECTIONS = 64
_STOP_LIMIT_S = 2.0

Obey = Callable[[AdminCommand], AdminReply]
Endpoint = Callable[[Request], Awaitable[Response]]


class KeyWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant: str
    name: str = ""


class ScaleWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    endpoint: str
    replicas: int


class AdminApi:
    """The API's answers. obey: carries a command out; raises ConfigError."""

    def __init__(self, obey: Obey) -> None:
        self._obey = obey

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route(f"{PREFIX}/status", self._status, methods=["GET"]),
                Route(f"{PREFIX}/keys", self._list_keys, methods=["GET"]),
                Route(f"{PREFIX}/keys", self._create_key, methods=["POST"]),
                Route(f"{PREFIX}/keys/{{key_id}}", self._revoke_key, methods=["DELETE"]),
                Route(f"{PREFIX}/scale", self._scale, methods=["POST"]),
                Route(f"{PREFIX}/apply", self._apply, methods=["POST"]),
            ],
            exception_handlers={
                RequestError: _refuse,
                ConfigError: _refuse_config,
                HTTPException: _refuse_path,
            },
        )

    async def _status(self, request: Request) -> Response:
        return _answer(self._obey(GetStatus()).status)

    async def _list_keys(self, request: Request) -> Response:
        reply = self._obey(ListKeys(request.query_params.get("tenant", "")))
        return _answer({"object": "list", "data": reply.keys, "notes": reply.notes})

    async def _create_key(self, request: Request) -> Response:
        wish = await _read(request, KeyWish)
        reply = self._obey(CreateKey(wish.tenant, wish.name))
        return _answer({"key": reply.key, **msgspec.to_builtins(reply.keys[0])}, 201)

    async def _revoke_key(self, request: Request) -> Response:
        reply = self._obey(RevokeKey(request.path_params["key_id"]))
        return _answer({"revoked": True, **msgspec.to_builtins(reply.keys[0])})

    async def _scale(self, request: Request) -> Response:
        wish = await _read(request, ScaleWish)
        return _answer({"notes": self._obey(ScaleEndpoint(wish.endpoint, wish.replicas)).notes})

    async def _apply(self, request: Request) -> Response:
        tree = await _read(request, dict[str, Any])
        config = parse_config(tree, source="config")
        checked = await asyncio.to_thread(check_models, config)  # looks for the models' files
        return _answer({"notes": self._obey(ApplyConfig(checked.model_dump_json())).notes})


async def serve_admin(path: str, obey: Obey) -> None:
    """Serve the API on a UNIX socket of mode 0600 until cancelled. Raises OSError."""
    config = uvicorn.Config(
        AdminApi(obey).app(),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[bind_private_socket(path)]))
    try:
        await asyncio.shield(serving)
    finally:
        server.should_exit = True
        await asyncio.wait([serving], timeout=_STOP_LIMIT_S)
        serving.cancel()
        _unlink(path)


class _Server(uvicorn.Server):
    """uvicorn inside a process that has its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


async def _read(request: Request, kind: Any) -> Any:
    """Return the body, a JSON text, as `kind`. Raises InvalidRequest and PayloadTooLarge."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise PayloadTooLarge(f"the body is longer than {MAX_BODY_BYTES} bytes, the limit")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not what is expected here: {error}", code="invalid_body") from None


def _answer(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _answer(describe_error(error), error.status)


async def _refuse_config(request: Request, error: Exception) -> Response:
    if isinstance(error, UnknownKey):
        return await _refuse(request, NotFound(str(error), code="key_not_found"))
    return await _refuse(request, InvalidRequest(str(error), code="invalid_config"))


async def _refuse_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        refusal: RequestError = MethodNotAllowed(f"this path does not take {request.method}; send {allowed}")
    else:
        refusal = NotFound(
            f"there is no such path; paths are {PREFIX}/status, keys, keys/ID, scale, apply", code="not_found"
        )
    return _answer(describe_error(refusal), error.status_code)
