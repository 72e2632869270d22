"""How the code hangs together: import contracts, sizes, names, and files that the README promises."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted((ROOT / "weaver_rl").rglob("*.py"))
PROGRAM = sorted((ROOT / "actors").rglob("*.py"))
REFUSED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "core"}
MAX_LINES = 450


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """First names of everything a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def test_import_contracts_hold():
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(command), "--no-cache"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout)


@pytest.mark.parametrize("path", LIBRARY, ids=label)
def test_the_library_imports_neither_ray_nor_vllm_outside_the_engines(path: Path):
    found = imports(path)
    assert "ray" not in found
    if (ROOT / "weaver_rl" / "engines") not in path.parents:
        assert "vllm" not in found
    if path.parent != ROOT / "weaver_rl" / "commands":
        assert "actors" not in found


@pytest.mark.parametrize("path", PROGRAM, ids=label)
def test_the_program_imports_no_vllm_and_stays_small(path: Path):
    assert "vllm" not in imports(path)
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", LIBRARY + PROGRAM, ids=label)
def test_every_file_says_what_it_is_and_has_a_name(path: Path):
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree)
    assert docstring, f"{label(path)} has no docstring"
    assert path.stem not in REFUSED_NAMES
    assert path.parent.name not in REFUSED_NAMES


@pytest.mark.parametrize("path", LIBRARY + PROGRAM, ids=label)
def test_broad_excepts_name_their_boundary(path: Path):
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if re.search(r"(except|suppress)\b.*\b(Base)?Exception(Group)?\b.*:", line) or "noqa: BLE001" in line:
            assert "boundary" in line, f"{label(path)}:{number} catches everything without saying at which boundary"


@pytest.mark.parametrize("path", LIBRARY, ids=label)
def test_every_config_section_says_what_it_is(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id == "Section" for b in node.bases):
            assert ast.get_docstring(node), f"{label(path)}: {node.name} has no docstring"


def test_the_readme_has_no_place_left_to_fill():
    assert "@@" not in (ROOT / "README.md").read_text()


def sections() -> dict[str, ast.ClassDef]:
    """Every class that is a `Section`, directly or not, by file and name."""
    classes = {
        f"{label(path)}:{node.name}": node
        for path in LIBRARY
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    bases = {where: {b.id for b in node.bases if isinstance(b, ast.Name)} for where, node in classes.items()}
    found: dict[str, ast.ClassDef] = {}
    known = {"Section"}
    while new := {where for where in classes.keys() - found.keys() if bases[where] & known}:
        found |= {where: classes[where] for where in sorted(new)}
        known |= {classes[where].name for where in new}
    return found


def undocumented_fields(section: ast.ClassDef) -> list[str]:
    """Fields without a docstring beneath them, but for the `name` that can only be one thing."""
    found = []
    for node, after in zip(section.body, [*section.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind = ast.unparse(node.annotation)
        is_tag = node.target.id == "name" and re.fullmatch(r"Literal\['\w+'\]", kind)
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if not documented and not is_tag and not kind.startswith("ClassVar"):
            found.append(node.target.id)
    return found


def test_the_sections_of_a_run_are_found():
    names = {where.rpartition(":")[2] for where in sections()}
    assert {"RunConfig", "Grpo", "JsonlTask", "ImportanceSampling", "ScratchModel", "LengthPenalty"} <= names


def test_a_field_without_a_docstring_is_found():
    text = "class A(Section):\n    name: Literal['a']\n    x: int = 1\n    y: int = 2\n    'Steps.'\n    z: int = 3"
    (section,) = ast.parse(text).body
    assert isinstance(section, ast.ClassDef)
    assert undocumented_fields(section) == ["x", "z"]


@pytest.mark.parametrize("where", sections())
def test_every_config_field_says_what_it_means(where: str):
    assert not undocumented_fields(sections()[where])


def test_files_that_the_readme_names_exist():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md yet")
    text = readme.read_text()
    named = set(re.findall(r"`((?:weaver_rl|actors|configs|tests|benchmarks|docs)/[\w./-]*\w)`", text))
    named |= {link for link in re.findall(r"\]\(([\w./-]+)\)", text) if "://" not in link}
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing
