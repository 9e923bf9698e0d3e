"""Keys and values that outlive their engine: what the next one and a sibling make of them, and what they do
not believe. With the fake runner, whose tokens are wrong if any slot is."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engine.test_native import greedy, make_engine, run_to_end

from headrace.api.messages import KV_MEMORY_NAME, GenerationRequest, KvPlace
from headrace.engine.fake_runner import FakeRunner
from headrace.engine.kv_file import KvFile, KvLayout, held_bytes, identity_of
from headrace.engine.native import NativeEngine

PROMPT = [1 + k * 7 % 60 for k in range(40)]
NUM_BLOCKS = 24


@pytest.fixture
def memory() -> Iterator[Callable[[], int]]:
    """Makes memory that a front would hold."""
    descriptors: list[int] = []

    def make() -> int:
        descriptors.append(os.memfd_create(KV_MEMORY_NAME))
        return descriptors[-1]

    yield make
    for descriptor in descriptors:
        os.close(descriptor)


def start(descriptor: int, num_blocks: int = NUM_BLOCKS, block_size: int = 8) -> NativeEngine:
    return make_engine(FakeRunner(num_blocks, block_size, kv_descriptor=descriptor))


def right_tokens(request: GenerationRequest) -> list[int]:
    plain = msgspec.structs.replace(request, kv_place=None)
    return run_to_end(make_engine(FakeRunner(64)), plain)[request.request_id].token_ids


def run_then_die(engine: NativeEngine, request: GenerationRequest, num_steps: int) -> list[int]:
    """Step an engine some way through a request, and never again. Return the tokens that it gave."""
    engine.submit(request)
    tokens: list[int] = []
    for _ in range(num_steps):
        for output in engine.step().outputs:
            tokens += output.token_ids
    return tokens


def resumed(request: GenerationRequest, tokens: list[int], place: KvPlace | None = None) -> GenerationRequest:
    return msgspec.structs.replace(request, resume_from=tokens, kv_place=place)


def here(descriptor: int) -> KvPlace:
    return KvPlace(os.getpid(), descriptor)


def test_the_next_engine_begins_with_what_the_last_one_computed(memory: Callable[[], int]) -> None:
    descriptor = memory()
    request = greedy("r", PROMPT, 30)
    tokens = run_then_die(start(descriptor), request, 20)
    outcome = run_to_end(start(descriptor), resumed(request, tokens))["r"]
    assert tokens + outcome.token_ids == right_tokens(request)
    assert outcome.cached[0] == 40, "all of the prompt"


def test_a_sibling_copies_what_an_engine_that_is_gone_computed(memory: Callable[[], int]) -> None:
    descriptor = memory()
    request = greedy("r", PROMPT, 30)
    tokens = run_then_die(start(descriptor), request, 21)
    sibling = start(memory(), num_blocks=40)
    sibling.submit(resumed(request, tokens, here(descriptor)))
    num_imported = sibling.load().num_imported_tokens
    assert num_imported == (len(PROMPT) + len(tokens) - 1) // 8 * 8, "every full block"
    outcome = run_to_end(sibling)["r"]
    assert tokens + outcome.token_ids == right_tokens(request)
    assert outcome.cached[0] == 40
    # What is copied is a cached prefix like any other, and can be copied on.
    third = start(memory())
    third.submit(resumed(request, tokens, here(descriptor)))
    assert third.load().num_imported_tokens == num_imported


def test_what_is_here_is_not_copied_and_other_salts_find_nothing(memory: Callable[[], int]) -> None:
    descriptor, sibling = memory(), start(memory())
    run_then_die(start(descriptor), greedy("r", PROMPT, 10), 10)
    run_to_end(sibling, greedy("own", PROMPT[:16], 2))
    sibling.submit(resumed(greedy("r", PROMPT, 10), [], here(descriptor)))
    assert sibling.load().num_imported_tokens == 16, "blocks 3 and 4; the fifth has the last token"
    stranger = resumed(greedy("s", PROMPT, 10, cache_salt="another tenant"), [], here(descriptor))
    sibling.submit(stranger)
    assert sibling.load().num_imported_tokens == 16
    assert run_to_end(sibling)["s"].token_ids == right_tokens(stranger)


def test_a_copy_takes_no_block_that_is_in_use_and_costs_no_prefix_of_its_own(
    memory: Callable[[], int],
) -> None:
    descriptor = memory()
    run_then_die(start(descriptor), greedy("r", PROMPT, 10), 10)
    small = start(memory(), num_blocks=8)
    run_to_end(small, greedy("own", PROMPT[:16], 2))
    small.submit(greedy("busy", [3] * 30, 8))
    small.step()
    small.submit(resumed(greedy("r", PROMPT, 10), [], here(descriptor)))
    small.check_integrity()
    outcomes = run_to_end(small)
    assert outcomes["r"].token_ids == right_tokens(greedy("r", PROMPT, 10))
    assert outcomes["r"].cached[0] >= 16


def test_numbers_that_name_no_memory_of_this_model_cost_a_computation_and_nothing_else(
    memory: Callable[[], int], tmp_path: Path
) -> None:
    request = greedy("r", PROMPT, 10)
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(file, b"hdrckv01" + b"?" * 5000)
    other_model, empty = memory(), memory()
    run_then_die(start(other_model, block_size=16), request, 5)
    folder = os.open(tmp_path, os.O_RDONLY)
    descriptors = [ours.fileno(), read_end, write_end, file, other_model, empty, folder, 9999, -1]
    places = [*map(here, descriptors), KvPlace(2**30, 3), KvPlace(-1, 3)]
    engine = start(memory())
    for number, place in enumerate(places):
        one = msgspec.structs.replace(request, request_id=f"r{number}", cache_salt=str(number))
        outcome = run_to_end(engine, resumed(one, [], place))[one.request_id]
        assert outcome.token_ids == right_tokens(one), place
    assert engine.load().num_imported_tokens == 0
    for descriptor in (read_end, write_end, file, folder):
        os.close(descriptor)
    ours.close()
    theirs.close()


@settings(max_examples=150, deadline=None)
@given(
    num_steps=st.integers(1, 30),
    damage=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=40)), max_size=6),
    cut=st.one_of(st.none(), st.floats(0, 1)),
)
def test_whatever_was_written_there_the_tokens_are_right(
    num_steps: int, damage: list[tuple[float, bytes]], cut: float | None
) -> None:
    """By a broken process, anywhere: a block is taken for what it was or not at all."""
    descriptor, own = os.memfd_create(KV_MEMORY_NAME), os.memfd_create(KV_MEMORY_NAME)
    try:
        request = greedy("r", PROMPT, 30)
        tokens = run_then_die(start(descriptor), request, num_steps)
        size = os.fstat(descriptor).st_size
        for place, data in damage:
            os.pwrite(descriptor, data, int(place * (size - 1)))
        if cut is not None:
            os.ftruncate(descriptor, int(cut * size))
        right = right_tokens(request)
        sibling = run_to_end(start(own), resumed(request, tokens, here(descriptor)))["r"]
        assert tokens + sibling.token_ids == right
        restarted = start(descriptor)
        assert tokens + run_to_end(restarted, resumed(request, tokens))["r"].token_ids == right
        restarted.check_integrity()
    finally:
        os.close(descriptor)
        os.close(own)


def test_a_damaged_block_ends_the_prefix_and_is_used_anew(memory: Callable[[], int]) -> None:
    descriptor = memory()
    run_then_die(start(descriptor), greedy("r", PROMPT, 10), 10)
    layout = KvLayout(identity_of(["fake", 8]), NUM_BLOCKS, 2, 64)
    file = KvFile(descriptor, layout)
    [third] = [block for block in file.found() if file.parts_of(block)[1][0] == 16]
    os.pwrite(descriptor, b"\x77", layout.place_of(0, third) + 9)
    for engine in (start(memory()), start(descriptor)):
        request = resumed(greedy("r", PROMPT, 10), [], here(descriptor))
        outcome = run_to_end(engine, request)["r"]
        assert outcome.token_ids == right_tokens(request)
        assert outcome.cached[0] == 16


def test_an_engine_that_sleeps_gives_the_memory_back(memory: Callable[[], int]) -> None:
    descriptor = memory()
    engine = start(descriptor)
    request = greedy("r", PROMPT, 10)
    right = run_to_end(engine, request)["r"].token_ids
    assert held_bytes(descriptor) > 0
    engine.sleep(1)
    assert held_bytes(descriptor) == 0
    sibling = start(memory())
    assert run_to_end(sibling, resumed(request, [], here(descriptor)))["r"].token_ids == right
    engine.wake()
    assert run_to_end(engine, request)["r"].token_ids == right
    assert start(descriptor).describe().num_total_blocks == NUM_BLOCKS


def test_memory_of_another_size_or_model_begins_anew(memory: Callable[[], int]) -> None:
    descriptor = memory()
    request = greedy("r", PROMPT, 10)
    for num_blocks, block_size in ((24, 8), (20, 8), (20, 16), (24, 8)):
        outcome = run_to_end(start(descriptor, num_blocks, block_size), request)["r"]
        assert outcome.cached[0] == 0
        assert outcome.token_ids == right_tokens(request)


def test_evicted_blocks_are_forgotten_before_they_are_written(memory: Callable[[], int]) -> None:
    descriptor = memory()
    engine = start(descriptor, num_blocks=12)
    for number in range(8):
        run_to_end(engine, greedy(f"r{number}", [number + 1] * 40, 4))
    run_then_die(engine, greedy("last", [50] * 40, 4), 3)  # it has begun to fill a block
    found = start(descriptor, num_blocks=12)._runner.kv_file
    assert found is not None
    assert len(found.found()) == 11
    assert all(found.is_intact(block) for block in list(found.found()))
