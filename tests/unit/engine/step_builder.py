"""Builds StepInputs for tests from plain Python, with block tables of the test's choosing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.engine.protocol import StepInput


@dataclass
class Part:
    """One request's share of a step: `token_ids[start:end]` with its whole block table."""

    token_ids: list[int]
    start: int
    end: int
    blocks: list[int]
    is_sampled: bool = True


def step_input(parts: list[Part], block_size: int) -> StepInput:
    """A step with `parts` in order; the last row of each sampled part is sampled."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, sampled = [0], []
    for part in parts:
        for position in range(part.start, part.end):
            tokens.append(part.token_ids[position])
            positions.append(position)
            slots.append(part.blocks[position // block_size] * block_size + position % block_size)
        starts.append(len(tokens))
        if part.is_sampled:
            sampled.append(len(tokens) - 1)
    contexts = [part.end for part in parts]
    return StepInput(
        *(np.array(values, np.int32) for values in (tokens, positions, slots, starts, contexts)),
        [part.blocks for part in parts],
        np.array(sampled, np.int32),
    )
