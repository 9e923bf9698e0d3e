"""Commands through shared memory: what is posted is what other ranks read."""

from __future__ import annotations

import os
import threading
from dataclasses import fields

import numpy as np
import pytest
from tests.unit.engine.step_builder import Part, step_input

from headrace.engine.operations.kernels import Library
from headrace.engine.operations.shared_memory import SharedMemory
from headrace.engine.protocol import StepInput
from headrace.engine.workers.mailbox import Command, Mailbox, shared_sizes
from headrace.errors import EngineDead

LIMIT_S = 20.0


def both_ends(library: Library, max_tokens: int = 16) -> tuple[Mailbox, Mailbox]:
    """Rank 0's mailbox and another rank's, each with a mapping of its own."""
    sizes = shared_sizes(library, max_tokens, 4, 5)
    memory = SharedMemory(sizes)
    return Mailbox(library, memory), Mailbox(library, SharedMemory(sizes, os.dup(memory.descriptor)))


def a_step(num_requests: int, num_new: int) -> StepInput:
    tokens = list(range(40))
    parts = [
        Part(tokens, 3 + row, 3 + row + num_new, [row, 7, 9 + row][: 2 + row % 2])
        for row in range(num_requests)
    ]
    return step_input(parts, block_size=8)


def test_another_rank_reads_the_step_that_was_posted(library: Library) -> None:
    ours, theirs = both_ends(library)
    for step in (a_step(1, 1), a_step(4, 3), a_step(2, 8)):
        own = ours.post_step(step)
        assert theirs.wait(LIMIT_S)
        command, read = theirs.read()
        assert command == Command.STEP
        assert read is not None
        for field in fields(StepInput):
            expected, found = getattr(own, field.name), getattr(read, field.name)
            assert np.array_equal(expected, found), field.name
            if field.name != "block_tables":
                assert np.array_equal(getattr(step, field.name), found), field.name
        for table, row in zip(step.block_tables, read.block_tables, strict=True):
            assert list(row[: len(table)]) == list(table)


def test_a_rank_waits_for_the_next_command_and_finds_none_twice(library: Library) -> None:
    ours, theirs = both_ends(library)
    assert not theirs.wait(0.001)
    posting = threading.Timer(0.02, ours.post, [Command.WAKE])
    posting.start()
    assert theirs.wait(LIMIT_S)
    assert theirs.read() == (Command.WAKE, None)
    assert not theirs.wait(0.001)
    posting.join()


def test_who_waits_is_told_when_ranks_end(library: Library) -> None:
    ours, theirs = both_ends(library)
    ending = threading.Timer(0.02, ours.end)
    ending.start()
    with pytest.raises(EngineDead, match="another rank was lost"):
        theirs.wait(LIMIT_S)
    ending.join()
    with pytest.raises(EngineDead):
        theirs.wait(LIMIT_S)


def test_a_step_that_does_not_fit_is_no_other_step(library: Library) -> None:
    ours, theirs = both_ends(library, max_tokens=4)
    with pytest.raises(EngineDead, match="a step of 32 tokens does not fit"):
        ours.post_step(a_step(4, 8))
    assert not theirs.wait(0.001)
