"""docs/service.md says what the server does: its keys, endpoints and error codes are those of the code.

`python tests/unit/test_service_docs.py` prints the table of keys, to be put between the marks in the document.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from http_fakes import FakeService
from http_serving import face
from pydantic_core import PydanticUndefined

from weaver_rl.section import Section
from weaver_rl.service import config

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "service.md"
SOURCES = [*(ROOT / "weaver_rl" / "service").rglob("*.py"), *(ROOT / "actors").glob("*.py")]
PREFIX = "/api/v1"
NOT_SERVED = "not served"
REFUSALS, FAILURES = "refusals", "failures"


def text_between(mark: str) -> str:
    """The part of the document that tests keep true."""
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    text = DOCUMENT.read_text()
    assert text.count(begin) == text.count(end) == 1, mark
    return text.partition(begin)[2].partition(end)[0]


def rows(mark: str) -> list[list[str]]:
    """Cells of a table, without its head."""
    lines = [line for line in text_between(mark).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# -- keys ------------------------------------------------------------------------------------------------------------


def sections() -> dict[str, type[Section]]:
    """Every section of the file, by the place of its keys in a configuration."""
    whole, found = config.ServeConfig, {"": config.ServeConfig, "models[]": config.ServedModel}
    for name, field in whole.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and kind.__module__ == config.__name__:
            found[name] = kind
    return found


def meanings(section: type[Section]) -> dict[str, str]:
    """What stands below each field."""
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        node.target.id: " ".join(after.value.value.split())
        for node, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


def shown_default(value: Any) -> str:
    if value is PydanticUndefined:
        return "must be given"
    if isinstance(value, Section):
        return "see below"
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return f"`{yaml.safe_dump(plain, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


def keys_table() -> str:
    """A row for each key but those that are sections with rows of their own."""
    found = sections()
    lines = ["| Key | Default | Meaning |", "| --- | --- | --- |"]
    for place, section in found.items():
        known = meanings(section)
        lines += [
            f"| `{place + '.' if place else ''}{name}` | {shown_default(field.default)} | {known[name]} |"
            for name, field in section.model_fields.items()
            if name not in found and not (name == "models" and not place)
        ]
    return "\n".join(lines) + "\n"


def test_the_table_of_keys_is_that_of_the_sections():
    defined = {
        kind
        for _, kind in inspect.getmembers(config, inspect.isclass)
        if issubclass(kind, Section) and kind.__module__ == config.__name__
    }
    assert set(sections().values()) == defined
    assert text_between("keys") == keys_table()


# -- endpoints -------------------------------------------------------------------------------------------------------


def test_the_table_of_endpoints_is_the_served_description():
    described = {
        (method.upper(), path.removeprefix(PREFIX)): "501" if NOT_SERVED in operation["tags"] else "served"
        for path, methods in face(FakeService()).openapi()["paths"].items()
        for method, operation in methods.items()
    }
    documented = [
        (method, row[1].strip("`"), "501" if row[3] == "501" else "served")
        for row in rows("endpoints")
        for method in row[0].split(", ")
    ]
    assert sorted(documented) == sorted((*endpoint, how) for endpoint, how in described.items())
    assert {row[3] for row in rows("endpoints")} == {"CORE", "EXTRA", "501", "own"}


# -- errors ----------------------------------------------------------------------------------------------------------


def constant(node: ast.expr | None) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


def errors_in_code() -> Iterator[tuple[str, int | None, bool | None]]:
    """Code, status and retryable wherever the code says them; None where they are not constants, or of an operation."""
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            given = {word.arg: word.value for word in call.keywords if word.arg is not None}
            if call.func.id == "ServiceError" and call.args and constant(call.args[0]) is not None:
                status = constant(given["status"]) if "status" in given else 400
                retryable = constant(given["retryable"]) if "retryable" in given else False
                yield constant(call.args[0]), status, retryable
            elif call.func.id in ("Failure", "_Rule") and constant(given.get("code")) is not None:
                yield constant(given["code"]), None, None


ELSEWHERE = {"method_not_allowed", "server_restarted", "trainer_terminated"}
"""Codes that no such call names: of the framework's own refusals, of a restart, of an end that leaves the model."""


def codes(cell: str) -> list[str]:
    return [code.strip("`") for code in cell.split(", ")]


def refusals() -> dict[str, tuple[int, bool]]:
    """Status and retryable of each code."""
    found = [(code, int(row[0]), row[2] == "yes") for row in rows(REFUSALS) for code in codes(row[1])]
    assert len({code for code, *_ in found}) == len(found)
    return {code: (status, retryable) for code, status, retryable in found}


def failures() -> set[str]:
    return {code for row in rows(FAILURES) for code in codes(row[0])}


def test_every_code_of_an_error_is_in_the_tables_and_no_other():
    assert (refusals().keys() | failures()) - ELSEWHERE == {code for code, _, _ in errors_in_code()}
    text = "".join(path.read_text() for path in SOURCES)
    assert all(f'"{code}"' in text for code in ELSEWHERE)


def test_statuses_and_retryable_are_those_of_the_code():
    documented = refusals()
    for code, status, retryable in errors_in_code():
        if status is not None and code not in failures():
            assert documented[code] == (status, retryable), code


# -- the rest --------------------------------------------------------------------------------------------------------


def test_files_that_the_document_names_exist():
    text = DOCUMENT.read_text()
    named = {
        ROOT / name for name in re.findall(r"`((?:weaver_rl|actors|configs|tests|docs|examples)/[\w./-]*\w)`", text)
    }
    named |= {(DOCUMENT.parent / link).resolve() for link in re.findall(r"\]\(([\w./-]+)\)", text)}
    assert named
    assert not sorted(path for path in named if not path.exists())


if __name__ == "__main__":
    sys.stdout.write(keys_table())
