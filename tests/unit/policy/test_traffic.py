"""Parts of the requests for each version."""

from __future__ import annotations

from collections import Counter

from headrace.policy.traffic import MAX_OWN_WAIT_S, choose_version, own_wait_s

IDS = [f"hr-g1-{number:08x}" for number in range(4000)]


def test_each_version_gets_its_part_and_the_same_request_the_same_version() -> None:
    traffic = {"new": 0.1, "old": 0.9}
    counts = Counter(choose_version(request_id, traffic) for request_id in IDS)
    assert 320 < counts["new"] < 480
    assert counts["new"] + counts["old"] == len(IDS)
    assert all(choose_version(i, traffic) == choose_version(i, dict(traffic)) for i in IDS[:50])


def test_who_got_the_new_version_keeps_it_as_its_part_grows() -> None:
    early = {i for i in IDS if choose_version(i, {"new": 0.1, "old": 0.9}) == "new"}
    later = {i for i in IDS if choose_version(i, {"new": 0.5, "old": 0.5}) == "new"}
    assert early < later


def test_parts_of_zero_and_one_are_none_and_all() -> None:
    assert {choose_version(i, {"new": 0.0, "old": 1.0}) for i in IDS} == {"old"}
    assert {choose_version(i, {"new": 1.0, "old": 0.0}) for i in IDS} == {"new"}
    assert {choose_version(i, {}) for i in IDS[:9]} == {""}


def test_a_request_waits_for_its_own_version_a_second_at_most_and_less_where_an_early_token_is_promised() -> (
    None
):
    assert own_wait_s(0.0) == own_wait_s(60.0) == MAX_OWN_WAIT_S == 1.0
    assert own_wait_s(0.4) == 0.1
