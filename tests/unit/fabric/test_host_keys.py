"""What hosts are called, and what a later controller learns from it."""

from __future__ import annotations

from headrace.fabric.host_keys import further_keys, group_of, incarnation_of, is_key, make_key, reservation_of


def test_a_host_alone_has_its_reservations_key() -> None:
    key = make_key("chat-1", "0001-ab")
    assert key == "chat-1#0001-ab"
    assert (group_of(key), incarnation_of(key)) == ("chat-1", "0001-ab")
    assert further_keys(key) == []
    assert reservation_of(key) == (key, 0)


def test_a_key_says_how_many_hosts_there_are_and_each_host_which_one_it_is() -> None:
    key = make_key("org/chat-1", "0001-ab", 3)
    others = further_keys(key)
    assert others == [f"{key}/1", f"{key}/2"]
    assert [reservation_of(each) for each in (key, *others)] == [(key, 0), (key, 1), (key, 2)]
    assert {group_of(each) for each in (key, *others)} == {"org/chat-1"}
    assert further_keys(others[0]) == []


def test_later_incarnations_sort_after_earlier_ones_however_many_hosts() -> None:
    keys = [make_key("b", "0001-x", 9), make_key("a", "0002-a"), make_key("c", "0003-b", 2)]
    assert sorted(keys, key=incarnation_of) == keys


def test_other_names_are_no_keys() -> None:
    assert not is_key("controller")
    assert is_key("chat-1#1")
