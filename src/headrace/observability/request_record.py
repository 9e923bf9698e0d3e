"""The per-request line of a gateway: its fields, each defined here once (docs/reference/request-log.md).

Never a prompt, never an answer, never a key. Must not know where the facts come from.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


def _field(meaning: str) -> Meta:
    return Meta(description=meaning)


class RequestRecord(msgspec.Struct, frozen=True, gc=False):
    """One request's end. null: not known, or it never got there. Times in milliseconds."""

    id: Annotated[str, _field("headrace's id of the request, which begins with `hr-GATEWAY-`")]
    client_id: Annotated[str, _field("the client's `x-request-id`; headrace's id if it sent none")]
    gateway: Annotated[str, _field("the gateway that took it")]
    endpoint: Annotated[str, _field("the model's public name; empty if it ended before that was known")]
    model: Annotated[
        str,
        _field("the model name that was asked for, of those that are served; empty if the router was away"),
    ]
    tenant: Annotated[str, _field("who pays; empty without tenants, or if the key was refused")]
    path: Annotated[str, _field("the path, without a query")]
    arrived_s: Annotated[float, _field("wall-clock time of its arrival, in seconds since 1970")]
    held_ms: Annotated[float | None, _field("how long the router held it before it was bound or refused")]
    replica: Annotated[str, _field("the replica that answered; empty if none did")]
    placement: Annotated[str, _field("why that replica was chosen")]
    cached_ratio: Annotated[
        float | None, _field("part of the prompt that the choice expected in its prefix cache, 0 to 1")
    ]
    retries: Annotated[int, _field("times that HAProxy connected again before the first byte")]
    first_byte_ms: Annotated[int | None, _field("from its arrival to the answer's head")]
    ttft_ms: Annotated[float | None, _field("from its arrival to the first token in the replica")]
    total_ms: Annotated[int | None, _field("from its arrival to the answer's last byte")]
    status: Annotated[int | None, _field("the HTTP status that was sent")]
    state: Annotated[str, _field("the terminal state: finished, aborted, refused or failed")]
    code: Annotated[str, _field("the router's reason, if it refused the request")]
    finish_reason: Annotated[str, _field("why the generation ended: stop, length, ...; empty if unknown")]
    prompt_tokens: Annotated[int | None, _field("tokens of the prompt")]
    cached_tokens: Annotated[int | None, _field("prompt tokens that the prefix cache spared")]
    output_tokens: Annotated[int | None, _field("generated tokens")]
    engine_ms: Annotated[
        float | None,
        _field("engine time measured for it, its parts of the steps it was in; all choices together"),
    ]
    bytes_in: Annotated[int | None, _field("bytes received from the client")]
    bytes_out: Annotated[int | None, _field("bytes sent to the client")]
    resumptions: Annotated[
        int | None, _field("times that its answer went on in another engine, or in its own after a restart")
    ]
    hosts: Annotated[list[str] | None, _field("the replicas whose engines continued it, in order")]
