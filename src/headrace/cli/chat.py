"""`headrace chat`: talk to a model in the terminal, or ask one question.

Owns the conversation and its display. Must not know processes of ours: any OpenAI server will do.
Alone: `python -m headrace.cli.chat`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from headrace.bench.answer import describe_error
from headrace.bench.events import EventParser, EventTooLong
from headrace.bench.target import (
    TargetError,
    choose_model,
    describe_connect_error,
    find_api_key,
    normalise_url,
)

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 600.0
"""Longest silence: a model that starts from zero replicas may take a while."""


@dataclass
class Conversation:
    """Messages so far, and where they go."""

    url: str
    model: str
    api_key: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str, show: Callable[[str], None]) -> str:
        """Send a question, show the answer's pieces as they come, keep both. Returns the answer.

        Ctrl-C keeps what came so far and is raised again. Raises TargetError when there is no answer;
        the question is then forgotten.
        """
        self.messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        try:
            for piece in self._stream():
                pieces.append(piece)
                show(piece)
        except TargetError:
            self.messages.pop()
            raise
        except KeyboardInterrupt:
            self._keep("".join(pieces))
            raise
        self._keep("".join(pieces))
        return "".join(pieces)

    def _keep(self, answer: str) -> None:
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()

    def _stream(self) -> Iterator[str]:
        body: dict[str, Any] = {"model": self.model, "messages": self.messages, "stream": True}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        try:
            with httpx.stream(
                "POST", f"{self.url}/chat/completions", json=body, headers=headers, timeout=timeout
            ) as answer:
                if answer.status_code != 200:
                    raise TargetError(f"{answer.status_code}: {describe_error(answer.read())}")
                yield from read_pieces(answer.iter_bytes())
        except httpx.RemoteProtocolError as error:
            raise TargetError(f"The answer was cut off: {error}") from error
        except httpx.HTTPError as error:
            raise TargetError(describe_connect_error(self.url, error)) from error


def read_pieces(body: Iterator[bytes]) -> Iterator[str]:
    """Yield the text of a streamed chat answer. Raises TargetError for an error in the stream, for a stream
    without [DONE], and for what is no stream."""
    parser = EventParser()
    for data in body:
        try:
            events = parser.feed(data)
        except EventTooLong as error:
            raise TargetError(f"The server's answer is not an event stream: {error}") from error
        for event in events:
            if event == b"[DONE]":
                return
            yield from _texts(event)
    raise TargetError("The answer was cut off: the stream ended without [DONE].")


def _texts(event: bytes) -> Iterator[str]:
    try:
        tree = json.loads(event)
        if tree.get("error"):
            raise TargetError(f"The answer broke off: {describe_error(event)}")
        for choice in tree.get("choices") or []:
            text = (choice.get("delta") or {}).get("content")
            if text:
                yield str(text)
    except (ValueError, AttributeError, TypeError) as error:
        raise TargetError(f"The server sent an event that is not a chat chunk: {error}") from error


def chat(
    question: Annotated[
        str | None, typer.Argument(help="Ask this and end. Without it: a conversation, or stdin if piped.")
    ] = None,
    url: Annotated[str, typer.Option(help="Base URL of an OpenAI server.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, typer.Option(help="Model name; needed when the server has several.")] = "",
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Sampling temperature.")] = None,
) -> None:
    """Talk to a model. Ctrl-C stops an answer; at the prompt it ends the conversation.

    The API key is read from HEADRACE_API_KEY or OPENAI_API_KEY.
    """
    errors = Console(stderr=True)
    try:
        if question is None and not sys.stdin.isatty():
            question = sys.stdin.read().strip()
            if not question:
                raise TargetError('Nothing to ask: stdin is empty. Write headrace chat "a question".')
        base, key = normalise_url(url), find_api_key(os.environ)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        conversation = Conversation(base, choose_model(base, model, headers), key, max_tokens, temperature)
        if system:
            conversation.messages.append({"role": "system", "content": system})
        if question is not None:
            conversation.ask(question, _show)
            _show("\n")
        else:
            _converse(conversation, errors)
    except TargetError as error:
        errors.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_MISTAKE) from None
    except KeyboardInterrupt:
        _show("\n")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _converse(conversation: Conversation, errors: Console) -> None:
    """Ask and answer until the end of input or Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError):  # some Pythons are built without it
        importlib.import_module("readline")  # gives `input` line editing and history
    errors.print(
        f"{conversation.model} at {conversation.url}. Ctrl-C stops an answer, Ctrl-D leaves.",
        style="dim",
        markup=False,
        highlight=False,
    )
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            _show("\n")
            return
        if not question:
            continue
        try:
            conversation.ask(question, _show)
        except KeyboardInterrupt:
            _show(" …")
        except TargetError as error:
            errors.print(f"\n{error}", style="red", markup=False, highlight=False, soft_wrap=True)
        _show("\n")


def _show(text: str) -> None:
    # A model's text may carry terminal control sequences: only line feeds and tabs pass.
    sys.stdout.write("".join(c for c in text if c in "\n\t" or c.isprintable()))
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(chat)
