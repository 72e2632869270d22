"""Reads a configuration file: YAML, `key.path=value` overrides, and mistakes explained. It knows no particular section.

It imports nothing heavy.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import Tag, ValidationError
from pydantic_core import ErrorDetails

from weaver_rl.errors import ConfigError
from weaver_rl.section import Section

SectionType = TypeVar("SectionType", bound=Section)


def load_file(kind: type[SectionType], path: Path, overrides: Sequence[str] = ()) -> SectionType:
    """Reads a YAML file and applies `key.path=value` overrides (values in YAML); `base_dir` is the file's directory.

    Raises:
        ConfigError: names each key, what was seen, what is allowed, and for an unknown key the nearest one.
    """
    data = read_yaml(path)
    for override in overrides:
        _apply_override(data, override)
    if data.get("base_dir") is None:
        data["base_dir"] = str(path.resolve().parent)
    return section(kind, data, str(path))


def section(kind: type[SectionType], data: dict[str, Any], where: str) -> SectionType:
    """One section alone, its mistakes explained like those of a whole configuration."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + explain(error, data, kind)) from None


def pairs(arguments: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as a mapping, nested by dots, values in YAML."""
    data: dict[str, Any] = {}
    for argument in arguments:
        _apply_override(data, argument)
    return data


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a ConfigError that says what is there instead."""
    try:
        data = _parse_yaml(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except _RepeatedKeyError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a mapping of keys is needed, seen {type(data).__name__}")
    return data


class _RepeatedKeyError(yaml.YAMLError):
    """A mapping that gives a key twice, of which YAML would silently drop the first."""


class _Loader(yaml.SafeLoader):
    """Reads what `yaml.safe_load` reads, but refuses a key given twice; `<<` may bring it a second time."""

    # Here, not in construct_mapping: there the keys of `<<` are already mixed with the mapping's own.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if (first := lines.get((key.tag, key.value))) is not None:
                where = f"in line {line}" if first == line else f"in lines {first} and {line}"
                raise _RepeatedKeyError(f"key {key.value!r} is given twice, {where}; keep one")
            lines[key.tag, key.value] = line
        return node


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise ConfigError(f"override {override!r}: the form is key.path=value, for example learner.learning_rate=1e-4")
    try:
        value = _parse_yaml(text)
    except _RepeatedKeyError as error:
        raise ConfigError(f"override {override!r}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
    keys = dotted.split(".")
    node: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        where = ".".join(keys[: depth + 1])
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise ConfigError(f"override {override!r}: {where} is no item of a list of {len(node)}")
            if last:
                node[int(key)] = value
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                if node.get(key) is None:
                    node[key] = {}
                node = node[key]
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(keys[:depth])} is {node!r}, it has no keys")


NEEDED = dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "a mapping of keys is needed")
NEEDED |= dict.fromkeys(("tuple_type", "list_type"), "a list is needed")
NEEDED |= {"too_short": "a list of at least {min_length} is needed", "path_type": "a path is needed"}
NEEDED |= dict.fromkeys(("int_type", "float_type"), "a number is needed")
"""In place of messages of pydantic that speak of Python's types and our classes."""


def explain(error: ValidationError, data: Any, kind: type[Section]) -> str:
    """One line per mistake: key, what was seen, what is allowed."""
    lines = []
    items = error.errors(include_url=False)
    for item in items:
        if any(
            len(other["loc"]) > len(item["loc"]) and other["loc"][: len(item["loc"])] == item["loc"] for other in items
        ):
            continue  # what pydantic says of a list whose item is wrong only repeats that
        key = ".".join(str(part) for part in _keys(item, data)) or "the configuration"
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: {_unknown_key(item['loc'], kind)}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing, must be given")
        elif item["type"] in ("union_tag_not_found", "union_tag_invalid"):
            lines.append(f"{key}.name: {_which_name(item, kind)}")
        elif item["type"] == "value_error":
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{key}: seen {item['input']!r}; {_needed(item)}")
    return "; ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines)


def _needed(item: ErrorDetails) -> str:
    if item["type"] in NEEDED:
        return NEEDED[item["type"]].format(**item.get("ctx", {}))
    return item["msg"][0].lower() + item["msg"][1:]


def _which_name(item: ErrorDetails, kind: type[Section]) -> str:
    """What stands in place of the name of one of several sections, and the names that may."""
    allowed = sorted(tag for tag, _ in _models_at(item["loc"], kind) if tag is not None)
    seen = item["input"].get("name") if isinstance(item["input"], dict) else item["input"]
    near = difflib.get_close_matches(str(seen), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{'missing' if seen is None else f'seen {seen!r}'}; allowed: {', '.join(allowed)}{hint}"


def _keys(item: ErrorDetails, data: Any) -> list[int | str]:
    """The part of a pydantic location that is really in the file (it also names the alternative of a union)."""
    keys: list[int | str] = []
    node = data
    for part in item["loc"]:
        inside = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if (isinstance(node, dict) and part in node) or inside:
            node = node[part]
            keys.append(part)
    return [*keys, item["loc"][-1]] if item["type"] == "missing" else keys


def _unknown_key(location: tuple[int | str, ...], root: type[Section]) -> str:
    """What is wrong with a key that a section does not have: the nearest that it has, else all of them."""
    *place, wrong = location
    allowed = sorted({name for _, model in _models_at(place, root) for name in model.model_fields})
    alternatives = dict(_models_at(place[:-1], root))
    kind = place[-1] if place and place[-1] in alternatives else None
    if kind not in (None, "custom") and any(wrong in model.model_fields for model in alternatives.values()):
        return f"{kind!r} has no {wrong}; allowed: {', '.join(allowed)}"
    if close := difflib.get_close_matches(str(wrong), allowed, n=1):
        return f"unknown key; did you mean {close[0]!r}?"
    whose = "a custom class's own keys" if kind == "custom" else "keys of what `name` names"
    hint = f"; {whose} go under args" if "args" in allowed else ""
    return f"unknown key; allowed: {', '.join(allowed)}{hint}" if allowed else "unknown key"


def _models_at(location: Sequence[int | str], root: type[Section]) -> list[tuple[str | None, type[Section]]]:
    """The sections that may stand at a location, each with its tag where it is one of several."""
    models: list[tuple[str | None, type[Section]]] = [(None, root)]
    for part in location:
        fields = [model.model_fields[part] for _, model in models if part in model.model_fields]
        inner = [found for field in fields for found in _models_in(field.annotation)]
        # An index says nothing about fields, and a tag (pydantic names it in the location) only narrows: stay here.
        models = inner or [(tag, model) for tag, model in models if tag == part] or models
    return models


def _models_in(annotation: Any, tag: str | None = None) -> list[tuple[str | None, type[Section]]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [(tag or _literal_name(annotation), annotation)]
    tags = [item.tag for item in getattr(annotation, "__metadata__", ()) if isinstance(item, Tag)]
    parts = getattr(annotation, "__args__", ())
    return [found for part in parts for found in _models_in(part, tags[0] if tags else tag)]


def _literal_name(model: type[Section]) -> str | None:
    field = model.model_fields.get("name")
    names = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    return str(names[0]) if len(names) == 1 else None
