"""The body of `weaver-rl reward`: tries a reward on recorded rollouts. It knows no policy and no training."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from weaver_rl.errors import RewardError
from weaver_rl.rewards.combine import kind_of
from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig
from weaver_rl.rewards.pool import RewardWorker
from weaver_rl.rewards.values import one_line
from weaver_rl.types import Completion, Prompt, RewardComponent, Rollout

ROLLOUTS_PER_CALL = 16
NUM_BINS = 10
BAR_WIDTH = 40
NUM_SAMPLES = 5

TaskScorer = Callable[[Rollout], float]


def try_reward(
    spec: RewardSpec,
    rollouts: Sequence[Rollout],
    console: Console,
    *,
    workers: RewardWorkersConfig,
    base_dir: Path,
    task_scorer: TaskScorer | None = None,
) -> int:
    """Scores the rollouts in real worker processes and prints what came out.

    Returns 0, or 1 if more rewards were missing than `workers.max_missing_fraction` would let a run have.
    """
    if not rollouts:
        raise RewardError("there are no rollouts to try the reward on")
    components = asyncio.run(_score_all(spec, rollouts, console, workers, base_dir, task_scorer))
    values = [component.value for component in components if component.value is not None]
    num_missing = len(components) - len(values)
    console.print(f"[bold]{escape(spec.component_name)}[/]: {len(components)} rollouts, {len(values)} scored")
    if values:
        _print_distribution(values, console)
    _print_timing([component.seconds for component in components], console)
    _print_failures(rollouts, components, console)
    if values:
        _print_extremes(rollouts, components, console)
    return int(num_missing > workers.max_missing_fraction * len(components))


def load_rollouts(path: Path, limit: int | None = None) -> list[Rollout]:
    """Rollouts of a run folder, or of a JSONL file with `prompt`, `completion`, optional `answer` and other columns.

    Of a run folder: those sampled for training, the newest step first; held-out ones only where there are no others.
    """
    if path.is_dir():
        found = _of_phase(path, "train", limit) or _of_phase(path, "eval", limit)
    elif path.is_file():
        found = list(islice(_read_jsonl(path), limit))
    else:
        raise RewardError(f"no run folder or JSONL file at {path}")
    if not found:
        raise RewardError(f"{path} has no rollouts to try the reward on")
    return found


def _of_phase(run_dir: Path, phase: Literal["train", "eval"], limit: int | None) -> list[Rollout]:
    from weaver_rl.rollout_files import read_rollouts, recorded_steps

    newest_first = read_rollouts(run_dir, reversed(recorded_steps(run_dir)))
    return list(islice((record.scored.rollout for record in newest_first if record.phase == phase), limit))


def _read_jsonl(path: Path) -> Iterator[Rollout]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _rollout(_parse_line(line, f"{path}, line {number}"), number, f"{path}, line {number}")


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RewardError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise RewardError(f"{where}: expected an object with prompt and completion, seen a {type(row).__name__}")
    return row


def _rollout(row: dict[str, Any], number: int, where: str) -> Rollout:
    for key in ("prompt", "completion"):
        if not isinstance(row.get(key), str):
            seen = f"seen {one_line(repr(row[key]))[:80]}" if key in row else f"seen only the keys {sorted(row)}"
            raise RewardError(f"{where}: {key!r} must be a string, {seen}")
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise RewardError(f"{where}: 'answer' must be a string, a number or null, seen {type(answer).__name__}")
    known = ("prompt", "completion", "answer")
    prompt = Prompt(
        prompt_id=f"line-{number}",
        text=row["prompt"],
        token_ids_P=(),
        answer=None if answer is None else str(answer),
        columns={key: value for key, value in row.items() if key not in known},
    )
    no_tokens = Completion(
        token_ids_L=np.zeros(0, np.int32),
        logprobs_L=np.zeros(0, np.float32),
        versions_L=np.zeros(0, np.int32),
        stop_reason="stop",
    )
    return Rollout(rollout_id=f"line-{number}", prompt=prompt, completion=no_tokens, text=row["completion"])


async def _score_all(
    spec: RewardSpec,
    rollouts: Sequence[Rollout],
    console: Console,
    workers: RewardWorkersConfig,
    base_dir: Path,
    task_scorer: TaskScorer | None,
) -> list[RewardComponent]:
    chunks = [rollouts[start : start + ROLLOUTS_PER_CALL] for start in range(0, len(rollouts), ROLLOUTS_PER_CALL)]
    scored: dict[int, RewardComponent] = {}
    remaining = iter(enumerate(chunks))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("scoring", total=len(rollouts))

        async def work() -> None:
            async with RewardWorker(
                specs=[spec],
                workers=workers,
                base_dir=base_dir,
                task_scorer=task_scorer,
                on_output=lambda printed: console.print(escape(printed.decode(errors="replace")), end="", style="dim"),
            ) as worker:
                for index, chunk in remaining:
                    for offset, (component,) in enumerate(await worker.score(chunk)):
                        scored[index * ROLLOUTS_PER_CALL + offset] = component
                    progress.advance(bar, len(chunk))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(workers.num_workers, len(chunks))):
                    group.create_task(work())
        except* RewardError as errors:
            raise _first(errors) from None
    return [scored[index] for index in range(len(rollouts))]


def _first(errors: ExceptionGroup[RewardError]) -> RewardError:
    """Every worker refuses a bad plugin for the same reason: it is said once."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


