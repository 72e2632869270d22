"""The configuration reference, made from the section classes: keys, types, limits, docstrings. It runs nothing.

`python -m weaver_rl.config_reference > docs/configuration.md` writes it anew; a test keeps the two equal.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from weaver_rl.config import RunConfig
from weaver_rl.rewards.config import BUILTINS
from weaver_rl.section import Section

HEAD = """\
# Configuration reference

Every key of a run's configuration file (`weaver-rl train CONFIG`). Made from the section classes by
`python -m weaver_rl.config_reference > docs/configuration.md`; change the classes, not this file.

- `weaver-rl show CONFIG [key.path=value …]` prints every key with the value that a run would have. The run folder keeps
  it as `config.yaml`.
- A key that is not here is an error that names the nearest one. Write `key.path=value` after the configuration to
  overrule it: `learner.learning_rate=1e-4 rewards.0.weight=0.5`.
- A default of – means that the key must be given. `null` is written `null` or left out.
- Where a section is one of several, its `name` says which.

The keys of a server (`weaver-rl serve CONFIG`) are in [service.md](service.md#configuration); its `models[].model`,
`models[].task`, `models[].learner`, `models[].sampler` and `cluster` are the sections `model`, `task`, `learner`,
`sampler` and `cluster` below.
"""
"""What stands above the tables."""

ANY_OTHER = "any other"
"""Stands for the names of an alternative that takes more than one."""

PLAIN = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    Any: "anything",
    dict: "mapping",
}
"""Names of types as a person would say them."""

LIMITS = {
    "ge": "≥ {}",
    "gt": "> {}",
    "le": "≤ {}",
    "lt": "< {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}
"""Constraints of pydantic, in the order in which they are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One row of a table.

    Example:
        Key(place="seed", kind="integer", default="`0`", allowed="≥ 0, < 2147483648", meaning="Everything random …")
    """

    place: str
    kind: str
    default: str
    allowed: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One section, at the place where it is first met.

    Example:
        Part(place="advantage", name="grpo", section=Grpo)
    """

    place: str
    name: str | None
    """What tells it from its alternatives; None where there are none."""
    section: type[Section]


def reference() -> str:
    """The whole document."""
    known: dict[type[Section], str] = {}
    parts = list(_parts(RunConfig, "", known))
    text = [HEAD]
    headed: set[str] = set()
    for part in parts:
        if part.name is not None and part.place not in headed:
            names = [other.name for other in parts if other.place == part.place and other.name is not None]
            text.append(
                f"## `{part.place}`\n\nOne of several, told apart by `name`: {', '.join(map(_named, names))}.\n"
            )
        headed.add(part.place)
        text.append(_heading(part))
        text.append(f"{docstring(part.section)}\n")
        text.append(_table(keys(part.section, part.place, known)))
    text.append(_rewards(known))
    return "\n".join(text)


def keys(section: type[Section], place: str, known: dict[type[Section], str]) -> list[Key]:
    """The rows of a section; `known` says where the sections inside it are described."""
    meaning = meanings(section)
    rows = []
    # The name says which section this is: first, wherever the class has it.
    for name, field in sorted(section.model_fields.items(), key=lambda item: item[0] != "name"):
        inner = sections_in(field.annotation)
        rows.append(
            Key(
                place=f"{place}.{name}" if place else name,
                kind=_kind(field, inner, known),
                default=_default(field, len(inner) > 1),
                allowed=_allowed(field),
                meaning=meaning.get(name, "Which of the alternatives this is."),
            )
        )
    return rows


def meanings(section: type[Section]) -> dict[str, str]:
    """What stands beneath each field, in the class or in what it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if not (issubclass(owner, Section) and owner is not Section):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[node.target.id] = " ".join(after.value.value.split())
    return found


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that may stand in place of a value, in order."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in sections_in(part)]


def docstring(section: type[Section]) -> str:
    """What a section says of itself, without its example."""
    return " ".join((inspect.getdoc(section) or "").partition("\nExample:")[0].split())


def _parts(
    section: type[Section], place: str, known: dict[type[Section], str], name: str | None = None
) -> Iterator[Part]:
    known[section] = place
    yield Part(place=place, name=name, section=section)
    for key, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        inside = (f"{place}.{key}" if place else key) + ("[]" if _is_list(field.annotation) else "")
        for alternative in inner:
            if alternative not in known:
                yield from _parts(alternative, inside, known, _name(alternative) if len(inner) > 1 else None)


def _name(section: type[Section]) -> str:
    """The `name` of an alternative; of the one that takes any name, what may stand there."""
    field = section.model_fields["name"]
    names = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return str(names[0]) if len(names) == 1 else ANY_OTHER


def _heading(part: Part) -> str:
    if not part.place:
        return "## The file\n"
    depth = "##" if part.name is None and "." not in part.place else "###"
    if part.name is None:
        return f"{depth} `{part.place}`\n"
    return f"{depth} `{part.place}`, `name`: {_named(part.name)}\n"


def _named(name: str) -> str:
    return name if name == ANY_OTHER else f"`{name}`"


def _table(rows: Sequence[Key]) -> str:
    lines = ["| Key | Type | Default | Allowed | Meaning |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| `{row.place}` | {row.kind} | {row.default} | {row.allowed} | {_cell(row.meaning)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text in a table: no bar ends the cell, and nothing outside of code is taken for HTML."""
    pieces = text.replace("|", "\\|").split("`")
    pieces[::2] = [piece.replace("<", "&lt;") for piece in pieces[::2]]
    return "`".join(pieces)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) in (tuple, list)


