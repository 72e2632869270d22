"""Turns a RewardSpec into a function that can be called, in the worker process. It knows no deadline and no channel.

A first parameter called `rollouts` takes a list and returns a list; any other takes one Rollout and returns one number.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from weaver_rl.errors import RewardError
from weaver_rl.rewards.config import BUILTINS, RewardSpec, problem_with_name
from weaver_rl.rewards.messages import CallMode
from weaver_rl.rewards.values import describe_exception
from weaver_rl.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedReward:
    """A reward function ready to be called with a Rollout, or with the list of them where `mode` is batched."""

    call: Callable[[Any], Any]
    """What it returns may be awaitable in every mode: a decorator can hide that a function is async."""
    mode: CallMode
    source: str
    """SHA-256 of the source file, "" where there is none."""


def load_reward(
    spec: RewardSpec, base_dir: Path, task_scorer: Callable[[Rollout], float] | None = None
) -> LoadedReward:
    """Finds, imports, builds and checks one reward; raises RewardError with everything the user needs to mend it."""
    if problem := problem_with_name(spec.name):
        raise RewardError(problem)
    args = dict(spec.args)
    if spec.name == "task":
        if task_scorer is None:
            raise RewardError(
                "reward 'task' asks for the task's own scorer, and this task has none: name another reward"
            )
        args["scorer"] = task_scorer
    place, _, attribute = BUILTINS.get(spec.name, spec.name).rpartition(":")
    module = _import_file(spec, place, base_dir) if place.endswith(".py") else _import_module(spec, place, base_dir)
    found = _find(spec, module, place, attribute)
    function = _build(spec, found, args) if inspect.isclass(found) else found
    parameters = _parameters(spec, function)
    if not inspect.isclass(found):
        _check_args(spec, parameters[1:], args)
    method = getattr(function, "__call__", None)  # noqa: B004  the method is inspected, not called
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(method)
    batched = parameters[0].name == "rollouts"
    keywords = {} if inspect.isclass(found) else args

    def call(argument: Any) -> Any:
        return function(argument, **keywords)

    mode: CallMode = "batched" if batched else "concurrent" if is_async else "each"
    return LoadedReward(call=call, mode=mode, source=_source_hash(module))


def _import_file(spec: RewardSpec, place: str, base_dir: Path) -> ModuleType:
    candidates = [base_dir / place, Path.cwd() / place]
    path = next((path.resolve() for path in candidates if path.is_file()), None)
    if path is None:
        siblings = [near.name for near in candidates[0].parent.glob("*.py")]
        raise RewardError(
            f"reward {spec.name!r}: no file {' or '.join(dict.fromkeys(str(path) for path in candidates))}"
            + _nearest(candidates[0].name, siblings, "Python files there")
        )
    name = f"weaver_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    loader = module_spec.loader
    try:
        _guard(spec, f"importing {place}", lambda: loader.exec_module(module))
    except RewardError:
        del sys.modules[name]
        raise
    return module


def _import_module(spec: RewardSpec, place: str, base_dir: Path) -> ModuleType:
    for directory in (str(base_dir), str(Path.cwd())):
        if directory not in sys.path:
            sys.path.append(directory)
    try:
        module: ModuleType = _guard(
            spec, f"importing {place}", lambda: importlib.import_module(place), ModuleNotFoundError
        )
    except ModuleNotFoundError as error:
        raise RewardError(
            f"reward {spec.name!r}: no module named {error.name!r}; looked in the installed packages, "
            f"{base_dir} and {Path.cwd()}"
        ) from None
    return module


def _find(spec: RewardSpec, module: ModuleType, place: str, attribute: str) -> Callable[..., Any]:
    found = getattr(module, attribute, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    if found is not None:
        raise RewardError(
            f"reward {spec.name!r}: {attribute} is of type {type(found).__name__}, not a function or class"
        )
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    raise RewardError(
        f"reward {spec.name!r}: {place} holds no {attribute!r}"
        + _nearest(attribute, own, "functions and classes there")
    )


def _build(spec: RewardSpec, found: type, args: dict[str, Any]) -> Callable[..., Any]:
    _check_args(spec, list(inspect.signature(found).parameters.values()), args)
    built = _guard(spec, f"building {found.__name__}", lambda: found(**args))
    if not callable(built):
        raise RewardError(f"reward {spec.name!r}: class {found.__name__} has no __call__(self, rollout)")
    return built  # type: ignore[no-any-return]


def _parameters(spec: RewardSpec, function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise RewardError(f"reward {spec.name!r}: it has no signature that Python can read; wrap it in a def") from None
    if not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise RewardError(
            f"reward {spec.name!r}: it takes no positional parameter; "
            "write def f(rollout) for one rollout or def f(rollouts) for a list"
        )
    return parameters


def _check_args(spec: RewardSpec, parameters: list[inspect.Parameter], args: dict[str, Any]) -> None:
    """Names every argument that does not fit, before the first rollout is scored."""
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    allowed = {parameter.name: parameter for parameter in parameters if parameter.kind in by_keyword}
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        for name in args:
            if name not in allowed:
                raise RewardError(
                    f"reward {spec.name!r} takes no argument {name!r}" + _nearest(name, allowed, "allowed")
                )
    missing = [
        name for name, parameter in allowed.items() if parameter.default is inspect.Parameter.empty and name not in args
    ]
    if missing:
        raise RewardError(f"reward {spec.name!r} needs args: {{{', '.join(f'{name}: …' for name in missing)}}}")


def _guard(spec: RewardSpec, doing: str, action: Callable[[], Any], *let_through: type[Exception]) -> Any:
    """Boundary to the user's import-time and constructor code: whatever it raises becomes one RewardError."""
    try:
        return action()
    except let_through:
        raise
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(str(part) for part in first["loc"])
        said = f"argument {at!r}: " if at else ""
        raise RewardError(
            f"reward {spec.name!r}: {said}{first['msg'].removeprefix('Value error, ')}, seen {first['input']!r}"
        ) from None
    except BaseException as error:  # noqa: BLE001  the boundary named above
        raise RewardError(f"reward {spec.name!r}: {doing} raised {describe_exception(error)}") from None


def _nearest(name: str, allowed: Collection[str], what: str) -> str:
    near = difflib.get_close_matches(name, list(allowed), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{hint}; {what}: {', '.join(sorted(allowed)[:20]) or 'none'}"


def _source_hash(module: ModuleType) -> str:
    path = getattr(module, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
