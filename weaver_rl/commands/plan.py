"""`weaver-rl plan`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from weaver_rl.commands.arguments import ConfigArgument, OverridesArgument


def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    trace: Annotated[
        str,
        typer.Option(
            help="Folder of a run with this configuration, also one that goes on, or its URL.",
            show_default=False,
            metavar="RUN",
        ),
    ] = ...,  # type: ignore[assignment]
    gpus: Annotated[
        int | None,
        typer.Option(min=2, help="GPUs in all, for samplers and learner ranks; at most 1024 samplers are tried."),
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Cores of the machine, for a run on CPUs.")] = None,
    samplers: Annotated[str | None, typer.Option(help="Numbers of samplers to try, for example 1,2,4.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Numbers of learner ranks to try.")] = None,
    max_lag: Annotated[str | None, typer.Option(help="Values of rollout.max_lag to try.")] = None,
    steps: Annotated[int, typer.Option(min=8, help="Steps to simulate of each set-up, at most.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same plan.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict from a recorded run how fast other numbers of samplers and learner ranks would be."""
    from weaver_rl.config import load_config
    from weaver_rl.plan.sweep import MOST_SAMPLERS, Question, make_plan
    from weaver_rl.plan.table import print_plan, to_json
    from weaver_rl.plan.trace import read_trace
    from weaver_rl.remote_run import run_to_read

    loaded = load_config(config, overrides or [])
    question = Question(
        samplers=_numbers("--samplers", samplers, least=1, most=MOST_SAMPLERS),
        ranks=_numbers("--ranks", ranks, least=1),
        max_lags=_numbers("--max-lag", max_lag, least=0),
        gpus=gpus,
        cpus=cpus,
        num_steps=steps,
        seed=seed,
    )
    with Console(stderr=True).status("reading the trace") as status:
        with run_to_read(trace) as folder:
            recorded = read_trace(folder)
        found = make_plan(
            loaded, recorded, question, lambda done, of: status.update(f"simulated {done} of {of} set-ups")
        )
    if as_json:
        sys.stdout.write(json.dumps(to_json(found), indent=2) + "\n")
    else:
        print_plan(Console(soft_wrap=True), found)


def _numbers(option: str, text: str | None, *, least: int, most: int | None = None) -> tuple[int, ...]:
    from weaver_rl.errors import ConfigError

    if text is None:
        return ()
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < least or (most is not None and max(numbers) > most):
        bounds = f"from {least} on" if most is None else f"from {least} on, at most {most},"
        raise ConfigError(f"{option} is {text!r}; write numbers {bounds} with commas between: {option} 1,2,4")
    return numbers