def _kind(field: FieldInfo, inner: list[type[Section]], known: dict[type[Section], str]) -> str:
    if not inner:
        return " or ".join(_plain(field.annotation))
    places = dict.fromkeys(known[section] for section in inner)
    kind = f"{'list of ' if _is_list(field.annotation) else ''}section{'s' if _is_list(field.annotation) else ''}"
    kind += " (" + ", ".join(f"`{place}`" for place in places) + ")"
    return f"{kind} or null" if NoneType in getattr(field.annotation, "__args__", ()) else kind


def _plain(annotation: Any) -> list[str]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _plain(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return list(dict.fromkeys(kind for part in get_args(annotation) for kind in _plain(part)))
    if origin is Literal:
        return [f"`{value}`" for value in get_args(annotation)]
    if annotation is NoneType:
        return ["null"]
    if origin in (tuple, list):
        return [f"list of {' or '.join(_plain(get_args(annotation)[0]))}"]
    return [PLAIN.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))]


def _default(field: FieldInfo, is_one_of_several: bool) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "–"
    if isinstance(value, Section):
        named = getattr(value, "name", None)
        return f"`name: {named}`" if is_one_of_several else "its own"
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return f"`{yaml.safe_dump(plain, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


def _allowed(field: FieldInfo) -> str:
    found: dict[str, str] = {}
    for item in field.metadata:
        for limit, words in LIMITS.items():
            value = getattr(item, limit, None)
            if value is not None:
                found[limit] = words.format(f"{value:g}" if isinstance(value, float) else value)
        if pattern := getattr(item, "pattern", None):
            found["pattern"] = f"`{pattern}`"
    return ", ".join(found.values()).replace("|", "\\|")


def _rewards(known: dict[type[Section], str]) -> str:
    """The arguments of the built-in rewards: sections too, but reached by name."""
    text = ["## `rewards[].args` of the built-in rewards\n"]
    for name, place in BUILTINS.items():
        module, _, attribute = place.partition(":")
        section = getattr(importlib.import_module(module), attribute)
        text.append(f"### `{name}`\n\n{docstring(section)}\n")
        # What is no plain value is given by the program, not by a file.
        rows = [row for row in keys(section, "args", known) if row.kind != "Callable"]
        text.append(_table(rows) if rows else "It takes no arguments.\n")
    return "\n".join(text)


if __name__ == "__main__":
    sys.stdout.write(reference())
