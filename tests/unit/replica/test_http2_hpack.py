"""Header compression: the RFC's examples, a second implementation, and blocks that lie."""

from __future__ import annotations

import contextlib

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.replica.http2_frames import ErrorCode, Http2Error
from headrace.replica.http2_hpack import STATIC_TABLE, TABLE_BYTES, HpackDecoder, encode_field, encode_status
from headrace.replica.http2_huffman import decode_huffman

PLENTY = 1 << 20
FIELDS = st.lists(
    st.tuples(
        st.sampled_from([name for name, _ in STATIC_TABLE] + ["x-one", "x-two"]),
        st.text(st.characters(max_codepoint=255), max_size=40),
    ),
    max_size=12,
)
RFC_EXCHANGES = [
    # RFC 7541, C.3 and C.4: three requests on one connection, without and with Huffman coding.
    (
        "828684410f7777772e6578616d706c652e636f6d",
        "828684be58086e6f2d6361636865",
        "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
    ),
    (
        "828684418cf1e3c2e5f23a6ba0ab90f4ff",
        "828684be5886a8eb10649cbf",
        "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
    ),
]


@pytest.mark.parametrize("blocks", RFC_EXCHANGES)
def test_the_rfcs_examples_are_understood(blocks: tuple[str, ...]) -> None:
    decoder = HpackDecoder(PLENTY)
    first, second, third = (decoder.decode(bytes.fromhex(block)) for block in blocks)
    common = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")]
    assert first == common
    assert second == [*common, ("cache-control", "no-cache")]
    assert third == [
        *((":method", "GET"), (":scheme", "https"), (":path", "/index.html")),
        *((":authority", "www.example.com"), ("custom-key", "custom-value")),
    ]


def test_huffman_strings_end_only_where_they_may() -> None:
    assert decode_huffman(bytes.fromhex("f1e3c2e5f23a6ba0ab90f4ff")) == b"www.example.com"
    assert decode_huffman(b"") == b""
    for wrong in ("ff", "f1e3c2e5f23a6ba0ab90f4ffff", "fffffffc", "18"):
        with pytest.raises(Http2Error):
            decode_huffman(bytes.fromhex(wrong))


@given(st.lists(FIELDS, max_size=6), st.booleans(), st.lists(st.sampled_from([0, 60, 200, 4096]), max_size=6))
def test_what_another_implementation_encodes_is_decoded(
    lists: list[list[tuple[str, str]]], is_huffman: bool, sizes: list[int]
) -> None:
    encoder, decoder = hpack.Encoder(), HpackDecoder(PLENTY)
    for index, fields in enumerate(lists):
        if index < len(sizes):
            encoder.header_table_size = sizes[index]
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
        block = encoder.encode(pairs, huffman=is_huffman)
        assert decoder.decode(block) == fields


@given(FIELDS)
def test_what_we_encode_another_implementation_decodes(fields: list[tuple[str, str]]) -> None:
    block = b"".join(encode_field(name, value) for name, value in fields)
    expected = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
    assert [tuple(field) for field in hpack.Decoder().decode(block, raw=True)] == expected
    assert HpackDecoder(PLENTY).decode(block) == fields


@pytest.mark.parametrize("status", [100, 200, 204, 404, 413, 500, 503])
def test_statuses_are_encoded(status: int) -> None:
    assert HpackDecoder(PLENTY).decode(encode_status(status)) == [(":status", str(status))]


@given(FIELDS, st.booleans())
def test_a_block_cut_anywhere_is_an_error_or_a_shorter_list(
    fields: list[tuple[str, str]], is_huffman: bool
) -> None:
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
    block = hpack.Encoder().encode(pairs, huffman=is_huffman)
    for end in range(len(block)):
        decoded: list[tuple[str, str]] | None = []
        with contextlib.suppress(Http2Error):
            decoded = HpackDecoder(PLENTY).decode(block[:end])
        assert decoded is not None
        assert decoded == fields[: len(decoded)]


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_no_bytes_break_a_decoder_or_make_its_table_grow(blocks: list[bytes]) -> None:
    decoder = HpackDecoder(1000)
    for block in blocks:
        try:
            fields = decoder.decode(block)
        except Http2Error:
            pass
        else:
            assert sum(len(name) + len(value) + 32 for name, value in fields or ()) <= 1000
        assert decoder.table_bytes <= TABLE_BYTES


def test_a_header_bomb_gives_no_list_and_the_table_goes_on() -> None:
    decoder = HpackDecoder(8192)
    # One entry that fills the table, and 10,000 references to it: 40 MB of headers in 14 kB.
    bomb = b"\x40\x01x\x7f\xa1\x1e" + b"v" * 4000 + b"\xbe" * 10_000
    assert decoder.decode(bomb) is None
    assert decoder.decode(b"\xbe") == [("x", "v" * 4000)]


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (b"\x80", "index 0"),
        (b"\xff\x00", "an entry that is not there"),
        (b"\x7f\xff\xff\xff\xff\xff\x0f", "an endless number"),
        (b"\x82\x20", "a table size behind a field"),
        (b"\x3f\xe2\x1f", "a table larger than offered"),
        (b"\x00\x05ab", "a string longer than the block"),
    ],
)
def test_a_block_that_lies_is_an_error_of_the_connection(block: bytes, why: str) -> None:
    with pytest.raises(Http2Error) as caught:
        HpackDecoder(PLENTY).decode(block)
    assert caught.value.code is ErrorCode.COMPRESSION_ERROR, why
