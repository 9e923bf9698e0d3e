"""What an answer must match is read from every field that can say it, and wrong uses are refused by name."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from headrace.api.openai import ChatCompletionRequest, CompletionRequest, GenerationFields, RequestDecoder
from headrace.errors import InvalidRequest
from headrace.replica.json_schema import MAX_SCHEMA_DEPTH
from headrace.replica.structured_output import MAX_CHOICES, MAX_FORM_CHARACTERS, OutputForm, read_form

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
CHAT = RequestDecoder(ChatCompletionRequest)
COMPLETION = RequestDecoder(CompletionRequest)


def chat(**fields: Any) -> GenerationFields:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return CHAT.decode(msgspec.json.encode(body))


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "house", "schema": SCHEMA, **fields}}


@pytest.mark.parametrize(
    ("fields", "kind", "content", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json", {"type": "object"}, "response_format"),
        ({"response_format": json_schema()}, "json", SCHEMA, "response_format.json_schema.schema"),
        ({"response_format": json_schema(strict=True, description="d")}, "json", SCHEMA, None),
        ({"response_format": json_schema(strict=None)}, "json", SCHEMA, None),
        ({"structured_outputs": {"json": SCHEMA}}, "json", SCHEMA, "structured_outputs.json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json", SCHEMA, None),
        ({"structured_outputs": {"json_object": True}}, "json", {"type": "object"}, None),
        ({"structured_outputs": {"regex": "a+", "json": None}}, "regex", "a+", "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a+", "json_object": False}}, "regex", "a+", None),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ["a", "b"], "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: A"}}, "grammar", "start: A", None),
        ({"guided_json": SCHEMA}, "json", SCHEMA, "guided_json"),
        ({"guided_json": json.dumps(SCHEMA)}, "json", SCHEMA, "guided_json"),
        ({"guided_regex": "[0-9]"}, "regex", "[0-9]", "guided_regex"),
        ({"guided_choice": [""]}, "choice", [""], "guided_choice"),
        ({"guided_grammar": 'root ::= "x"'}, "grammar", 'root ::= "x"', "guided_grammar"),
        ({"guided_regex": "x", "response_format": {"type": "text"}}, "regex", "x", "guided_regex"),
    ],
)
def test_each_word_for_a_form_is_understood(
    fields: dict[str, Any], kind: str, content: Any, param: str | None
) -> None:
    form = read_form(chat(**fields))
    assert form is not None
    assert form.kind == kind
    assert (json.loads(form.text) if kind in ("json", "choice") else form.text) == content
    assert param in (None, form.param)


def test_the_order_of_properties_is_the_schemas() -> None:
    form = read_form(chat(guided_json=SCHEMA))
    assert form is not None
    assert list(json.loads(form.text)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    "fields", [{}, {"response_format": None}, {"response_format": {"type": "text"}}, {"guided_json": None}]
)
def test_without_a_form_anything_goes(fields: dict[str, Any]) -> None:
    assert read_form(chat(**fields)) is None


def test_completions_know_the_same_words() -> None:
    body = {"model": "m", "prompt": "x", "response_format": {"type": "json_object"}}
    form = read_form(COMPLETION.decode(msgspec.json.encode(body)))
    assert form == OutputForm("json", '{"type":"object"}', "response_format")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "'json_object'"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"response_format": {}}, "response_format.type", "None"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": []}},
            "response_format.json_schema",
            "expected an object",
        ),
        ({"response_format": json_schema(name=None)}, "response_format.json_schema.name", "missing"),
        ({"response_format": json_schema(name="a b")}, "response_format.json_schema.name", "1 to 64"),
        ({"response_format": json_schema(schema=None)}, "response_format.json_schema.schema", "missing"),
        ({"response_format": json_schema(schema=[])}, "response_format.json_schema.schema", "an object"),
        ({"response_format": json_schema(strict=1)}, "response_format.json_schema.strict", "true or false"),
        ({"structured_outputs": []}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {}}, "structured_outputs", "none of them"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "regex and json"),
        ({"structured_outputs": {"choices": ["a"]}}, "structured_outputs.choices", "exactly one of"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "true or false"),
        ({"guided_json": 3}, "guided_json", "JSON schema"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"guided_json": "true"}, "guided_json", "an object"),
        ({"guided_regex": ""}, "guided_regex", "not empty"),
        ({"guided_regex": ["a"]}, "guided_regex", "a text"),
        ({"guided_choice": []}, "guided_choice", "at least one"),
        ({"guided_choice": ["a", 1]}, "guided_choice", "list of texts"),
        ({"guided_choice": "ab"}, "guided_choice", "list of texts"),
        ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "guided_choice", str(MAX_CHOICES)),
        ({"guided_grammar": 1}, "guided_grammar", "a text"),
        ({"guided_regex": "a" * (MAX_FORM_CHARACTERS + 1)}, "guided_regex", str(MAX_FORM_CHARACTERS)),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "send one of them"),
        ({"response_format": json_schema(), "guided_choice": ["a"]}, "guided_choice", "send one of them"),
    ],
)
def test_a_wrong_use_is_refused_with_the_parameter_and_what_is_allowed(
    fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_form(chat(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"not": {"type": "string"}}, "not (in /)"),
        ({"properties": {"a": {"nullable": True}}}, "nullable (in /properties/a)"),
        ({"anyOf": [{}, {"uniqueItems": True}]}, "uniqueItems (in /anyOf/1)"),
        ({"items": {"if": {}, "then": {}}}, "if (in /items), then (in /items)"),
        ({"$defs": {"x": {"additionalProperties": {"maxlenght": 3}}}}, "maxlenght (in /$defs/x/additional"),
        ({"prefixItems": [{"contains": {}}]}, "contains (in /prefixItems/0)"),
    ],
)
def test_keywords_that_an_answer_cannot_be_held_to_are_named(schema: Any, keyword: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_form(chat(guided_json=schema))
    assert keyword in caught.value.message
    assert "additionalProperties, allOf, anyOf" in caught.value.message
    assert caught.value.code == "invalid_json_schema"


def test_names_and_values_are_not_taken_for_keywords() -> None:
    schema = {
        "title": "t",
        "properties": {
            "not": {"const": {"if": 1}},
            "contains": {"enum": [{"then": 2}], "default": {"else": 1}},
        },
        "x-anything": {"not": {}},
    }
    assert read_form(chat(guided_json=schema)) is not None


def test_schemas_that_are_nested_too_deeply_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(MAX_SCHEMA_DEPTH):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="nested"):
        read_form(chat(guided_json=schema))
