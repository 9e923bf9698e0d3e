"""The event parser under arbitrary splits of the byte stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench import events
from headrace.bench.events import EventParser, EventTooLong

LINE = st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b"").replace(b"\r", b""))


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A byte stream and the data of its events."""
    newline = draw(st.sampled_from([b"\n", b"\r\n"]))
    stream, expected = b"", []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            stream += b": " + draw(LINE) + newline * draw(st.integers(1, 2))
        lines = draw(st.lists(LINE, min_size=1, max_size=3))
        prefix = draw(st.sampled_from([b"data: ", b"data:"]))
        if prefix == b"data:":
            lines = [line.lstrip(b" ") for line in lines]
        stream += b"".join(prefix + line + newline for line in lines) + newline
        expected.append(b"\n".join(lines))
    return stream, expected


@given(case=streams(), data=st.data())
def test_any_split_gives_the_same_events(case: tuple[bytes, list[bytes]], data: st.DataObject) -> None:
    stream, expected = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    parser = EventParser()
    found = [
        event
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for event in parser.feed(stream[start:end])
    ]
    assert found == expected
    assert parser.num_pending_bytes == 0


def test_an_event_without_an_end_stays_pending() -> None:
    parser = EventParser()
    assert parser.feed(b"data: half") == []
    assert parser.num_pending_bytes == 10
    assert parser.feed(b"\n\ndata: [DONE]\n\n") == [b"half", b"[DONE]"]


def test_fields_other_than_data_are_skipped() -> None:
    assert EventParser().feed(b"event: message\nid: 7\ndata: x\n\nretry: 5\n\n") == [b"x"]


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENT_BYTES", 100)
    with pytest.raises(EventTooLong, match="101 bytes"):
        EventParser().feed(b"d" * 101)
