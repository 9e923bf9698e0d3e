"""Memory that a front holds for its engines: there for as long as one may come, and for no other engines."""

from __future__ import annotations

import os

import pytest
from tests.unit.replica.test_engine_sleep import FakeClient

from headrace.api.messages import EngineSpec, KvPlace
from headrace.replica.kept_memory import KeptMemory, can_keep


def test_it_is_one_and_the_same_until_it_is_given_back() -> None:
    memory = KeptMemory(is_wanted=True)
    assert memory.place is None
    descriptor = memory.open()
    assert memory.open() == descriptor
    assert memory.place == KvPlace(os.getpid(), descriptor)
    os.ftruncate(descriptor, 4096)
    memory.close()
    memory.close()
    assert memory.place is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


async def test_an_engine_that_ends_before_it_is_ready_leaves_nothing_to_the_next() -> None:
    """One that served leaves what it had; the last one of a front leaves nothing."""
    client = FakeClient(is_standby=False)
    client.kv_memory = KeptMemory(is_wanted=True)
    client.start()
    first = await client.next_process()
    first.become_ready()
    assert first.spec is not None
    assert first.spec.kv_descriptor == client.kv_memory.descriptor >= 0
    inode = os.fstat(client.kv_memory.descriptor).st_ino
    client.lose()
    second = await client.next_process()
    assert second.spec is not None
    assert os.fstat(second.spec.kv_descriptor).st_ino == inode
    client.lose()
    assert client.kv_place is None
    third = await client.next_process()
    assert third.spec is not None
    assert os.fstat(third.spec.kv_descriptor).st_ino != inode
    client.fail("no tokenizer")
    client.lose()
    assert client.kv_place is None
    await client.stop(0.01)


def test_engines_of_other_kinds_have_none() -> None:
    assert can_keep(EngineSpec("native", "m"))
    for spec in (
        EngineSpec("native", "m", tensor_parallel=2),
        EngineSpec("vllm", "m"),
        EngineSpec("simulated", "m"),
    ):
        memory = KeptMemory(can_keep(spec))
        assert memory.open() < 0
        assert memory.place is None


def test_a_system_without_such_memory_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str) -> int:
        raise OSError("not here")

    monkeypatch.setattr(os, "memfd_create", refuse)
    memory = KeptMemory(is_wanted=True)
    assert memory.open() < 0
    assert memory.place is None
