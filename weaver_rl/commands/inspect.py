"""The command that shows a recorded step, or why a rollout got its importance weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from weaver_rl.commands.arguments import RunArgument
from weaver_rl.errors import UserError


def inspect(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(min=0, help="The step to show.", show_default=False)] = None,
    rollout: Annotated[str | None, typer.Option(help="The rollout to explain.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Show a recorded step, or why a rollout got its importance weights, factor by factor."""
    from weaver_rl.remote_run import run_to_read

    if step is None and rollout is None:
        raise UserError("inspect needs --step S, or --rollout ID (the report and --step --json list the ids)")
    with run_to_read(run) as folder:
        _show(folder, step, rollout, as_json=as_json)


def _show(run: Path, step: int | None, rollout: str | None, *, as_json: bool) -> None:
    from weaver_rl.inspection.recorded_step import RecordedStep, step_of_rollout

    recorded = RecordedStep.read(run, step if step is not None else step_of_rollout(run, str(rollout)))
    if rollout is None:
        from weaver_rl.inspection.as_json import step_json
        from weaver_rl.inspection.step_figures import step_figures
        from weaver_rl.inspection.step_view import print_step

        figures = step_figures(recorded)
        if as_json:
            sys.stdout.write(step_json(figures) + "\n")
        else:
            print_step(Console(), figures)
        return

    from weaver_rl.inspection.as_json import rollout_json
    from weaver_rl.inspection.explanation import explain
    from weaver_rl.inspection.rollout_view import print_rollout
    from weaver_rl.token_texts import as_ids, find_tokenizer

    found = explain(recorded, rollout)
    shown = found.record.scored.rollout
    reader = find_tokenizer(run, recorded.config.model_dump(mode="json"))
    token_ids = shown.completion.token_ids_L.tolist()
    tokens = as_ids(token_ids, shown.text) if reader is None else reader.read(token_ids, shown.text)
    if as_json:
        sys.stdout.write(rollout_json(found, None if reader is None else tokens.texts) + "\n")
    else:
        print_rollout(Console(), found, tokens)
