"""Writes docs/reference/config.md from the config tree: its docstrings, types, limits and defaults.

Run by `make docs`; a test fails when the page and the tree differ.
"""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from headrace.api import config, endpoint_config, node_config

PAGE = Path(__file__).parent / "reference" / "config.md"
HEAD = """# Config reference

Written from the config tree by `make docs`; do not edit.
Unknown keys are refused, and all errors are shown together.
A setting comes from the file, then the environment (`HEADRACE__GATEWAY__BIND=…`), then `--set`;
the last one wins. `headrace config show FILE` prints the whole resolved tree.
"""
SECTIONS = [
    ("(top level)", config.Config),
    ("endpoints.NAME", endpoint_config.Endpoint),
    ("endpoints.NAME.replicas", endpoint_config.Replicas),
    ("endpoints.NAME.queue", endpoint_config.Queue),
    ("endpoints.NAME.slo", endpoint_config.Slo),
    ("endpoints.NAME.scaling", endpoint_config.Scaling),
    ("endpoints.NAME.scaling.metrics", endpoint_config.CustomMetric),
    ("endpoints.NAME.rollout", endpoint_config.Rollout),
    ("endpoints.NAME.streams", endpoint_config.Streams),
    ("endpoints.NAME.nodes", node_config.NodeSettings),
    ("endpoints.NAME.nodes.prefer", node_config.NodeChoice),
    ("endpoints.NAME.native", endpoint_config.NativeEngine),
    ("endpoints.NAME.native.speculation", endpoint_config.Speculation),
    ("endpoints.NAME.vllm", endpoint_config.VllmEngine),
    ("endpoints.NAME.simulated", endpoint_config.SimulatedEngine),
    ("ray", node_config.Ray),
    ("gateway", config.Gateway),
    ("tenants.NAME", config.Tenant),
    ("tenants.NAME.limits", config.Limits),
]


def render() -> str:
    """Return the page."""
    meanings = read_meanings(inspect.getsource(config)) | read_meanings(inspect.getsource(endpoint_config))
    parts = [HEAD]
    for path, section in SECTIONS:
        about = " ".join((section.__doc__ or "").split())
        parts.append(f"## `{path}`\n{about}\n\n| setting | default | allowed | meaning |\n|---|---|---|---|")
        rows = []
        for name, field in section.model_fields.items():
            meaning = meanings.get((section.__name__, name), "see below")
            rows.append(
                f"| `{name}` | {describe_default(field)} | {describe_allowed(section, name)} | {meaning} |"
            )
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def read_meanings(source: str) -> dict[tuple[str, str], str]:
    """Return (class, field) -> the docstring below the field."""
    meanings = {}
    for section in ast.parse(source).body:
        if not isinstance(section, ast.ClassDef):
            continue
        for field, text in zip(section.body, section.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                meanings[section.name, field.target.id] = " ".join(str(text.value.value).split())
    return meanings


def describe_default(field: FieldInfo) -> str:
    """Return the default as YAML would have it."""
    if field.is_required():
        return "required"
    default: Any = field.default
    return "a section" if isinstance(default, BaseModel) else f"`{json.dumps(default)}`"


def describe_allowed(section: type[BaseModel], name: str) -> str:
    """Return type and limits, from the field's JSON schema."""
    schema = section.model_json_schema()["properties"][name]
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = {"integer": "whole number", "number": "number", "string": "text"}.get(
        schema.get("type", ""), "section"
    )
    low = [f"> {schema['exclusiveMinimum']:g}"] if "exclusiveMinimum" in schema else []
    low += [f"≥ {schema['minimum']:g}"] if "minimum" in schema else []
    high = [f"≤ {schema['maximum']:,}".removesuffix(".0")] if "maximum" in schema else []
    return ", ".join([kind, *low, *high])


if __name__ == "__main__":
    PAGE.write_text(render())
