"""From what an answer must match to a grammar of llguidance, tried out before it goes to an engine.

Owns the grammar's dialect. Runs in the grammar worker, because a pattern from outside may take the library
any amount of time and memory. Must not know requests, processes or a model's vocabulary.
"""

from __future__ import annotations

import json
import re

import llguidance
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from headrace.engine.grammar_limits import front_limits
from headrace.errors import InvalidRequest
from headrace.replica.grammar_messages import FormKind
from headrace.replica.json_schema import check_schema

_OPTIONS = '%llguidance {"no_forcing": true}\n'
"""Any tokens that spell the text will do, as if the model were free: it prefers the usual ones by itself, and
the engine needs no tokenizer."""
_SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""JSON in one line, as most programs write it. Where any whitespace is allowed, small models fill answers
with line ends: SmolLM2 takes 2 to 3 times the tokens, and does not always come to an end."""
_SPACING_OPTIONS = frozenset((*_SPACING, "whitespace_pattern"))
_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(?://|#)[^\n]*')
_INLINE_SCHEMA = re.compile(r"%json\s*(?=\{)")
_RULE_OPTION = re.compile(r"^[ \t]*[\w-]+\[[^\]\n]*\b(temperature|max_tokens|stop\w*)\b[^\]\n]*\]\s*:", re.M)
"""What only an engine that samples for the library could honour."""
_TRIED_BYTES = 64
_END = 256
_NO_WHITESPACE = (1 << _END) - 1 ^ sum(1 << byte for byte in b" \n\r\t")
_MAX_ERROR_CHARACTERS = 400
_REGEX_ERROR = re.compile(r"regex parse error:.*\nerror: ([^\n]*)", re.S)
_POSITION = re.compile(r"^(?:at )?\d+\(\d+\):\s*")


class GrammarError(Exception):
    """The text is no grammar that can be matched. Says why, for the client."""


def write_grammar(kind: FormKind, text: str) -> str:
    """Return the grammar for `GenerationRequest.grammar`. Raises GrammarError."""
    if kind == "json":
        lark = f"start: %json {_schema(text)}"
    elif kind == "regex":
        lark = f"start: /{llguidance.regex_to_lark(text, use_ascii='d')}/"
    elif kind == "choice":
        lark = _one_of(set(json.loads(text)))
    else:
        lark = _checked_lark(text)
    grammar = json.dumps({"grammars": [{"lark_grammar": _OPTIONS + lark}]}, ensure_ascii=False)
    _try(grammar)
    return grammar


def _one_of(choices: set[str]) -> str:
    # One terminal: as many rules would be matched side by side, and meet a limit.
    texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in sorted(choices - {""}))
    if "" not in choices:
        return f"start: CHOICE\nCHOICE: {texts}"
    return f'start: CHOICE | ""\nCHOICE: {texts}' if texts else 'start: ""'


def _schema(text: str) -> str:
    schema = json.loads(text)
    options = schema.get("x-guidance")
    options = dict(options) if isinstance(options, dict) else {}
    if _SPACING_OPTIONS.isdisjoint(options):
        options |= _SPACING
    options["lenient"] = False
    return json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def _checked_lark(text: str) -> str:
    """Return a grammar in Lark's or GBNF's notation as Lark. Raises GrammarError."""
    lark = _from_gbnf(text) if "::=" in _QUOTED.sub("", text) else text
    plain = _QUOTED.sub('""', lark)
    if "%llguidance" in plain:
        raise GrammarError("%llguidance options are not supported; leave them out")
    if "<" in plain:
        raise GrammarError("special tokens (<...>) are never part of an answer; leave them out")
    option = _RULE_OPTION.search(plain)
    if option:
        raise GrammarError(f"the rule option {option[1]} is not supported; leave it out")
    for inline in _INLINE_SCHEMA.finditer(lark):
        _check_inline_schema(lark, inline.end())
    return lark


def _from_gbnf(text: str) -> str:
    try:
        return str(gbnf_to_lark(text)).replace("%llguidance {}", "", 1)
    except Exception as error:  # the converter raises whatever its parser meets
        raise GrammarError(f"the grammar cannot be read: {error}") from error


def _check_inline_schema(lark: str, place: int) -> None:
    try:
        schema, _ = json.JSONDecoder().raw_decode(lark, place)
    except ValueError:
        return  # the compiler says what is wrong with it, if it is one
    try:
        check_schema(schema, "%json")
    except InvalidRequest as error:
        raise GrammarError(error.message) from None
    options = schema.get("x-guidance")
    if isinstance(options, dict) and options.get("lenient"):
        raise GrammarError("%json: x-guidance.lenient would leave keywords without effect; leave it out")


def _try(grammar: str) -> None:
    """Compile the grammar over single bytes, and follow it a little way: whether anything can match it, and
    many a limit, shows at its first bytes. Raises GrammarError."""
    matcher = LLMatcher(LLTokenizer(_Bytes(), slices=[]), grammar, log_level=0, limits=front_limits())  # type: ignore[arg-type]
    for _ in range(_TRIED_BYTES):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little") & _NO_WHITESPACE
        if not mask:
            break
        matcher.consume_token((mask & -mask).bit_length() - 1)  # the lowest allowed byte
    if not matcher.is_error():
        return
    error = str(matcher.get_error()).strip()
    if error.startswith("NoExtension"):
        raise GrammarError("nothing can match it")
    raise GrammarError(_explain(error))


def _explain(error: str) -> str:
    """Return the library's words without where they are in our text, and without repeating the client's."""
    reason = _REGEX_ERROR.search(error)
    if reason is not None:
        return f"the pattern cannot be read: {reason[1]}"
    return _POSITION.sub("", error.partition("\n")[0])[:_MAX_ERROR_CHARACTERS]


class _Bytes:
    """A vocabulary of single bytes, as `LLTokenizer` reads it."""

    is_tokenizer_wrapper = True
    eos_token_id = _END
    bos_token_id = None
    special_token_ids = (_END,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"\xff<end>")

    def __call__(self, _text: bytes | str) -> list[int]:
        return []
