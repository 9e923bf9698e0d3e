"""Huffman decoding of header strings, four bits at a time.

Must not know header fields. Source: RFC 7541, 5.2 and appendix B. The code is canonical: the lengths alone
give it.
"""

from __future__ import annotations

from typing import Final

from headrace.replica.http2_frames import ErrorCode, Http2Error

_LENGTHS: Final = (
    "dnsssssssoussussssssssusssssssss6aacd68baa8b8666555666666678f6ca"
    "d67777777777777777777777878djde6f56565666577666567655677777fbeds"
    "kmkkmmmnmnnnnnonoomnonnnnlmnmnnomlkmmnnlnmmolmnnllmlnmnnkmmmnmmn"
    "qqkjmnmpqqqrrqopjlqrrqrollqqsrrrkoklmllnmmppooqnqrqqrrrrrsrrrrrq"
    "u"
)
"""Bits of each symbol's code, base 36; the last symbol ends a string and must not appear in one."""
_END: Final = 256
_Step = tuple[int, int]
"""Next node (-1: not a code), and the symbol that became complete (-1: none)."""


def _codes() -> list[tuple[int, int, int]]:
    """Return (code, its length, symbol), shortest first."""
    lengths = [int(digit, 36) for digit in _LENGTHS]
    codes, code, previous = [], 0, 0
    for symbol in sorted(range(len(lengths)), key=lambda symbol: (lengths[symbol], symbol)):
        code <<= lengths[symbol] - previous
        previous = lengths[symbol]
        codes.append((code, previous, symbol))
        code += 1
    return codes


def _build_tree() -> list[list[int]]:
    """Return nodes of two children each: another node's number, or -1 - symbol."""
    nodes = [[0, 0]]
    for code, length, symbol in _codes():
        node = 0
        for shift in range(length - 1, 0, -1):
            bit = code >> shift & 1
            if not nodes[node][bit]:
                nodes.append([0, 0])
                nodes[node][bit] = len(nodes) - 1
            node = nodes[node][bit]
        nodes[node][code & 1] = -1 - symbol
    return nodes


def _walk(nodes: list[list[int]], node: int, nibble: int) -> _Step:
    symbol = -1
    for shift in (3, 2, 1, 0):
        node = nodes[node][nibble >> shift & 1]
        if node < 0:
            symbol, node = -1 - node, 0
            if symbol == _END:
                return -1, -1
    return node, symbol


def _padding_nodes(nodes: list[list[int]]) -> frozenset[int]:
    """Return the nodes at which a string may end: up to seven ones, the beginning of the end symbol."""
    node, found = 0, [0]
    for _ in range(7):
        node = nodes[node][1]
        found.append(node)
    return frozenset(found)


_NODES: Final = _build_tree()
_STEPS: Final[tuple[_Step, ...]] = tuple(
    _walk(_NODES, node, nibble) for node in range(len(_NODES)) for nibble in range(16)
)
_PADDING: Final = _padding_nodes(_NODES)


def decode_huffman(data: bytes) -> bytes:
    """Return the string that `data` stands for: at most 1.6 times as long. Raises Http2Error."""
    text = bytearray()
    node = 0
    for byte in data:
        node, symbol = _STEPS[node << 4 | byte >> 4]
        if symbol >= 0:
            text.append(symbol)
        if node >= 0:
            node, symbol = _STEPS[node << 4 | byte & 15]
            if symbol >= 0:
                text.append(symbol)
        if node < 0:
            raise Http2Error(ErrorCode.COMPRESSION_ERROR, "a header string holds the end symbol")
    if node not in _PADDING:
        raise Http2Error(ErrorCode.COMPRESSION_ERROR, "a header string ends in the middle of a symbol")
    return bytes(text)
