"""A peer that stopped reading."""

from __future__ import annotations

from headrace.replica.write_stall import WriteStall


def test_a_peer_that_reads_a_little_is_not_stalled_and_one_that_reads_nothing_is() -> None:
    stall = WriteStall()
    stall.begin(1000, 10.0)
    assert not stall.is_over(1000, 12.0, 3.0)
    assert not stall.is_over(999, 13.5, 3.0)
    assert not stall.is_over(999, 16.0, 3.0)
    assert stall.is_over(1500, 16.6, 3.0)
    stall.begin(1500, 20.0)
    assert not stall.is_over(1500, 23.0, 3.0)
