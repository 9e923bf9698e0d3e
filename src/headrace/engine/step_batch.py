"""Lays a decision out as the flat arrays that a model runner computes.

Owns the buffers, which the next step reuses. Pure (numpy). Must not know torch or how requests were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.engine.protocol import StepInput
from headrace.engine.request import EngineRequest
from headrace.engine.scheduler import Scheduled


class StepInputBuilder:
    """Builds a StepInput from what is scheduled. Work per decoding request does not grow with its context."""

    def __init__(self, block_size: int, token_budget: int, max_running: int) -> None:
        self._shift = block_size.bit_length() - 1
        self._mask = block_size - 1
        self._offsets = np.arange(max(token_budget, 1), dtype=np.int32)
        self._token_ids_T = np.empty(token_budget, np.int32)
        self._positions_T = np.empty(token_budget, np.int32)
        self._slots_T = np.empty(token_budget, np.int32)
        self._query_starts = np.zeros(max_running + 1, np.int32)
        self._context_lengths_R = np.empty(max_running, np.int32)

    def build(self, scheduled: Sequence[Scheduled]) -> StepInput:
        """Return the step's arrays: views of buffers that the next call overwrites.

        Of a request with guesses all rows are sampled: its last token's, and one behind each guess.
        """
        token_ids, positions, slots = self._token_ids_T, self._positions_T, self._slots_T
        shift, mask = self._shift, self._mask
        sampled_rows: list[int] = []
        ends: list[int] = []
        contexts: list[int] = []
        row = 0
        for request, num_new, is_sampled, drafts in scheduled:
            position = request.num_computed_tokens
            if drafts:
                num_new += len(drafts)
                self._lay_out_drafts(request, drafts, row)
                sampled_rows.extend(range(row, row + len(drafts)))
            elif num_new == 1:
                token_ids[row] = request.token_ids[position]
                positions[row] = position
                slots[row] = (request.block_table[position >> shift] << shift) | (position & mask)
            else:
                end = position + num_new
                token_ids[row : row + num_new] = request.token_ids[position:end]
                places = self._offsets[:num_new] + position
                positions[row : row + num_new] = places
                first = position >> shift
                blocks = np.array(request.block_table[first : ((end - 1) >> shift) + 1], np.int32)
                slots[row : row + num_new] = (blocks[(places >> shift) - first] << shift) | (places & mask)
            row += num_new
            ends.append(row)
            contexts.append(position + num_new)
            if is_sampled:
                sampled_rows.append(row - 1)
        num_requests = len(ends)
        self._query_starts[1 : num_requests + 1] = ends
        self._context_lengths_R[:num_requests] = contexts
        return StepInput(
            token_ids_T=token_ids[:row],
            positions_T=positions[:row],
            slots_T=slots[:row],
            query_starts=self._query_starts[: num_requests + 1],
            context_lengths_R=self._context_lengths_R[:num_requests],
            block_tables=[item.request.block_table for item in scheduled],
            sampled_rows_S=np.array(sampled_rows, np.int32),
        )

    def _lay_out_drafts(self, request: EngineRequest, drafts: Sequence[int], row: int) -> None:
        """Write a request's last token and the guesses behind it from `row` on."""
        position, table = request.num_computed_tokens, request.block_table
        for token_id in (request.token_ids[position], *drafts):
            self._token_ids_T[row] = token_id
            self._positions_T[row] = position
            self._slots_T[row] = (table[position >> self._shift] << self._shift) | (position & self._mask)
            position += 1
            row += 1
