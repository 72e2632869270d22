"""docs/troubleshooting.md quotes messages: each of them is one that the code prints, and what it names is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from docs_links import broken_links, commands_and_options, unknown_commands, unknown_keys

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^### `(.*)`$", DOCUMENT.read_text(), flags=re.MULTILINE)
GAP = "…"


@cache
def printed() -> tuple[str, ...]:
    """Every text in the code, what is put in replaced by a gap; and every line of the Slurm script."""
    found = []
    for path in sorted([*(ROOT / "weaver_rl").rglob("*.py"), *(ROOT / "actors").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            found.append(said(node))
    script = (ROOT / "deploy" / "slurm" / "weaver-rl.sbatch").read_text()
    found.append(re.sub(r"\$\{?[\w\[\]@#:-]+\}?", GAP, script))
    return tuple(re.sub(r"…+", GAP, text) for text in found if text)


def said(node: ast.AST) -> str:
    """What an expression says; f-strings and sums of texts are one."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(said(value) if isinstance(value, ast.Constant) else GAP for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = said(node.left), said(node.right)
        return (left or GAP) + (right or GAP) if left or right else ""
    return ""


def is_printed(message: str) -> bool:
    """Whether some text of the code has the pieces of the message, in order."""
    pieces = [re.escape(piece) for piece in message.split(GAP) if piece.strip()]
    pattern = re.compile(".*?".join(pieces), flags=re.DOTALL)
    return any(pattern.search(text) for text in printed())


def test_there_are_messages():
    assert len(QUOTED) > 25


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_one_that_the_code_prints(message: str):
    assert len("".join(message.split(GAP)).strip()) > 10, "too short to be found by"
    assert is_printed(message)


def test_a_message_that_nobody_prints_is_found():
    assert not is_printed("the cluster can not place this run (")
    assert not is_printed("run_dir: … already holds two runs (")


def test_what_the_document_names_is_there():
    text = DOCUMENT.read_text()
    assert not broken_links(DOCUMENT)
    assert not unknown_keys(text)
    assert not unknown_commands(text)
    assert commands_and_options(text)
