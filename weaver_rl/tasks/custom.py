"""Builds a task from a user's class and checks that it is one. It knows nothing of the other tasks."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from weaver_rl.errors import TaskError, UserError
from weaver_rl.tasks.config import CustomTask
from weaver_rl.tasks.task import Problem, Task

METHODS = ("problem", "eval_problems", "scorer")


def load_custom_task(config: CustomTask, base_dir: Path) -> Task:
    """The user's task, whose calls report any exception as a TaskError naming the user's file and line."""
    task_class = _find_class(config.name, base_dir)
    if unknown := _unknown_arguments(task_class, config.args):
        raise TaskError(f"task.args: {unknown}")
    task = call_user(f"{config.name}: building it", lambda: task_class(**config.args))
    missing = [name for name in METHODS if not callable(getattr(task, name, None))]
    if not hasattr(task, "num_problems"):
        missing.append("num_problems")
    if missing:
        raise TaskError(f"{config.name} is no task: it lacks {', '.join(missing)} (see weaver_rl.tasks.task.Task)")
    guarded = GuardedTask(config.name, task)
    if guarded.problem(0) != guarded.problem(0):
        raise TaskError(f"{config.name}: problem(0) gave two different problems; it must depend on the index alone")
    return guarded


class GuardedTask:
    """A user's task at our edge: what it returns is checked, what it raises names the user's line."""

    def __init__(self, name: str, task: Any) -> None:
        self._name = name
        self._task = task
        num = call_user(f"{name}.num_problems", lambda: task.num_problems)
        if num is not None and (not isinstance(num, int) or isinstance(num, bool) or num < 1):
            raise TaskError(f"{name}.num_problems must be None (endless) or at least 1, seen {num!r}")
        self.num_problems: int | None = num

    def problem(self, index: int) -> Problem:
        problem = call_user(f"{self._name}.problem({index})", lambda: self._task.problem(index))
        return self._checked(problem, f"problem({index})")

    def eval_problems(self, num: int) -> list[Problem]:
        problems = list(call_user(f"{self._name}.eval_problems({num})", lambda: self._task.eval_problems(num)))
        if len(problems) != num:
            raise TaskError(f"{self._name}.eval_problems({num}) gave {len(problems)} problems")
        return [self._checked(problem, f"eval_problems({num})") for problem in problems]

    def scorer(self) -> Any:
        scorer = call_user(f"{self._name}.scorer()", self._task.scorer)
        if scorer is not None and not callable(scorer):
            raise TaskError(f"{self._name}.scorer() must give a function or None, seen {type(scorer).__name__}")
        return scorer

    def _checked(self, problem: Any, call: str) -> Problem:
        if not isinstance(problem, Problem):
            raise TaskError(
                f"{self._name}.{call} must give weaver_rl.tasks.task.Problem, seen {type(problem).__name__}"
            )
        return problem


def call_user(what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except UserError:
        raise
    except Exception as error:  # boundary: the user's code may raise anything; it becomes one sentence
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise TaskError(
            f"{what} raised {type(error).__name__}: {error} (at {frame.filename}:{frame.lineno})"
        ) from error


def _find_class(name: str, base_dir: Path) -> Any:
    module_name, _, class_name = name.rpartition(":")
    if not module_name or not class_name:
        raise TaskError(f"task name {name!r}: expected package.module:Class or file.py:Class")
    module = call_user(f"task name {name!r}: importing it", lambda: _import(module_name, base_dir))
    found = getattr(module, class_name, None)
    if not callable(found):
        classes = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]
        raise TaskError(f"task name {name!r}: {module_name} has no class {class_name}; it has {', '.join(classes)}")
    return found


def _import(module_name: str, base_dir: Path) -> ModuleType:
    if not module_name.endswith(".py"):
        return importlib.import_module(module_name)
    path = (base_dir / module_name).resolve()
    if not path.is_file():
        raise TaskError(f"task file {path} is not there")
    # A name of its own: two files called task.py must not be one module.
    unique = f"weaver_rl_user_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    spec.loader.exec_module(module)
    return module


def _unknown_arguments(task_class: Any, args: dict[str, Any]) -> str:
    parameters = inspect.signature(task_class).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return ""
    unknown = [key for key in args if key not in parameters]
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    absent = [key for key in needed if key not in args]
    if not unknown and not absent:
        return ""
    seen = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(absent)}"
    return f"{seen}; {task_class.__name__} takes {', '.join(parameters) or 'no arguments'}"
