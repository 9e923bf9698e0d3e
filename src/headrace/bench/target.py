"""The server under load: its address, its key, and whether it can answer at all.

Owns URL and key handling and the checks before a run. Must not know the workload.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from headrace.bench.answer import describe_error
from headrace.errors import HeadraceError, text_of

KEY_VARIABLES = ("HEADRACE_API_KEY", "OPENAI_API_KEY")
CHECK_TIMEOUT_S = 30.0


class TargetError(HeadraceError):
    """The server cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """One route of one server."""

    url: str
    """Base URL, with /v1 and without a slash at the end."""
    host: str
    port: int
    is_tls: bool
    path: str
    """Path of the route under load."""
    api_key: str = ""

    def __repr__(self) -> str:  # never shows the key
        return f"<Target {self.url}>"

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def head(self, num_body_bytes: int) -> bytes:
        """Return the head of a POST with a JSON body of `num_body_bytes`."""
        authority = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"POST {self.path} HTTP/1.1",
            f"Host: {authority}:{self.port}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            *(f"{name}: {value}" for name, value in self.headers.items()),
            f"Content-Length: {num_body_bytes}",
            "\r\n",
        ]
        return "\r\n".join(lines).encode("latin-1")


def parse_target(url: str, route: str, api_key: str = "") -> Target:
    """Make a target of a base URL (`http://host:port`, with or without /v1) and a route such as
    `/chat/completions`. Raises TargetError."""
    base = normalise_url(url)
    parts = urlsplit(base)
    if any(ord(character) < 33 or ord(character) > 126 for character in api_key):
        raise TargetError("the API key has spaces or characters that an HTTP header cannot carry")
    assert parts.hostname
    is_tls = parts.scheme == "https"
    return Target(
        url=base,
        host=parts.hostname,
        port=parts.port or (443 if is_tls else 80),
        is_tls=is_tls,
        path=parts.path + route,
        api_key=api_key,
    )


def normalise_url(url: str) -> str:
    """Return the base URL of the API: a URL without a path gets /v1. Raises TargetError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise TargetError(f"{url!r} is not a URL: {error}. Write http://127.0.0.1:8000/v1") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise TargetError(f"{url!r} is not the URL of a server. Write http://127.0.0.1:8000/v1")
    if not url.isascii() or any(character.isspace() for character in url) or port == 0:
        raise TargetError(f"{url!r} is not the URL of a server. Write http://127.0.0.1:8000/v1")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def find_api_key(environment: Mapping[str, str]) -> str:
    """Return the first key that is set, or an empty text."""
    return next((environment[name] for name in KEY_VARIABLES if environment.get(name)), "")


def choose_model(url: str, wanted: str, headers: Mapping[str, str]) -> str:
    """Ask the server for its models and return the one to use: `wanted`, or the only one.

    Raises TargetError when nothing listens, the key is refused, the model is unknown, or none was named
    and the server has several.
    """
    models = list_models(url, headers)
    if wanted:
        # A server without a model list (404) is believed to know its models.
        if models is not None and wanted not in models:
            raise TargetError(f"{url} has no model {wanted!r}. It has: {', '.join(models) or 'none'}.")
        return wanted
    if models is None:
        raise TargetError(f"{url} does not list its models; name one with --model.")
    if len(models) == 1:
        return models[0]
    if not models:
        raise TargetError(f"{url} has no models.")
    raise TargetError(f"{url} has several models; choose one with --model: {', '.join(models)}.")


def list_models(url: str, headers: Mapping[str, str]) -> list[str] | None:
    """Return the ids of GET /models; None when the server has no such route. Raises TargetError."""
    try:
        answer = httpx.get(f"{url}/models", headers=dict(headers), timeout=CHECK_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise TargetError(describe_connect_error(url, error)) from error
    if answer.status_code == 404:
        return None
    if answer.status_code == 401:
        raise TargetError(
            f"{url} refused the API key (401): {describe_error(answer.content)} "
            f"Set {' or '.join(KEY_VARIABLES)}."
        )
    if answer.status_code != 200:
        raise TargetError(f"{url}/models answered {answer.status_code}: {describe_error(answer.content)}")
    try:
        return [str(item["id"]) for item in answer.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"{url}/models did not answer with a list of models; is it an OpenAI server?"
        ) from error


def describe_connect_error(url: str, error: Exception) -> str:
    """Say what could not be reached and what to do about it."""
    if isinstance(error, httpx.ConnectError):
        if isinstance(error.__context__, ssl.SSLError) or "SSL" in str(error):
            return f"{url}: TLS failed: {error}"
        return (
            f"Nothing answers at {url} ({error}). Start a server there, "
            "for example with `headrace up`, or name another one with --url."
        )
    if isinstance(error, httpx.TimeoutException):
        return f"{url} did not answer within {CHECK_TIMEOUT_S:g} s."
    return f"{url} could not be used: {text_of(error)}"
