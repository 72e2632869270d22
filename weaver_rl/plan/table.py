"""What `weaver-rl plan` prints of a plan, for people and as JSON. It plans nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from weaver_rl.plan.simulation import Prediction, SetUp
from weaver_rl.plan.sweep import TOLERANCE, Plan

ROLES = ("samplers", "rewards", "learner")
STAGES = ("sample", "score", "learn", "sync", "eval", "checkpoint", "other")


def print_plan(console: Console, plan: Plan) -> None:
    """The recorded set-up beside what was measured, every other one, the best, and what was assumed."""
    trace = plan.trace
    still = ", still going on" if trace.is_running else ""
    console.print(
        f"trace: {trace.path}, {len(trace.steps)} steps ({trace.steps[0].step} to {trace.steps[-1].step}{still}), "
        f"{_words(plan.predicted.set_up)}",
        markup=False,
    )
    console.print(
        f"measured {plan.measured.step_seconds:.2f} s a step, predicted {plan.predicted.step_seconds:.2f}: "
        f"{_percent(plan.error)}; {plan.measured.tokens_per_s:,.0f} tokens/s, predicted "
        f"{plan.predicted.tokens_per_s:,.0f}: {_percent(plan.tokens_error)}"
    )
    console.print(_stages(plan))
    if plan.measured.idle:
        console.print(f"idle: measured {_idle(plan.measured.idle)}; predicted {_idle(plan.predicted.idle)}")
    if not plan.is_trusted:
        console.print(
            f"[bold red]WARNING: the prediction for the recorded set-up is off by more than {TOLERANCE:.0%}. Do not "
            "trust what follows.[/] Was the machine busy with something else? A longer, undisturbed trace helps."
        )
    console.print(_set_ups(plan))
    for failed in plan.failed:
        console.print(f"{_words(failed.set_up)}: would fail: {failed.reason}", markup=False)
    console.print(_verdict(plan))
    console.print("assumed:")
    for line in plan.assumptions:
        console.print(f"  - {line}", markup=False)


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything that is printed, by name."""
    best = plan.best
    return {
        "trace": {
            "path": str(plan.trace.path),
            "first_step": plan.trace.steps[0].step,
            "last_step": plan.trace.steps[-1].step,
            "is_running": plan.trace.is_running,
        },
        "measured": asdict(plan.measured),
        "predicted": _prediction(plan.predicted),
        "error": plan.error,
        "tokens_error": plan.tokens_error,
        "is_trusted": plan.is_trusted,
        "tried": [_prediction(found) for found in plan.tried],
        "failed": [asdict(failed) for failed in plan.failed],
        "best": None if best is None else _prediction(best),
        "worth_it": [asdict(found.set_up) for found in plan.worth_it()],
        "assumptions": list(plan.assumptions),
    }


def _prediction(found: Prediction) -> dict[str, Any]:
    return asdict(found) | {"steps_per_hour": found.steps_per_hour}


def _stages(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, padding=(0, 1))
    table.add_column("seconds", no_wrap=True)
    for stage in STAGES:
        table.add_column(stage, justify="right")
    table.add_column("lag", justify="right")
    for name, found in (("measured", plan.measured), ("predicted", plan.predicted)):
        seconds = (f"{found.stage_seconds.get(stage, 0.0):.3f}" for stage in STAGES)
        table.add_row(name, *seconds, f"{found.lag_mean:.2f}")
    return table


def _idle(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{role} {shares[role]:.0%}" for role in ROLES if role in shares)


def _set_ups(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for name in ("samplers", "ranks", "max\nlag", "s/step", "tokens/s", "steps/h"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("idle\nsamplers", "idle\nrewards", "idle\nlearner", "mean\nlag"):
        table.add_column(name, justify="right", no_wrap=True)
    best, own = plan.best, plan.predicted.set_up
    worth_it = [found.set_up for found in plan.worth_it()]
    for found in plan.tried:
        is_best = best is not None and found.set_up == best.set_up
        mark = "best" if is_best else "+" if found.set_up in worth_it else ""
        mark += "*" if found.set_up == own else ""
        style = "bold green" if is_best else "bold" if found.set_up == own else None
        table.add_row(
            mark,
            str(found.set_up.num_samplers),
            str(found.set_up.num_ranks),
            str(found.set_up.max_lag),
            f"{found.step_seconds:.3g}",
            f"{found.tokens_per_s:,.0f}",
            f"{found.steps_per_hour:,.0f}",
            *(f"{found.idle[role]:.0%}" for role in ROLES),
            f"{found.lag_mean:.2f}",
            style=style,
        )
    return table


def _verdict(plan: Plan) -> str:
    best = plan.best
    if best is None:
        return "no set-up would run to its end"
    of = f" of {plan.question.gpus} GPUs" if plan.question.gpus else ""
    of = of or (f" on {plan.question.cpus} cores" if plan.question.cpus else "")
    gain = best.tokens_per_s / plan.predicted.tokens_per_s
    text = f"best{of}: {_words(best.set_up)}: {best.tokens_per_s:,.0f} tokens/s, {gain:.2f} × the recorded set-up"
    if not plan.question.gpus:
        text += ". Rows with + are the fastest of those with as many samplers and ranks or fewer; * is the recorded one"
    return text


def _words(set_up: SetUp) -> str:
    samplers = f"{set_up.num_samplers} sampler{'s' * (set_up.num_samplers != 1)}"
    ranks = f"{set_up.num_ranks} learner rank{'s' * (set_up.num_ranks != 1)}"
    return f"{samplers}, {ranks}, max_lag {set_up.max_lag}"


def _percent(error: float) -> str:
    return f"{error:+.0%}".replace("-", "−")
