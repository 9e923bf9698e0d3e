"""The one loader of the config tree: file < environment (HEADRACE__SECTION__FIELD) < --set section.field=x.

Owns reading, merging and error messages. Must not know what settings mean (`headrace.api.config` does).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from headrace.api.config import Config
from headrace.errors import ConfigError

ENVIRONMENT_PREFIX = "HEADRACE__"


def load_config(
    path: str | Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    settings: Sequence[str] = (),
) -> Config:
    """Read, merge and check a config.

    path: a YAML file, or None for an empty base. environment: HEADRACE__A__B=value sets a.b (in lower case).
    settings: `a.b=value`, values in YAML. Raises ConfigError with every problem, one line each.
    """
    tree = read_file(path) if path is not None else {}
    for name, value in sorted((environment or {}).items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            _assign(tree, keys, _parse_value(value, name), name)
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator or not name:
            raise ConfigError(f"--set {setting!r}: write section.field=value")
        _assign(tree, name.split("."), _parse_value(value, name), f"--set {name}")
    return parse_config(tree, source=str(path) if path is not None else "config")


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a YAML file into a mapping. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. Give the config's path, or start from examples/quickstart.yaml."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506, a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: the top level is a {type(tree).__name__}; it must be a mapping of sections"
        )
    return tree


def parse_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Check a mapping against the tree. Raises ConfigError with every problem, one line each."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([line for item in error.errors() for line in _describe(item, source)]) from error


def dump_config(config: Config) -> str:
    """Return the whole resolved tree as YAML, defaults included."""
    text: str = yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)
    return text


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's own rule is that the last of two equal keys wins in silence; a config deserves an error."""


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key_node, deep=True) for key_node, _ in node.value]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} appears twice", node.value[index][0].start_mark
            )
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key_node, deep=True): loader.construct_object(value_node, deep=True)
        for key_node, value_node in node.value
    }


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _parse_value(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {text!r} is not valid YAML: {' '.join(str(error).split())}") from error


def _assign(tree: dict[str, Any], keys: Sequence[str], value: Any, name: str) -> None:
    for position, key in enumerate(keys[:-1]):
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"{name}: {'.'.join(keys[: position + 1])} is {child!r}, not a section, "
                f"so it has no field {keys[-1]!r}"
            )
        tree = child
    tree[keys[-1]] = value


def _describe(item: Any, source: str) -> list[str]:
    """Return one line per problem; a rule about several sections names the paths itself."""
    location = item["loc"]
    if not location and item["type"] == "value_error":
        return [f"{source}: {line}" for line in item["msg"].removeprefix("Value error, ").splitlines()]
    return [_describe_field(item, location, source)]


def _describe_field(item: Any, location: Sequence[Any], source: str) -> str:
    path = ".".join(str(part) for part in location)
    got = item["input"]
    shown = (
        f"got {got!r}" if isinstance(got, str | int | float | bool | None) else f"got a {type(got).__name__}"
    )
    if item["type"] == "extra_forbidden":
        allowed = _known_keys(location[:-1])
        guess = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f" Did you mean {guess[0]!r}?" if guess else ""
        return f"{source}: {path}: unknown key.{hint} Known keys: {', '.join(allowed)}."
    if item["type"] == "missing":
        return f"{source}: {path}: missing; it must be given"
    message = item["msg"].removeprefix("Value error, ")
    return f"{source}: {path or 'config'}: {message} ({shown})"


def _known_keys(location: Sequence[Any]) -> list[str]:
    """Field names of the section at `location` in the tree."""
    section: type[BaseModel] | None = Config
    parts = list(location)
    while parts and section is not None:
        field = section.model_fields.get(str(parts.pop(0)))
        annotation: Any = field.annotation if field else None
        arguments: tuple[Any, ...] = getattr(annotation, "__args__", ())
        if len(arguments) == 2 and parts:  # dict[str, Section]: skip the name
            parts.pop(0)
            annotation = arguments[1]
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return sorted(section.model_fields) if section is not None else []
