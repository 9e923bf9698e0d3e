"""Which cached KV blocks a prompt may share, and with whom: by tenant, and by the prefix that an endpoint
declares public.

Owns the salt, which comes from the tenant that the gateway named and never from a client, so that nobody can
learn from a fast first token that somebody else sent the same prompt. Must not know sockets or engines.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import blake2b

from headrace.api.messages import GenerationRequest
from headrace.errors import InvalidRequest
from headrace.policy.prompt import prompt_salt
from headrace.replica.prefix_digest import PrefixDigest
from headrace.replica.text_model import PromptEncoder, TextModel

_log = logging.getLogger(__name__)


class PromptCaching:
    """What a front adds to each request before it goes to the engine, and notes when it went."""

    def __init__(self, endpoint: str, digest: PrefixDigest | None, shared_tokens: Sequence[int] = ()) -> None:
        """`digest`: None where the cache is not this front's to follow. `shared_tokens`: what prompts that
        use the declared prefix begin with."""
        self._key = blake2b(endpoint.encode(), digest_size=32, person=b"headrace salt").digest()
        self._digest = digest
        self._shared_tokens = list(shared_tokens)

    def salt_of(self, tenant: str, adapter: str = "") -> str:
        """Return the cache salt of a tenant, for the model or one of its adapters: the same on every replica
        of the endpoint, and for ever."""
        owner = prompt_salt(tenant, adapter).encode()
        return blake2b(owner, digest_size=16, key=self._key).hexdigest()

    def num_shared(self, token_ids: Sequence[int]) -> int:
        """Return how many first tokens are those of the declared prefix."""
        shared = self._shared_tokens
        if not shared or shared[0] != token_ids[0]:
            return 0
        for position, (ours, theirs) in enumerate(zip(shared, token_ids)):
            if ours != theirs:
                return position
        return min(len(shared), len(token_ids))

    def admit(self, request: GenerationRequest, body: bytes) -> None:
        """A request with the only prompt of `body` went to the engine."""
        if self._digest is not None:
            self._digest.admit(request, body)


async def shared_prefix_tokens(text: str, model: TextModel, encoder: PromptEncoder) -> list[int]:
    """Return the tokens of an endpoint's declared prefix as its system message; empty if it has none.

    They end with what the template puts behind a system message, which a request's own text replaces: only
    what both have in common is shared.
    """
    if not text:
        return []
    try:
        if model.chat_template is None:
            return await encoder.encode(text, add_special_tokens=True)
        rendered = model.chat_template.render([{"role": "system", "content": text}])
        return await encoder.encode(rendered, add_special_tokens=False)
    except InvalidRequest as error:
        _log.warning("shared_prefix is not shared: %s", error.message)
        return []
