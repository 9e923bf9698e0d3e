"""What the engine's prefix cache holds, in the words of the routers: hashes of prompt heads.

A router hashes bytes, the engine tokens. The digest knows of each request both: when its prompt is computed,
each hash of its head is tied to the KV block that ends where the hashed bytes end, about; when that block is
evicted, the hash is withdrawn. Owns that tie and what each listener was told. No I/O.
Must not know sockets or reports.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from headrace.api.messages import GenerationRequest, StepBatch
from headrace.engine.kv_cache.prefix_cache import BlockHash, extend_hashes, root_hash
from headrace.policy.prompt import HEAD_BYTES, PREFIX_BYTES, prompt_salt, read_prompt

MAX_HASHES = 32_768
"""Hashes tied to blocks; at the bound the one used longest ago is withdrawn."""
MAX_LISTED = 8192
"""Hashes in the first report on a connection, the newest ones."""
MAX_PER_REPORT = 2048
MAX_CHANGES = 8192
"""Changes kept for a listener that does not read; beyond it is told everything anew."""
MAX_PENDING = 65_536
"""As many requests as the largest max_open."""


class PrefixNews(NamedTuple):
    """What one report says of the cache."""

    epoch: int = 0
    added: list[int] = []  # noqa: RUF012, never changed
    removed: list[int] = []  # noqa: RUF012


class _Pending(NamedTuple):
    """A request whose prompt is not computed yet."""

    hashes: tuple[int, ...]
    num_bytes: int
    request: GenerationRequest


class PrefixFeed:
    """What one listener was told, and what it must still be told."""

    def __init__(self, digest: PrefixDigest) -> None:
        self._digest = digest
        self._changes: dict[int, bool] = {}
        """Hash -> whether it was added (or removed) since it was last told; the newest change last."""
        self._epoch = 0
        self._is_new = True

    def __repr__(self) -> str:
        return f"<PrefixFeed epoch {self._epoch}, {len(self._changes)} changes>"

    def restart(self) -> None:
        """The listener knows nothing: the next news list everything."""
        self._changes.clear()
        self._is_new = True

    def change(self, prompt_hash: int, is_added: bool) -> None:
        if self._is_new:
            return
        self._changes.pop(prompt_hash, None)
        self._changes[prompt_hash] = is_added
        if len(self._changes) > MAX_CHANGES:
            self.restart()

    def take(self) -> PrefixNews:
        """Return what is to be told now. If telling it fails, `restart` before the next."""
        if self._is_new:
            self._is_new = False
            self._epoch += 1
            return PrefixNews(self._epoch, self._digest.newest(MAX_LISTED), [])
        changes = self._changes
        told = [next(iter(changes))] if len(changes) == 1 else list(changes)[:MAX_PER_REPORT]
        added: list[int] = []
        removed: list[int] = []
        for prompt_hash in told:
            (added if changes.pop(prompt_hash) else removed).append(prompt_hash)
        return PrefixNews(self._epoch, added, removed)


class PrefixDigest:
    """The tie between prompt hashes and KV blocks, for one engine."""

    def __init__(self, max_hashes: int = MAX_HASHES) -> None:
        self._max_hashes = max_hashes
        self._block_size = 0
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._block_of: OrderedDict[int, BlockHash] = OrderedDict()
        """Prompt hash -> the block that it stands for; used longest ago first."""
        self._hashes_of: dict[BlockHash, list[int]] = {}
        self._feeds: list[PrefixFeed] = []

    def __len__(self) -> int:
        return len(self._block_of)

    def __repr__(self) -> str:
        return f"<PrefixDigest {len(self)} hashes, {len(self._pending)} prompts pending>"

    def subscribe(self) -> PrefixFeed:
        """Return the feed of one more listener."""
        feed = PrefixFeed(self)
        self._feeds.append(feed)
        return feed

    def newest(self, limit: int) -> list[int]:
        """Return the hashes that were used last, the very last one last."""
        return list(self._block_of)[-limit:]

    def admit(self, request: GenerationRequest, body: bytes) -> None:
        """A request went to the engine; `body` is what the router saw the head of."""
        head = read_prompt(body[:HEAD_BYTES], len(body), prompt_salt(request.tenant, request.lora))
        self.expect(request, head.hashes, head.num_bytes)

    def expect(self, request: GenerationRequest, hashes: Sequence[int], num_bytes: int) -> None:
        """A request went to the engine; `hashes` and `num_bytes` are those of its prompt's head."""
        known = tuple(hashes[: len(PREFIX_BYTES) - 1])  # a peer may send anything
        if known:
            self._pending[request.request_id] = _Pending(known, num_bytes, request)
            if len(self._pending) > MAX_PENDING:
                self._pending.popitem(last=False)

    # ---- what the engine client tells

    def on_ready(self, block_size: int) -> None:
        """An engine is ready, its cache empty."""
        self.on_lost()
        self._block_size = block_size

    def on_lost(self) -> None:
        """The engine is gone, and its cache with it."""
        self._pending.clear()
        self._block_of.clear()
        self._hashes_of.clear()
        for feed in self._feeds:
            feed.restart()

    def on_abort(self, request_id: str) -> None:
        self._pending.pop(request_id, None)

    def on_step(self, batch: StepBatch) -> None:
        """Take a step's evictions and the prompts that it completed, in this order: it allocates first."""
        for block_hash in batch.evicted:
            for prompt_hash in self._hashes_of.pop(block_hash, ()):
                del self._block_of[prompt_hash]
                self._tell(prompt_hash, False)
        pending = self._pending
        if not pending:
            return
        for output in batch.outputs:
            if output.request_id in pending:
                done = pending.pop(output.request_id)
                if output.finish_reason != "error":
                    self._tie(done)

    def check_integrity(self) -> None:
        """Raise AssertionError unless both directions of the tie agree."""
        back = {h: block for block, hashes in self._hashes_of.items() for h in hashes}
        assert back == dict(self._block_of), f"{len(back)} by block, {len(self._block_of)} by hash"
        assert all(self._hashes_of.values()), "a block without hashes is kept"
        assert len(self._block_of) <= self._max_hashes, f"{len(self._block_of)} hashes"

    def _tie(self, done: _Pending) -> None:
        """Tie each hash to the last KV block that its bytes fill, taking the tokens as evenly spread.

        Rounded down, so that the end of a prefix that others share is tied to a block that they share, too.
        """
        request, block_size = done.request, self._block_size
        num_tokens = len(request.prompt_token_ids)
        num_full = num_tokens // block_size if block_size else 0
        if num_full == 0:
            return
        blocks_per_byte = num_tokens / (block_size * max(1, done.num_bytes))
        num_tied = min(num_full, max(1, int(PREFIX_BYTES[len(done.hashes)] * blocks_per_byte)))
        chain: list[BlockHash] = []
        root = root_hash(request.cache_salt)
        extend_hashes(chain, request.prompt_token_ids, num_tied, block_size, root, request.num_shared_tokens)
        for number, prompt_hash in enumerate(done.hashes, 1):
            index = min(num_tied, max(1, int(PREFIX_BYTES[number] * blocks_per_byte)))
            self._set(prompt_hash, chain[index - 1])

    def _set(self, prompt_hash: int, block_hash: BlockHash) -> None:
        if prompt_hash in self._block_of:
            self._block_of.move_to_end(prompt_hash)  # its block is still there, else it were withdrawn
            return
        self._block_of[prompt_hash] = block_hash
        self._hashes_of.setdefault(block_hash, []).append(prompt_hash)
        self._tell(prompt_hash, True)
        if len(self._block_of) > self._max_hashes:
            oldest, block = self._block_of.popitem(last=False)
            self._untie(block, oldest)
            self._tell(oldest, False)

    def _untie(self, block_hash: BlockHash, prompt_hash: int) -> None:
        hashes = self._hashes_of[block_hash]
        hashes.remove(prompt_hash)
        if not hashes:
            del self._hashes_of[block_hash]

    def _tell(self, prompt_hash: int, is_added: bool) -> None:
        for feed in self._feeds:
            feed.change(prompt_hash, is_added)
