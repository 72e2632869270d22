"""What documents name: files, links, keys of a configuration, commands and their options. It says what is not there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import click
import typer

from weaver_rl.cli import app

ROOT = Path(__file__).resolve().parents[2]
KEY = re.compile(
    r"`((?:rollout|reward_workers|learner|sampler|weights|cluster|eval|checkpoint|logprob_gap|loss)\.[a-z_.]+)"
)
"""Keys of sections that a document may name with their place."""


def broken_links(document: Path) -> list[str]:
    """Links to files or headings that are not there, and files in backquotes."""
    text = document.read_text()
    broken = []
    for name, anchor in re.findall(r"\]\(([\w./-]*)(#[\w-]+)?\)", text):
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (anchor and anchor[1:] not in anchors(target.read_text())):
            broken.append(f"{name}{anchor}")
    named = re.findall(r"`((?:weaver_rl|actors|configs|tests|docs|examples|deploy)/[\w./-]*\w)`", text)
    return broken + [name for name in named if not (ROOT / name).exists()]


def anchors(text: str) -> set[str]:
    """What the headings of a document can be linked to by."""
    heads = (line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


def unknown_keys(text: str) -> list[str]:
    """Keys in backquotes that the configuration reference does not have."""
    reference = (ROOT / "docs" / "configuration.md").read_text()
    keys = {key.rstrip(".") for key in KEY.findall(text)}
    # Below engine_args and args are other libraries' keys.
    return sorted(key for key in keys if f"`{key}`" not in reference and not re.search(r"args\.|\.(yaml|py)$", key))


@cache
def _commands() -> dict[str, set[str]]:
    """Options of every command, of those of a group too (`cluster start`)."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    found: dict[str, set[str]] = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        for label, one in [(f"{name} {key}", value) for key, value in (inner or {}).items()] or [(name, command)]:
            found[label] = {
                option for parameter in one.params for option in (*parameter.opts, *parameter.secondary_opts)
            }
    return found


def commands_and_options(text: str) -> list[tuple[str, list[str]]]:
    """Every `weaver-rl …` of a document: what follows the name, and the options, up to the end of line or quote."""
    found = []
    for line in text.splitlines():
        for call in re.findall(r"weaver-rl ((?:[a-z]+)(?: [^`#\n]*)?)", line):
            words = call.split()
            found.append((" ".join(words), [word.partition("=")[0] for word in words if word.startswith("--")]))
    return found


def unknown_commands(text: str) -> list[str]:
    """Calls with a command or an option that `weaver-rl` does not have."""
    known, wrong = _commands(), []
    for call, options in commands_and_options(text):
        words = call.split()
        name = next((label for label in (" ".join(words[:2]), words[0]) if label in known), None)
        if name is None:
            if not any(label.split()[0] == words[0] for label in known):
                wrong.append(call)
            continue
        wrong += [f"{call}: {option}" for option in options if option.rstrip(".,;:)") not in known[name]]
    return wrong
