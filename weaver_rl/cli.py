"""The command line: arguments in, exit status out. The commands are in weaver_rl.commands.

Exit status: 0 done, 1 a failure that is ours or a machine's, 2 something to mend in the input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from weaver_rl import __version__
from weaver_rl.commands import check, cluster, inspect, jobs, plan, report, reward, runs, serve, trace
from weaver_rl.errors import UserError, WeaverRLError
from weaver_rl.exit_status import INTERRUPTED, INTERRUPTED_STATUS

app = typer.Typer(
    name="weaver-rl",
    help="Reinforcement learning for language models on Ray, vLLM and PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    runs.train,
    runs.show,
    check.check,
    plan.plan,
    runs.status,
    runs.audit,
    runs.replay,
    inspect.inspect,
    report.report,
    runs.scale,
    trace.trace,
    serve.serve,
    reward.reward,
    jobs.submit,
    jobs.logs,
    jobs.stop,
    jobs.jobs,
):
    app.command()(command)
app.add_typer(cluster.cluster, name="cluster")


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
        left = ended.__context__
        # A command that follows something else ends by typer.Exit of its own, having said what goes on without it.
        says_so_itself = isinstance(left, typer.Exit) and not isinstance(left.__cause__, KeyboardInterrupt)
        if ended.code == INTERRUPTED_STATUS and not says_so_itself:
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
