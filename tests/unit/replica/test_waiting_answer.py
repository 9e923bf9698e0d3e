"""A stream that begins before its answer: comments, then the answer's events, or one error event."""

from __future__ import annotations

from headrace.replica.waiting_answer import COMMENT_EVERY_S, WaitingAnswer

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def read_chunks(data: bytes) -> tuple[bytes, bool]:
    """Return the body of a chunked message, and whether it has its end."""
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        body, data = body + data[:length], data[length + 2 :]
        if not length:
            return body, True
    return body, False


def begin(eta_s: float = 12.0) -> tuple[WaitingAnswer, bytearray]:
    written = bytearray()
    answer = WaitingAnswer(written.extend, eta_s, 100.0)
    answer.begin(HEAD)
    assert written.startswith(HEAD)
    del written[: len(HEAD)]
    return answer, written


def test_comments_come_at_once_and_every_few_seconds_and_count_down() -> None:
    answer, written = begin()
    answer.tick(100.0 + COMMENT_EVERY_S - 0.1)
    answer.tick(100.0 + COMMENT_EVERY_S)
    answer.tick(100.0 + 20.0)
    body, is_whole = read_chunks(bytes(written))
    assert body.decode().split("\n\n") == [
        ": waiting for a replica, expected in 12 s",
        ": waiting for a replica, expected in 7 s",
        ": waiting for a replica, expected at any moment",
        "",
    ]
    assert not is_whole
    assert begin(-1.0)[1].endswith(b"for 0 s\n\n\r\n")


def test_the_answers_events_follow_whatever_their_coding_and_their_end_is_the_streams() -> None:
    answer, written = begin()
    real = b'data: {"a":1}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    coded = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(real), real)
    for position in range(len(coded)):
        assert answer.state in ("waiting", "streaming")
        answer.feed(coded[position : position + 1])
    assert answer.state == "ended"
    body, is_whole = read_chunks(bytes(written))
    assert (body.partition(b"\n\n")[2], is_whole) == (real, True)
    answer.tick(1e6)
    answer.feed(b"more")
    answer.end()
    assert read_chunks(bytes(written))[0] == body


def test_a_refusal_becomes_one_error_event_without_done() -> None:
    answer, written = begin()
    error = b'{"error":\n{"code":"overloaded"}}'
    answer.feed(b"HTTP/1.1 503 Unavailable\r\ncontent-length: %d\r\n\r\n%b" % (len(error), error))
    body, is_whole = read_chunks(bytes(written))
    assert body.endswith(b'\n\ndata: {"error": {"code":"overloaded"}}\n\n')
    assert is_whole
    assert answer.state == "ended"


def test_an_answer_that_is_cut_or_none_at_all_leaves_the_stream_visibly_cut() -> None:
    answer, written = begin()
    answer.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel")
    answer.end()
    assert (answer.state, read_chunks(bytes(written))[1]) == ("broken", False)
    answer, written = begin()
    answer.feed(b"no HTTP at all\r\n\r\n")
    assert (answer.state, read_chunks(bytes(written))[1]) == ("broken", False)