def _print_distribution(values: list[float], console: Console) -> None:
    figures = {
        "min": min(values),
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "max": max(values),
        "std": statistics.pstdev(values),
    }
    console.print("reward   " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if figures["std"] == 0:
        console.print("  every scored rollout got the same reward: nothing can be learned from these", style="yellow")
        return
    counts, edges = np.histogram(values, bins=NUM_BINS)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(BAR_WIDTH * count / counts.max()) or ("▏" if count else "")
        console.print(f"  {low:>10.4g} … {high:<10.4g} {count:>6} {bar}", highlight=False)


def _print_timing(seconds: list[float], console: Console) -> None:
    p95_s = float(np.quantile(seconds, 0.95))
    mean_s, max_s = statistics.fmean(seconds), max(seconds)
    console.print(
        f"time     mean {1e3 * mean_s:.3g} ms  p95 {1e3 * p95_s:.3g} ms  max {1e3 * max_s:.3g} ms per rollout"
    )


def _print_failures(rollouts: Sequence[Rollout], components: list[RewardComponent], console: Console) -> None:
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for rollout, component in zip(rollouts, components, strict=True):
        if component.missing is not None:
            by_kind.setdefault(kind_of(component.missing), []).append((rollout.rollout_id, component.missing))
    if not by_kind:
        console.print("missing  none")
        return
    table = Table("count", "missing because it", "for example", title="missing", title_justify="left")
    for kind, failed in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        rollout_id, reason = failed[0]
        table.add_row(str(len(failed)), escape(kind), escape(f"{rollout_id}: {reason}"))
    console.print(table)


def _print_extremes(rollouts: Sequence[Rollout], components: list[RewardComponent], console: Console) -> None:
    ranked = sorted(
        (
            (component.value, rollout)
            for rollout, component in zip(rollouts, components, strict=True)
            if component.value is not None
        ),
        key=lambda pair: -pair[0],
    )
    # Where there are few, none is shown twice.
    num_high = min(NUM_SAMPLES, (len(ranked) + 1) // 2)
    for title, part in (("highest", ranked[:num_high]), ("lowest", ranked[num_high:][-NUM_SAMPLES:][::-1])):
        if not part:
            continue
        table = Table("reward", "rollout", "prompt", "completion", title=title, title_justify="left")
        for value, rollout in part:
            texts = (escape(_excerpt(text)) for text in (rollout.prompt.text, rollout.text))
            table.add_row(f"{value:.4g}", escape(rollout.rollout_id), *texts)
        console.print(table)


def _excerpt(text: str) -> str:
    """The end of a long text: there the question is asked and the answer given."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 200 else "…" + flat[-199:]
