"""Forms become grammars; what cannot work is refused with words for the client, and quickly."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from headrace.replica.grammar_text import GrammarError, _Bytes, write_grammar

CPU_LIMIT_S = 1.0


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(LLTokenizer(_Bytes(), slices=[]), grammar)  # type: ignore[arg-type]
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def schema(value: Any) -> str:
    return write_grammar("json", json.dumps(value))


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"a/b", "a/b", "a"),
        (r"a\/b", "a/b", "a\\/b"),
        (r"\d+", "07", "٣"),
        (r"^ab$", "ab", "abc"),
        ('say "hi"\n', 'say "hi"\n', "say hi\n"),
        (r"[é-ü]+😀", "éü😀", "e😀"),
        (r"(?i)yes", "yEs", "no"),
        (r"<\|x\|>", "<|x|>", "x"),
    ],
)
def test_a_pattern_matches_the_whole_answer(pattern: str, good: str, bad: str) -> None:
    grammar = write_grammar("regex", pattern)
    assert accepts(grammar, good)
    assert not accepts(grammar, bad)
    assert not accepts(grammar, good + "!")


def test_choices_are_taken_literally() -> None:
    choices = ["a", "ab", 'q"uote', "back\\slash", "line\nend", "größer 😀", "tab\t\x01", "/x/", ""]
    grammar = write_grammar("choice", json.dumps(choices))
    assert all(accepts(grammar, choice) for choice in choices)
    assert not accepts(grammar, "abc")
    many = write_grammar("choice", json.dumps([f"option {i}" for i in range(5000)]))
    assert accepts(many, "option 4999")
    assert not accepts(many, "option 5000")
    assert accepts(write_grammar("choice", '[""]'), "")


@pytest.mark.parametrize(
    "text",
    [
        'start: "SELECT " ("a" | "b")',
        'root ::= "SELECT " col\ncol ::= "a" | "b"',
        'start: x\nx[capture]: "SELECT " [stop]\nstop: "a" | "b" // stop[temperature=0.5]: <x>\n',
    ],
)
def test_grammars_come_in_larks_and_in_gbnfs_notation(text: str) -> None:
    grammar = write_grammar("grammar", text)
    assert accepts(grammar, "SELECT a")
    assert not accepts(grammar, "SELECT c")


def test_json_has_one_line_unless_the_schema_says_where_whitespace_is_allowed() -> None:
    numbers = {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "integer"}}}
    for text in ('{"a": [1, 2], "b":[1,2]}', "{}"):
        assert accepts(schema(numbers), text)
    for text in ('{ "a":[]}', '{"a":  []}', '{"a":[\n]}', '{"a" :[]}', '{"a":[1 ,2]}', '{"a":[]} '):
        assert not accepts(schema(numbers), text)
    compact = schema({**numbers, "x-guidance": {"whitespace_flexible": False}})
    assert accepts(compact, '{"a":[1,2]}')
    assert not accepts(compact, '{"a": [1,2]}')
    free = schema({**numbers, "x-guidance": {"whitespace_flexible": True}})
    assert accepts(free, '{\n\t"a" : [\r\n  1 ,  2]  }')


def test_a_schema_cannot_ask_to_be_lenient() -> None:
    with pytest.raises(GrammarError, match="format"):
        schema({"type": "string", "format": "nonsense", "x-guidance": {"lenient": True}})


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json", json.dumps({"type": "integer", "minimum": 5, "maximum": 3}), "minimum .5. is greater"),
        ("json", json.dumps({"allOf": [{"type": "string"}, {"type": "null"}]}), "Unsatisfiable"),
        ("json", json.dumps({"enum": []}), "empty"),
        ("json", json.dumps({"type": "x"}), "x"),
        ("json", json.dumps({"$ref": "http://example.com/x"}), "example"),
        ("json", json.dumps({"$ref": "#/$defs/a"}), "does not exist"),
        ("json", json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "nothing can"),
        ("json", json.dumps({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        ("regex", "(a", "unclosed group"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", r"[^\s\S]", "nothing can match"),
        ("grammar", "start: start", "nothing can match"),
        ("grammar", "start: nowhere", "unknown name"),
        ("grammar", "no grammar", "Expected token"),
        ("grammar", "", "no start rule"),
        ("grammar", 'a ::= "x"', "cannot be read"),
        ("grammar", "start: <|im_end|>", "special tokens"),
        ("grammar", "start: <[5]>", "special tokens"),
        ("grammar", 'start: "a"\n%llguidance {"no_forcing": false}', "options are not supported"),
        ("grammar", "start: a\na[temperature=0.5]: /x/", "temperature"),
        ("grammar", "start: a\na[stop=/y/]: /x/", "stop"),
        ("grammar", 'start: %json {"nullable": true}', "nullable"),
        ("grammar", 'start: %json {"x-guidance": {"lenient": true}}', "lenient"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(kind: Any, text: str, words: str) -> None:
    with pytest.raises(GrammarError, match=words) as caught:
        write_grammar(kind, text)
    assert "\n" not in str(caught.value)


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"type": "array", "items": value}
    return value


HOSTILE = {
    "nested schemas": ("json", json.dumps(nested(400))),
    "nested groups": ("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "nested rules": ("grammar", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "nested rules in GBNF": ("grammar", "root ::= " + "(" * 3_000 + '"a"' + ")" * 3_000),
    "repeated repetition": ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "optional repetition": ("regex", "(((((a?){100}){100}){100}){100}){100}"),
    "doubling rules": (
        "grammar",
        "\n".join(["start: a0", *(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)), 'a60: "x" | ""']),
    ),
    "crossed alternatives": (
        "json",
        json.dumps(
            {
                "allOf": [
                    {
                        "anyOf": [
                            {
                                "type": "object",
                                "properties": {f"k{i}_{j}": {"const": j}},
                                "required": [f"k{i}_{j}"],
                            }
                            for j in range(3)
                        ]
                    }
                    for i in range(10)
                ]
            }
        ),
    ),
    "many optional properties": (
        "json",
        json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(400)}}),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(HOSTILE))
def test_what_explodes_is_refused_in_less_cpu_time_than_the_limit(name: str) -> None:
    kind, text = HOSTILE[name]
    begin_s = time.process_time()
    with pytest.raises((GrammarError, RecursionError)):
        write_grammar(kind, text)  # type: ignore[arg-type]
    assert time.process_time() - begin_s < CPU_LIMIT_S
