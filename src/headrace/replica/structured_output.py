"""What a request says its answer must look like: OpenAI's `response_format` and vLLM's words for the same.

Pure. Owns the fields and what is wrong with them; a schema's keywords are `replica.json_schema`'s, and
whether it compiles `replica.grammar_checker`'s. Must not know engines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from headrace.api.openai import GenerationFields
from headrace.errors import InvalidRequest
from headrace.replica.grammar_messages import FormKind
from headrace.replica.json_schema import check_schema

MAX_FORM_CHARACTERS = 131_072
"""Of a schema, pattern, list of choices or grammar: larger ones compile in half a second and more, and each
request carries its own to the engine."""
MAX_CHOICES = 5_000
_SCHEMA_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ANY_OBJECT = {"type": "object"}
_RESPONSE_TYPES = "'text', 'json_object' and 'json_schema'"
_STRUCTURED_KEYS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True)
class OutputForm:
    """What an answer must match."""

    kind: FormKind
    text: str
    """json: the schema; choice: a list of texts (both as JSON); regex: a pattern; grammar: a grammar."""
    param: str
    """The field that asked for it, for errors."""


def read_form(fields: GenerationFields) -> OutputForm | None:
    """Return what the answer must match, or None for anything. Raises InvalidRequest."""
    forms = [form for form in (_read_response_format(fields.response_format), *_read_vllm(fields)) if form]
    if len(forms) > 1:
        names = " and ".join(form.param for form in forms)
        raise _wrong(forms[1].param, f"{names} were given; an answer can have one form, send one of them")
    if forms and len(forms[0].text) > MAX_FORM_CHARACTERS:
        size = len(forms[0].text)
        raise _wrong(forms[0].param, f"it has {size} characters; at most {MAX_FORM_CHARACTERS} are allowed")
    return forms[0] if forms else None


def _wrong(param: str, what: str, code: str = "invalid_value") -> InvalidRequest:
    return InvalidRequest(f"{param}: {what}", param=param, code=code)


# ---- OpenAI's words


def _read_response_format(value: Any) -> OutputForm | None:
    param = "response_format"
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _wrong(param, f"expected an object with a type of {_RESPONSE_TYPES}", "invalid_type")
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _json_form(_ANY_OBJECT, param)
    if kind == "json_schema":
        return _read_json_schema(value.get("json_schema"), f"{param}.json_schema")
    raise _wrong(f"{param}.type", f"got {_show(kind)}; supported are {_RESPONSE_TYPES}")


def _read_json_schema(value: Any, param: str) -> OutputForm:
    if value is None:
        raise _missing(param)
    if not isinstance(value, dict):
        raise _wrong(param, "expected an object with name and schema", "invalid_type")
    name = value.get("name")
    if name is None:
        raise _missing(f"{param}.name")
    if not (isinstance(name, str) and _SCHEMA_NAME.fullmatch(name)):
        allowed = "a name has 1 to 64 of the characters a-z, A-Z, 0-9, _ and -"
        raise _wrong(f"{param}.name", f"got {_show(name)}; {allowed}")
    strict = value.get("strict")
    if not (strict is None or isinstance(strict, bool)):
        raise _wrong(f"{param}.strict", f"got {_show(strict)}; it must be true or false", "invalid_type")
    if value.get("schema") is None:
        raise _missing(f"{param}.schema")
    return _json_form(value["schema"], f"{param}.schema")


def _missing(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} is missing; it is required", param=param, code="missing_required_parameter"
    )


# ---- vLLM's words


def _read_vllm(fields: GenerationFields) -> list[OutputForm | None]:
    return [
        _read_structured_outputs(fields.structured_outputs),
        _read_one("json", fields.guided_json, "guided_json"),
        _read_one("regex", fields.guided_regex, "guided_regex"),
        _read_one("choice", fields.guided_choice, "guided_choice"),
        _read_one("grammar", fields.guided_grammar, "guided_grammar"),
    ]


def _read_structured_outputs(value: Any) -> OutputForm | None:
    param = "structured_outputs"
    if value is None:
        return None
    allowed = f"it takes exactly one of {', '.join(_STRUCTURED_KEYS)}"
    if not isinstance(value, dict):
        raise _wrong(param, f"expected an object; {allowed}", "invalid_type")
    given = [key for key, content in value.items() if content is not None and content is not False]
    unknown = [key for key in given if key not in _STRUCTURED_KEYS]
    if unknown:
        raise _wrong(f"{param}.{unknown[0][:64]}", f"not supported; {allowed}", "unsupported_parameter")
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise _wrong(param, f"got {got}; {allowed}")
    return _read_one(given[0], value[given[0]], f"{param}.{given[0]}")


def _read_one(kind: str, value: Any, param: str) -> OutputForm | None:
    if value is None:
        return None
    if kind == "json":
        return _json_form(_decoded(value, param) if isinstance(value, str) else value, param)
    if kind == "json_object":
        if value is not True:
            raise _wrong(param, f"got {_show(value)}; it must be true or false", "invalid_type")
        return _json_form(_ANY_OBJECT, param)
    if kind == "choice":
        return _choice_form(value, param)
    if not (isinstance(value, str) and value):
        raise _wrong(param, f"got {_show(value)}; it must be a text, and not empty", "invalid_type")
    _check_text(value, param)
    return OutputForm("regex" if kind == "regex" else "grammar", value, param)


def _choice_form(value: Any, param: str) -> OutputForm:
    is_list = isinstance(value, list) and value and all(isinstance(choice, str) for choice in value)
    if not is_list:
        raise _wrong(param, "expected a list of texts, at least one", "invalid_type")
    if len(value) > MAX_CHOICES:
        raise _wrong(param, f"got {len(value)} choices; at most {MAX_CHOICES} are allowed")
    for choice in value:
        _check_text(choice, param)
    return OutputForm("choice", msgspec.json.encode(value).decode(), param)


def _json_form(schema: Any, param: str) -> OutputForm:
    if not isinstance(schema, dict):
        raise _wrong(param, "expected a JSON schema, which is an object", "invalid_type")
    check_schema(schema, param)
    try:
        text = msgspec.json.encode(schema).decode()
    except (UnicodeEncodeError, RecursionError, OverflowError) as error:
        raise _wrong(param, f"it cannot be written as JSON: {error}") from None
    return OutputForm("json", text, param)


def _decoded(text: str, param: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise _wrong(param, f"the text is not JSON: {error}", "invalid_json") from None


def _check_text(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"it has half of a surrogate pair at character {error.start}; send whole characters"
        raise _wrong(param, what) from None


def _show(value: Any) -> str:
    return repr(value)[:60]
