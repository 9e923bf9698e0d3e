"""Which path does what: the front's HTTP interface.

Owns paths, methods and the small answers; generation is `headrace.replica.generation`'s.
Must not know sockets or the engine's process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import unquote

import msgspec

import headrace
from headrace.api.messages import ReplicaState
from headrace.api.openai import DetokenizeRequest, ModelCard, ModelList, RequestDecoder, TokenizeRequest
from headrace.errors import InvalidRequest, MethodNotAllowed, NotFound, RequestError, Unauthorized
from headrace.observability.front_metrics import FrontMetrics
from headrace.replica.generation import CHAT_PATH, COMPLETIONS_PATH, Generator
from headrace.replica.http_messages import HttpRequest
from headrace.replica.http_responder import Responder
from headrace.replica.request_head import open_record

MODELS_PATH = "/v1/models"
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Handler = Callable[[HttpRequest, Responder], None]


class FrontView(Protocol):
    """The front, as its routes see it."""

    def state(self) -> ReplicaState: ...

    def why_not_ready(self) -> str:
        """One sentence; empty when ready."""
        ...

    def model_card(self) -> ModelCard: ...

    def update_metrics(self) -> FrontMetrics:
        """Return the metrics with their gauges set to now."""
        ...


class Routes:
    """Answers every request that the HTTP server hands over."""

    def __init__(
        self, front: FrontView, generator: Generator, metrics: FrontMetrics, needs_gateway: bool = False
    ) -> None:
        """needs_gateway: work is done only for requests that came through a gateway (`is_trusted`)."""
        self._front = front
        self._generator = generator
        self._metrics = metrics
        self._needs_gateway = needs_gateway
        self._tokenize_decoder = RequestDecoder(TokenizeRequest)
        self._detokenize_decoder = RequestDecoder(DetokenizeRequest)
        self._tasks: set[asyncio.Task[None]] = set()
        self._by_path: dict[str, tuple[str, Handler]] = {
            CHAT_PATH: ("POST", generator.handle),
            COMPLETIONS_PATH: ("POST", generator.handle),
            "/tokenize": ("POST", self._start_tokenize),
            "/detokenize": ("POST", self._detokenize),
            MODELS_PATH: ("GET", self._list_models),
            "/health": ("GET", self._tell_health),
            "/ready": ("GET", self._tell_ready),
            "/metrics": ("GET", self._tell_metrics),
            "/version": ("GET", self._tell_version),
        }

    def handle(self, request: HttpRequest, responder: Responder) -> None:
        """Answer `request`, now or later, through `responder`."""
        if self._needs_gateway and not request.is_trusted:
            _forget_claims(request)
        try:
            self._find(request, responder)(request, responder)
        except RequestError as error:
            self._refuse(error, request, responder)

    def _find(self, request: HttpRequest, responder: Responder) -> Handler:
        route = self._by_path.get(request.path)
        if route is None and request.path.startswith(MODELS_PATH + "/"):
            route = ("GET", self._tell_model)
        if route is None:
            raise NotFound(
                f"there is no {request.path[:200]!r}; paths are {', '.join(self._by_path)}", code="not_found"
            )
        method, handler = route
        if request.method == method or (request.method == "HEAD" and method == "GET"):
            if method == "POST" and self._needs_gateway and not request.is_trusted:
                raise Unauthorized(
                    "this address does no work by itself: there are tenants, and keys are checked by the "
                    "gateway. Send the request to the gateway's address (gateway.bind) with an API key"
                )
            return handler
        if request.method == "OPTIONS":
            return lambda _request, _responder: responder.send(200, b"", _allow(method))
        raise MethodNotAllowed(f"{request.method} is not allowed on {request.path}; send {method}")

    def _refuse(self, error: RequestError, request: HttpRequest, responder: Responder) -> None:
        self._metrics.count_http_error(error.status)
        headers = f"x-request-id: {open_record(request).client_request_id}\r\n"
        if isinstance(error, MethodNotAllowed):
            route = self._by_path.get(request.path)
            headers += _allow(route[0] if route else "GET")
        responder.send_error(error, headers)

    # ---- the process

    def _tell_health(self, _request: HttpRequest, responder: Responder) -> None:
        _send_json(responder, 200, {"status": "ok"})

    def _tell_ready(self, _request: HttpRequest, responder: Responder) -> None:
        reason = self._front.why_not_ready()
        body = {"status": self._front.state(), "reason": reason}
        _send_json(responder, 503 if reason else 200, body, "retry-after: 1\r\n" if reason else "")

    def _tell_metrics(self, _request: HttpRequest, responder: Responder) -> None:
        responder.send(200, self._front.update_metrics().text(), content_type=_METRICS_TYPE)

    def _tell_version(self, _request: HttpRequest, responder: Responder) -> None:
        _send_json(responder, 200, {"version": headrace.__version__})

    # ---- the model

    def _list_models(self, _request: HttpRequest, responder: Responder) -> None:
        cards = [self._card(name) for name in self._generator.models.names]
        _send_json(responder, 200, ModelList("list", cards))

    def _tell_model(self, request: HttpRequest, responder: Responder) -> None:
        name = unquote(request.path.removeprefix(MODELS_PATH + "/"))
        self._generator.models.check(name)
        _send_json(responder, 200, self._card(name))

    def _card(self, name: str) -> ModelCard:
        """An adapter's card is that of its model, under its own name."""
        return msgspec.structs.replace(self._front.model_card(), id=name)

    def _start_tokenize(self, request: HttpRequest, responder: Responder) -> None:
        task = asyncio.get_running_loop().create_task(self._tokenize(request, responder))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tokenize(self, request: HttpRequest, responder: Responder) -> None:
        try:
            fields = self._tokenize_decoder.decode(request.body)
            if fields.model is not None:
                self._generator.models.check(fields.model)
            if (fields.prompt is None) == (fields.messages is None):
                raise InvalidRequest("send either prompt or messages", param="prompt")
            if fields.messages is not None:
                token_ids = await self._generator.encode_chat(fields.messages)
            else:
                token_ids = await self._generator.encode_text(
                    fields.prompt or "", add_special_tokens=fields.add_special_tokens
                )
        except RequestError as error:
            self._refuse(error, request, responder)
            return
        limit = self._front.model_card().max_model_len
        _send_json(responder, 200, {"count": len(token_ids), "max_model_len": limit, "tokens": token_ids})

    def _detokenize(self, request: HttpRequest, responder: Responder) -> None:
        fields = self._detokenize_decoder.decode(request.body)
        if fields.model is not None:
            self._generator.models.check(fields.model)
        _send_json(responder, 200, {"prompt": self._generator.decode_text(fields.tokens)})


def _send_json(responder: Responder, status: int, body: Any, headers: str = "") -> None:
    responder.send(status, msgspec.json.encode(body), headers)


def _forget_claims(request: HttpRequest) -> None:
    """Drop what only a gateway may say of a request."""
    headers = request.headers
    request.headers = {name: headers[name] for name in headers if not name.startswith("x-headrace-")}


def _allow(method: str) -> str:
    return f"allow: {'GET, HEAD' if method == 'GET' else method}, OPTIONS\r\n"
