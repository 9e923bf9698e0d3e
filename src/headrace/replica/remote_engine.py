"""The replicas' engines as the one engine of a durable front: where a router said, or wherever there is room.

Owns what is known of them, by the siblings that the controller names, and what each request tells its host.
Must not know HTTP, text, or how a stream is continued (`resumption`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from headrace.api.messages import EngineReady, EngineSpec, GenerationRequest, KvPlace, Placed, Sibling
from headrace.errors import Overloaded
from headrace.policy.prompt import HEAD_BYTES, prompt_salt, read_prompt
from headrace.policy.resumption import OwnEngine
from headrace.replica.carried_stream import Continuable
from headrace.replica.engine_users import EngineStream
from headrace.replica.ledger import RequestRecord
from headrace.replica.resumption import StreamKeeper
from headrace.replica.stream_class import text_class_of

KNOWN_LIMIT_S = 5.0
"""Longest wait for the first replica to be named. The router that bound a request knows of one, and the
controller tells this front in a moment."""


class NoEngine:
    """What a durable front has in an engine's place."""

    streams: Mapping[str, EngineStream] = {}
    kv_place: KvPlace | None = None

    def __repr__(self) -> str:
        return "NoEngine()"

    def submit(self, request: GenerationRequest, stream: EngineStream) -> None:
        raise Overloaded("this front has no engine of its own; send the request again", retry_after_s=1.0)

    def abort(self, request_id: str) -> None:
        pass

    def has_request(self, request_id: str) -> bool:
        return False

    # ---- as a departure sees it

    def num_in_engine(self) -> int:
        return 0

    def can_hand_over(self) -> bool:
        return False

    def hand_over(self) -> int:
        return 0


def no_own_engine() -> OwnEngine:
    """Return how a durable front's own engine is: there is none."""
    return OwnEngine("none")


class RemoteEngine:
    """What answers use as their engine, and requests are checked against."""

    def __init__(self, spec: EngineSpec, keeper: StreamKeeper) -> None:
        """`spec`: what the replicas' engines are started with."""
        self._text_class = text_class_of(spec)
        self._keeper = keeper
        self._known = asyncio.Event()
        self.info: EngineReady | None = None
        """Of the replicas; kept when all are gone, since others like them will come."""

    def __repr__(self) -> str:
        return f"RemoteEngine({self.state}, {self._keeper!r})"

    @property
    def state(self) -> Literal["ready", "starting"]:
        return "starting" if self.info is None else "ready"

    def why_not_ready(self) -> str:
        """Say in a sentence why no request can be taken."""
        return "no replica has been ready yet; try again shortly"

    async def wait_known(self) -> None:
        """Wait until some replica was ready once, for a while."""
        if self.info is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KNOWN_LIMIT_S):
                    await self._known.wait()

    def set_siblings(self, siblings: Sequence[Sibling]) -> None:
        """Take what the controller knows of the replicas. Those of another text are none of ours."""
        ours = [sibling for sibling in siblings if sibling.text_class == self._text_class]
        ready = [
            each for each in ours if each.state == "ready" and each.vocab_size and each.max_context_tokens
        ]
        if ready:
            # What any of them can do: which one gets a request is the router's to say.
            vocab_size = min(each.vocab_size for each in ready)
            max_context_tokens = min(each.max_context_tokens for each in ready)
            self.info = EngineReady("remote", "", vocab_size, max_context_tokens, 0, 0, 0, "", {})
            self._known.set()
        self._keeper.set_siblings(ours)

    def mark(
        self, requests: Sequence[GenerationRequest], record: RequestRecord, place: str, body: bytes
    ) -> list[GenerationRequest]:
        """Return a request's choices with what their host must know. `place`: the replica that the router
        named; empty: none."""
        hashes: list[int] = []
        num_bytes = 0
        if len({tuple(request.prompt_token_ids) for request in requests}) == 1:
            # Of several prompts, the head does not say where each begins.
            salt = prompt_salt(record.tenant, requests[0].lora)
            head = read_prompt(body[:HEAD_BYTES], len(body), salt)
            hashes, num_bytes = list(head.hashes), head.num_bytes
        placed = Placed(record.request_id, place, hashes, num_bytes)
        first, *others = requests
        silent = msgspec.structs.replace(placed, prefix_hashes=[])
        return [
            msgspec.structs.replace(first, placed=placed),
            *(msgspec.structs.replace(other, placed=silent) for other in others),
        ]

    # ---- what answers ask

    def submit(self, request: GenerationRequest, stream: Continuable) -> None:
        self._keeper.place(request, stream)

    def abort(self, request_id: str) -> None:
        self._keeper.abort(request_id)

    def has_request(self, request_id: str) -> bool:
        return self._keeper.has_request(request_id)

    def on_engine_lost(self, stream: Continuable, reason: str) -> None:
        raise AssertionError("no stream is in an engine of this front's own")
