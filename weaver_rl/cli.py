"""The command line: arguments in, exit status out. What a command does lives elsewhere and is imported inside it.

Exit status: 0 done, 1 a failure that is ours or a machine's, 2 something to mend in the input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from weaver_rl import __version__
from weaver_rl.errors import UserError, WeaverRLError
from weaver_rl.types import Rollout

INTERRUPTED = "interrupted; nothing was left running"
INTERRUPTED_STATUS = 130

app = typer.Typer(
    name="weaver-rl",
    help="Reinforcement learning for language models on Ray, vLLM and PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="key.path=value …, for example learner.learning_rate=1e-4")
]


@app.command()
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run folder.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run that is in the run folder.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; without it RAY_ADDRESS, else this machine.")
    ] = None,
) -> None:
    """Run a configuration to its end."""
    from weaver_rl.config import load_config

    extra = [f"cluster.address={address}"] if address is not None else []
    loaded = load_config(config, [*(overrides or []), *extra])

    from actors.launch import train as launch
    from weaver_rl.outcome import print_outcome

    console = Console()
    outcome = launch(loaded, resume=resume, overwrite=overwrite, console=console)
    print_outcome(console, loaded.folder, outcome.summary, outcome.wall_seconds)


@app.command()
def show(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Print the resolved configuration: every key with the value it would run with."""
    from weaver_rl.config import dump_config, load_config

    sys.stdout.write(dump_config(load_config(config, overrides or [])))


@app.command()
def status(run: RunArgument) -> None:
    """Show how a run stands: its step, what it waits for and why, its samplers."""
    from weaver_rl.status import print_status

    raise typer.Exit(print_status(Console(), run))


@app.command()
def audit(run: RunArgument) -> None:
    """Prove from a run's journal that every prompt was trained exactly once; exit status 1 if not."""
    from weaver_rl.audit import audit as check
    from weaver_rl.audit_report import print_audit

    raise typer.Exit(print_audit(Console(), check(run)))


@app.command()
def replay(
    run: RunArgument, step: Annotated[int, typer.Option(min=1, help="The step to compute again.", show_default=False)]
) -> None:
    """Compute a recorded step again from its stored rollouts; exit status 1 if loss or gradient differ by a bit."""
    from actors.replay import replay as again

    raise typer.Exit(again(run, step, Console()))


@app.command()
def scale(
    run: RunArgument, samplers: Annotated[int, typer.Option(min=1, help="How many it shall have.", show_default=False)]
) -> None:
    """Add samplers to a running run, or let some leave."""
    from weaver_rl.run_folder import RunFolder
    from weaver_rl.scale import ask_for_samplers

    ask_for_samplers(RunFolder(run), samplers)
    sys.stdout.write(f"asked for {samplers} samplers; `weaver-rl status {run}` shows them come and go\n")


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="YAML file of the server.", show_default=False)],
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; without it RAY_ADDRESS, else this machine.")
    ] = None,
) -> None:
    """Serve training and sampling to Weaver clients until it is stopped."""
    from weaver_rl.config_file import load_file
    from weaver_rl.service.config import ServeConfig

    extra = [f"cluster.address={address}"] if address is not None else []
    loaded = load_file(ServeConfig, config, [*(overrides or []), *extra])

    from actors.serve import serve as run

    run(loaded, Console())


@app.command()
def reward(
    name: Annotated[str, typer.Argument(help="FILE.py:FUNCTION, package.module:FUNCTION or a built-in.")],
    rollouts: Annotated[Path, typer.Option(help="Run folder, or JSONL with prompt, completion, optional answer.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="key=value … for the function (YAML values).")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rollouts to try at most.")] = 256,
    timeout_s: Annotated[float, typer.Option(help="Seconds one rollout may take.")] = 10.0,
    memory_limit_mb: Annotated[int, typer.Option(help="MiB the function may add to its process.")] = 1024,
) -> None:
    """Try a reward on recorded rollouts, without any training."""
    from weaver_rl.config_file import pairs, section
    from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig
    from weaver_rl.rewards.tryout import load_rollouts, try_reward

    spec = section(RewardSpec, {"name": name, "args": pairs(arguments or [])}, "reward")
    workers = section(RewardWorkersConfig, {"timeout_s": timeout_s, "memory_limit_mb": memory_limit_mb}, "options")
    found = load_rollouts(rollouts, limit)
    scorer = _task_scorer(rollouts) if name == "task" else None
    status = try_reward(spec, found, Console(), workers=workers, base_dir=Path.cwd(), task_scorer=scorer)
    raise typer.Exit(status)


def _task_scorer(run: Path) -> Callable[[Rollout], float] | None:
    """The scorer of the task that a run folder was trained on; None for rollouts of any other kind."""
    from weaver_rl.config import RunConfig
    from weaver_rl.run_folder import RunFolder
    from weaver_rl.tasks.load import load_scorer, load_task

    config_json = RunFolder(run).config_json
    if not config_json.is_file():
        return None
    config = RunConfig.model_validate_json(config_json.read_text())
    base_dir = config.base_dir or Path.cwd()
    return load_scorer(config.task, base_dir, load_task(config.task, base_dir, config.seed))


def version(value: bool) -> None:
    if value:
        sys.stdout.write(f"weaver-rl {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """Entry point: errors of a user's making become one message and an exit status, never a traceback."""
    try:
        status = guarded(lambda: app(standalone_mode=True))
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    if status == INTERRUPTED_STATUS:
        # Everything is ended and written by now. An interpreter that goes down in good order would run into libraries
        # whose import the signal cut in half, and end with their crash as its status.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def guarded(run: Callable[[], None]) -> int:
    """Runs a command; returns its exit status."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        run()
    except KeyboardInterrupt:
        errors.print(INTERRUPTED)
        return INTERRUPTED_STATUS
    except SystemExit as ended:
        # How typer ends every command; an interrupt has become its status by then.
        if ended.code == INTERRUPTED_STATUS:
            errors.print(INTERRUPTED)
        raise
    except UserError as error:
        errors.print(f"error: {error}", markup=False)
        return 2
    except OSError as error:
        errors.print(f"error: {error.strerror or error}: {error.filename or 'no file named'}", markup=False)
        return 1
    except WeaverRLError as error:
        errors.print(f"error: {type(error).__name__}: {error}", markup=False)
        return 1
    return 0
