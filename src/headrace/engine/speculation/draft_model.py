"""Guesses with a small model, most likely token after most likely token.

Owns how far the small model has computed each request and which KV blocks it has filled. Its KV memory has
the same blocks and slots as the large model's, so a shared prefix is shared here, too; it computes only for
requests that draft, and catches up with what it missed. Must not know the large model, sampling or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np

from headrace.engine.kv_cache.prefix_cache import BlockHash
from headrace.engine.protocol import Int32Array, ModelRunner, StepInput
from headrace.engine.request import EngineRequest
from headrace.engine.speculation.proposer import Wanted

_USUAL_ACCEPTANCE = 0.7
"""Where a request begins: what it turns out to be is learned within some guesses."""


class _Part(NamedTuple):
    """Tokens of one request that a pass computes, the first one at `position`."""

    token_ids: Sequence[int]
    position: int
    block_table: list[int]


@dataclass(slots=True)
class _State:
    """How far the small model is with one request."""

    num_admissions: int
    """Blocks that a request got at another admission say nothing."""
    num_computed_tokens: int = 0
    num_noted_blocks: int = 0
    """Its first blocks that are known to hold what their hashes say."""
    drafts_start: int = 0
    drafts: list[int] = field(default_factory=list)
    """Computed guesses from position `drafts_start` on. Those that became tokens stay computed."""


@dataclass(slots=True)
class _Draft:
    """One request's part in the running call."""

    request: EngineRequest
    state: _State
    end: int
    """Its tokens [num_computed_tokens, end) are computed in the first pass."""
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)


