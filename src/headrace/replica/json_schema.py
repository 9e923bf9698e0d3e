"""Which keywords of JSON Schema an answer can be held to. Every other keyword is refused by name.

The compiler takes unknown keywords for remarks, as the standard says, and would leave `nullable` or a
misspelt `maxlenght` without effect. Pure. Must not know requests or grammars.
"""

from __future__ import annotations

from typing import Any

from headrace.errors import InvalidRequest

MAX_SCHEMA_DEPTH = 60
"""Schemas within schemas. The compiler reads about 120 levels of JSON, two for each."""
_ASSERTIONS = frozenset(
    (
        *("type", "enum", "const", "required", "$ref", "pattern", "format", "minLength", "maxLength"),
        *("multipleOf", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"),
        *("minItems", "maxItems", "minProperties", "maxProperties"),
    )
)
_REMARKS = frozenset(
    (
        *("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly"),
        *("$schema", "$id", "id", "$anchor", "$comment", "contentEncoding", "contentMediaType"),
        *("discriminator", "x-guidance"),
    )
)
_ONE_SCHEMA = frozenset(("items", "additionalProperties"))
_SCHEMA_LISTS = frozenset(("anyOf", "oneOf", "allOf", "prefixItems"))
_SCHEMA_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_SUPPORTED = _ASSERTIONS | _REMARKS | _ONE_SCHEMA | _SCHEMA_LISTS | _SCHEMA_MAPS
_MAX_NAMED = 5


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Raise InvalidRequest, naming them, if `schema` has keywords that answers cannot be held to, or is
    nested too deeply. What the keywords' values mean is left to the compiler."""
    unsupported: dict[str, str] = {}
    open_schemas: list[tuple[Any, str, int]] = [(schema, "", 1)]
    while open_schemas:
        part, path, depth = open_schemas.pop()
        if not isinstance(part, dict):
            continue  # true, false; the compiler complains of anything else
        if depth > MAX_SCHEMA_DEPTH:
            raise InvalidRequest(
                f"{param}: schemas are nested more than {MAX_SCHEMA_DEPTH} deep; use $defs and $ref",
                param=param,
                code="invalid_json_schema",
            )
        for key, value in part.items():
            if key not in _SUPPORTED and not key.startswith("x-"):
                unsupported.setdefault(key, path)
            open_schemas += [(inner, f"{path}/{where}", depth + 1) for where, inner in _inner(key, value)]
    if unsupported:
        named = ", ".join(
            f"{key[:40]} (in {path or '/'})" for key, path in list(unsupported.items())[:_MAX_NAMED]
        )
        raise InvalidRequest(
            f"{param}: keywords that are not supported: {named}; supported are "
            f"{', '.join(sorted(_SUPPORTED - _REMARKS))}",
            param=param,
            code="invalid_json_schema",
        )


def _inner(key: str, value: Any) -> list[tuple[str, Any]]:
    """Return the schemas within the value of a keyword, each with its path."""
    if key in _ONE_SCHEMA:
        return [(key, value)]
    if key in _SCHEMA_LISTS and isinstance(value, list):
        return [(f"{key}/{index}", inner) for index, inner in enumerate(value)]
    if key in _SCHEMA_MAPS and isinstance(value, dict):
        return [(f"{key}/{name[:40]}", inner) for name, inner in value.items()]
    return []
