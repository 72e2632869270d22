"""docs/configuration.md is what the section classes say: all keys, and nothing by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from weaver_rl.config import RunConfig
from weaver_rl.config_reference import PLAIN, docstring, keys, meanings, reference, sections_in
from weaver_rl.section import Section
from weaver_rl.service.config import ServeConfig

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "configuration.md"
AGAIN = "write it anew: python -m weaver_rl.config_reference > docs/configuration.md"


def rows() -> dict[str, list[str]]:
    """Cells of every row of the document, by key; the bars inside a cell are escaped."""
    lines = [re.split(r"(?<!\\) ?\| ?", line.strip("|\n "))[:5] for line in DOCUMENT.read_text().splitlines()]
    return {cells[0].strip("` "): cells for cells in lines if len(cells) == 5 and cells[0].startswith("`")}


def sections(root: type[Section]) -> set[type[Section]]:
    """Every section that may stand in a file, however deep."""
    found = {root}
    for field in root.model_fields.values():
        for inner in sections_in(field.annotation):
            found |= sections(inner)
    return found


def paths(root: type[Section], place: str = "") -> set[str]:
    """Every key of a file, by a walk that knows nothing of the generator."""
    found = set()
    for name, field in root.model_fields.items():
        here = f"{place}.{name}" if place else name
        found.add(here)
        listed = str(field.annotation).startswith("tuple[")
        for inner in sections_in(field.annotation):
            found |= paths(inner, here + ("[]" if listed else ""))
    return found


def test_the_document_is_the_generated_one():
    assert DOCUMENT.read_text() == reference(), AGAIN


def test_every_key_of_a_run_has_a_row():
    # The keys of a section that two places share are described at one of them, which the other's row names.
    shared = {"warm_start.task": "task", "learner.schedule": "warm_start.schedule"}
    documented = rows().keys()
    missing = set()
    for path in paths(RunConfig):
        told = next(
            (there + path.removeprefix(here) for here, there in shared.items() if path.startswith(here + ".")), path
        )
        if told not in documented:
            missing.add(path)
    assert len(documented) > 100
    assert not missing
    for here, there in shared.items():
        assert f"section (`{there}`)" in rows()[here][1]


def test_every_key_of_a_server_is_in_one_of_the_two_documents():
    service = (ROOT / "docs" / "service.md").read_text()
    documented = rows().keys()
    for path in paths(ServeConfig):
        last = re.sub(r"^models\[\]\.(?=(model|task|learner|sampler)\.)", "", path)
        last = last.replace("learner.schedule.", "warm_start.schedule.")
        assert (
            f"`{path}`" in service
            or last in documented
            or any(row.startswith((path + ".", path + "[]")) for row in re.findall(r"`([\w.\[\]]+)`", service))
        ), path


@pytest.mark.parametrize("section", sorted(sections(RunConfig), key=lambda section: section.__name__))
def test_meanings_and_limits_of_a_section_are_in_its_rows(section: type[Section]):
    assert docstring(section)
    for row in keys(section, "", {other: other.__name__ for other in sections(RunConfig)}):
        field = section.model_fields[row.place]
        assert row.meaning
        assert "ForwardRef" not in row.kind
        assert row.kind[:1].islower() or row.kind.startswith("`")
        for limit in ("ge", "gt", "le", "lt"):
            for item in field.metadata:
                value = getattr(item, limit, None)
                assert value is None or f"{value:g}" in row.allowed or str(value) in row.allowed, row


def test_defaults_are_those_that_the_classes_use():
    config = RunConfig.model_validate(
        {
            "name": "a",
            "num_steps": 1,
            "model": {"name": "scratch"},
            "task": {"name": "reasoning_gym", "dataset": "chain_sum"},
            "rewards": [{"name": "task"}],
        }
    ).model_dump(mode="json")
    compared = 0
    for place, cells in rows().items():
        node = config
        for key in place.split("."):
            node = node.get(key, "absent") if isinstance(node, dict) else "absent"
        if node == "absent" or isinstance(node, dict) or "name" in place or not cells[2].startswith("`"):
            continue
        if place.startswith(("task.", "model.")):
            continue  # of these the document has several, and the last wins here
        assert yaml.safe_load(cells[2].strip("`")) == node, place
        compared += 1
    assert compared > 40


def test_a_meaning_is_inherited_and_an_overridden_one_is_the_nearer():
    class Base(Section):
        """Two keys."""

        first: int = 1
        """Of the base."""
        second: int = 2
        """Of the base."""

    class Nearer(Base):
        """One of them said again."""

        second: int = 3
        """Of the nearer."""

    assert meanings(Nearer) == {"first": "Of the base.", "second": "Of the nearer."}
    assert [row.default for row in keys(Nearer, "here", {})] == ["`1`", "`3`"]
    assert PLAIN[int] == "integer"


def anchors(text: str) -> set[str]:
    """What a heading of Markdown can be linked to by."""
    heads = (line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_what_the_document_links_to_exists():
    links = re.findall(r"\]\(([\w./-]+)(#[\w-]+)?\)", DOCUMENT.read_text())
    assert links
    for name, anchor in links:
        assert not anchor or anchor[1:] in anchors((DOCUMENT.parent / name).read_text())