class DraftModelProposer:
    """Runs a second ModelRunner, whose vocabulary is the large model's."""

    def __init__(self, runner: ModelRunner, token_budget: int) -> None:
        """`runner` has at least as many blocks as the block pool, of the same size. A pass computes at most
        `token_budget` tokens."""
        self.description = f"a draft model ({runner.architecture} {runner.path})"
        self._runner = runner
        self._token_budget = token_budget
        self._shift = runner.block_size.bit_length() - 1
        self._hash_of_block: dict[int, BlockHash] = {}
        """What blocks of the small model's KV memory hold, of those that are full and known."""

    def __repr__(self) -> str:
        return f"<DraftModelProposer {self.description}, {len(self._hash_of_block)} blocks known>"

    def outlook(self, request: EngineRequest, max_tokens: int) -> Sequence[float]:
        if len(request.token_ids) + max_tokens > self._runner.max_context_tokens:
            return ()
        return [_USUAL_ACCEPTANCE] * max_tokens

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        drafts = self._plan(wanted)
        if drafts:
            self._draft(drafts)
        token_ids = {draft.request.request_id: draft.token_ids for draft in drafts}
        return [token_ids.get(request.request_id, []) for request, _ in wanted]

    def sleep(self, level: Literal[1, 2]) -> None:
        self._runner.sleep(level)
        self._hash_of_block.clear()

    def wake(self) -> None:
        self._runner.wake()

    def _draft(self, drafts: Sequence[_Draft]) -> None:
        """Compute what is missing, then guess pass by pass. Who is not complete after the first pass, whose
        budget is bounded, guesses nothing this time."""
        logits_SV = self._execute([_missing_part(draft) for draft in drafts])
        rows = []
        for row, draft in enumerate(drafts):
            self._forget_written(draft)
            draft.state.num_computed_tokens = draft.end
            self._note_full_blocks(draft.request, draft.state)
            if draft.end == len(draft.request.token_ids):
                rows.append((row, draft))
        while rows:
            best = logits_SV.argmax(dim=1).tolist()
            for row, draft in rows:
                draft.token_ids.append(best[row])
            going_on = [draft for _, draft in rows if len(draft.token_ids) < draft.max_tokens]
            if going_on:
                logits_SV = self._execute([_last_guess_part(draft) for draft in going_on])
            rows = list(enumerate(going_on))
        for draft in drafts:
            # The last guess was not computed: the next call does it, if it was right.
            draft.state.drafts_start, draft.state.drafts = draft.end, draft.token_ids[:-1]

    # ---- what is computed already

    def _plan(self, wanted: Sequence[Wanted]) -> list[_Draft]:
        """Decide which tokens the first pass computes: what each request is behind, within the budget.

        A block that two requests would fill is filled by the first; the other one finds it next time.
        """
        budget = self._token_budget
        taken: set[int] = set()
        drafts: list[_Draft] = []
        for request, max_tokens in wanted:
            state = self._state(request)
            first = state.num_computed_tokens
            end = min(len(request.token_ids), first + budget)
            blocks = request.block_table[first >> self._shift : ((end - 1) >> self._shift) + 1]
            if end == first or not taken.isdisjoint(blocks):
                continue
            taken.update(blocks)
            budget -= end - first
            drafts.append(_Draft(request, state, end, max_tokens))
        return drafts

    def _state(self, request: EngineRequest) -> _State:
        state = request.proposer_state
        if not isinstance(state, _State) or state.num_admissions != request.num_admissions:
            state = request.proposer_state = _State(request.num_admissions)
        tokens, start = request.token_ids, state.drafts_start
        for offset, token_id in enumerate(state.drafts):
            # The last token's logits are wanted: it is always computed.
            if start + offset >= len(tokens) - 1 or tokens[start + offset] != token_id:
                break
            state.num_computed_tokens = start + offset + 1
        state.drafts = []
        self._note_full_blocks(request, state)
        self._find_shared(request, state)
        return state

    def _note_full_blocks(self, request: EngineRequest, state: _State) -> None:
        """Note what the blocks hold that this request has filled, as far as their hashes are known."""
        end = min(state.num_computed_tokens >> self._shift, len(request.block_hashes))
        for index in range(state.num_noted_blocks, end):
            self._hash_of_block[request.block_table[index]] = request.block_hashes[index]
        state.num_noted_blocks = max(state.num_noted_blocks, end)

    def _find_shared(self, request: EngineRequest, state: _State) -> None:
        """Skip blocks that hold the request's tokens already, computed for another request or before."""
        last = min((len(request.token_ids) - 1) >> self._shift, len(request.block_hashes))
        index = state.num_computed_tokens >> self._shift
        while index < last and (
            self._hash_of_block.get(request.block_table[index]) == request.block_hashes[index]
        ):
            index += 1
            if index << self._shift > state.num_computed_tokens:
                state.num_computed_tokens = index << self._shift
                state.num_noted_blocks = max(state.num_noted_blocks, index)

    def _forget_written(self, draft: _Draft) -> None:
        """The blocks that this call writes into no longer hold what they held."""
        first = draft.state.num_computed_tokens >> self._shift
        last = (draft.end + draft.max_tokens - 2) >> self._shift
        for block in draft.request.block_table[first : last + 1]:
            self._hash_of_block.pop(block, None)

    # ---- one pass

    def _execute(self, parts: Sequence[_Part]) -> Any:
        """Compute one pass; return the logits of each part's last row: [len(parts), vocab_size]."""
        ends = list(accumulate(len(part.token_ids) for part in parts))
        return self._runner.execute(
            StepInput(
                token_ids_T=np.array([token_id for part in parts for token_id in part.token_ids], np.int32),
                positions_T=np.concatenate([_positions(part) for part in parts]),
                slots_T=np.concatenate([self._slots(part) for part in parts]),
                query_starts=np.array([0, *ends], np.int32),
                context_lengths_R=np.array([part.position + len(part.token_ids) for part in parts], np.int32),
                block_tables=[part.block_table for part in parts],
                sampled_rows_S=np.array(ends, np.int32) - 1,
            )
        )

    def _slots(self, part: _Part) -> Int32Array:
        shift, positions = self._shift, _positions(part)
        first, last = part.position >> shift, (part.position + len(part.token_ids) - 1) >> shift
        blocks = np.array(part.block_table[first : last + 1], np.int32)
        slots: Int32Array = (blocks[(positions >> shift) - first] << shift) | (positions & ((1 << shift) - 1))
        return slots


def _positions(part: _Part) -> Int32Array:
    return np.arange(part.position, part.position + len(part.token_ids), dtype=np.int32)


def _missing_part(draft: _Draft) -> _Part:
    """What the first pass computes."""
    request, start = draft.request, draft.state.num_computed_tokens
    return _Part(request.token_ids[start : draft.end], start, request.block_table)


def _last_guess_part(draft: _Draft) -> _Part:
    """What a later pass computes."""
    position = draft.end + len(draft.token_ids) - 1
    return _Part(draft.token_ids[-1:], position, draft.request.block_table)
