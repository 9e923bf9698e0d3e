"""How much work a grammar may cause: when it is compiled, and at each token.

One place for front and engine, so that what a front's check accepts compiles in its engine: to compile, the
front allows half of what the engine does. Must not know requests.
"""

from __future__ import annotations

from llguidance import LLParserLimits

_COMPILE_FUEL = 1_000_000
_GRAMMAR_SYMBOLS = 500_000
# A mask usually costs 20 µs. These stop the worst near 10 ms, since all running requests wait for it.
_TOKEN_FUEL = 60_000
_TOKEN_ITEMS = 20_000
_ROW_ITEMS = 600
"""An ambiguous grammar's time grows with its square. An object may have 150 optional properties with it, and
any number of required ones."""
_LEXER_STATES = 50_000
"""At 1 to 2 kB each."""


def engine_limits() -> LLParserLimits:
    """Return the limits with which the engine compiles and matches."""
    return _limits(1)


def front_limits() -> LLParserLimits:
    """Return the limits with which a front tries a grammar before it sends it to its engine."""
    return _limits(2)


def _limits(compile_divisor: int) -> LLParserLimits:
    return LLParserLimits(
        initial_lexer_fuel=_COMPILE_FUEL // compile_divisor,
        max_grammar_size=_GRAMMAR_SYMBOLS // compile_divisor,
        step_lexer_fuel=_TOKEN_FUEL,
        step_max_items=_TOKEN_ITEMS,
        max_items_in_row=_ROW_ITEMS,
        max_lexer_states=_LEXER_STATES,
        verbose_errors=False,  # they would put a request's schema into logs
    )
