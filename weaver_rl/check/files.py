"""Whether the files that a configuration names are there, the task loads, and the model is whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from weaver_rl.check.finding import Finding, failed, passed
from weaver_rl.check.given import NotCheckedError
from weaver_rl.check.subject import RunUnderCheck
from weaver_rl.errors import ModelError, UserError
from weaver_rl.models.config import ScratchModel
from weaver_rl.tasks.config import CustomTask, JsonlTask, ParquetTask, TaskConfig
from weaver_rl.tasks.load import load_task


def check_files(run: RunUnderCheck) -> Iterator[Finding]:
    """One line for each file, then the task and the model made of them."""
    config = run.config
    if not run.base_dir.is_dir():
        yield failed("base_dir", f"{run.base_dir} is no directory", "give the one that relative paths start from")
    found = [*_task_files("task", config.task, run.base_dir)]
    if config.warm_start is not None and config.warm_start.task is not None:
        found += _task_files("warm_start.task", config.warm_start.task, run.base_dir)
    for index, spec in enumerate(config.rewards):
        place = spec.name.rpartition(":")[0]
        if place.endswith(".py"):
            found.append(_one_of(f"rewards.{index}", (run.base_dir / place, Path.cwd() / place), "rewards.name"))
    yield from found
    if not any(finding.level == "fail" for finding in found):
        yield from _tasks(run)
    yield from _model(run)


def _task_files(key: str, task: TaskConfig, base_dir: Path) -> Iterator[Finding]:
    if isinstance(task, JsonlTask | ParquetTask):
        yield _one_of(f"{key}.path", (base_dir / task.path,), f"{key}.path")
        if task.eval_path is not None:
            yield _one_of(f"{key}.eval_path", (base_dir / task.eval_path,), f"{key}.eval_path")
    elif isinstance(task, CustomTask) and task.name.rpartition(":")[0].endswith(".py"):
        yield _one_of(f"{key}.name", (base_dir / task.name.rpartition(":")[0],), f"{key}.name")


def _one_of(subject: str, places: tuple[Path, ...], key: str) -> Finding:
    for path in places:
        if path.is_file():
            try:
                with path.open("rb") as file:
                    file.read(1)
            except OSError as error:
                return failed(subject, f"{path} cannot be read ({error.strerror})", "make it readable for you")
            return passed(subject, f"{path}, {path.stat().st_size:,} bytes")
    seen = " or ".join(dict.fromkeys(str(path) for path in places))
    return failed(subject, f"{seen} is not there", f"put it there, or correct {key}")


def _tasks(run: RunUnderCheck) -> Iterator[Finding]:
    try:
        task = run.task.get()
        run.task.needed().eval_problems(run.config.eval.num_prompts)
    except UserError as error:
        yield failed("task", str(error), "correct the task section or its data")
    else:
        of = "endless" if task.num_problems is None else f"{task.num_problems:,}"
        yield passed(
            "task", f"{run.config.task.name}: {of} training problems, {run.config.eval.num_prompts} held out for eval"
        )
    if run.config.warm_start is not None and run.config.warm_start.task is not None:
        try:
            load_task(run.config.warm_start.task, run.base_dir, run.config.seed)
        except UserError as error:
            yield failed("warm_start.task", str(error), "correct that section or its data")
        else:
            yield passed("warm_start.task", f"{run.config.warm_start.task.name} loads")


def _model(run: RunUnderCheck) -> Iterator[Finding]:
    name = run.config.model.name
    try:
        yield passed("model", f"{name}: {run.model.get().where}")
    except ModelError as error:
        yield failed("model", str(error), "correct model.name, or put the model there")
    except NotCheckedError:
        # The tokenizer of a scratch model is made of the task's texts, and the task has its own line.
        assert isinstance(run.config.model, ScratchModel)
        raise
