"""Every rollout of a run in Parquet, one file a step. It does not know how rollouts are made, scored or trained."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from weaver_rl.errors import UserError, WeaverRLError
from weaver_rl.run_folder import RunFolder, fsync_directory
from weaver_rl.types import Completion, Float32Array, Prompt, RewardComponent, Rollout, ScoredRollout

ROWS_PER_CHUNK = 256
"""Rollouts held in memory at a time, writing and reading."""

_FILE_NAME = re.compile(r"step_(\d{6,})\.parquet")

SCHEMA = pa.schema(
    [
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("sampler", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("completion_text", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("sampler_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("learner_logprobs", pa.list_(pa.float32())),
        pa.field("versions", pa.list_(pa.int32()), nullable=False),
        pa.field("stop_reason", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("columns_json", pa.string(), nullable=False),
        pa.field("reward", pa.float64()),
        pa.field(
            "components",
            pa.list_(
                pa.struct(
                    [
                        ("name", pa.string()),
                        ("value", pa.float64()),
                        ("missing", pa.string()),
                        ("seconds", pa.float64()),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field("advantage", pa.float64()),
        pa.field("importance_weights", pa.list_(pa.float32())),
        pa.field("used_in_training", pa.bool_(), nullable=False),
        pa.field("dropped", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRollout:
    """A scored rollout and what the learner made of it: one row of the files.

    Example:
        RecordedRollout(scored=scored, step=12, sampler="sampler-0", advantage=0.7, importance_weights_L=weights_L)
    """

    scored: ScoredRollout
    step: int
    """Step that trained on it, counted over all phases; also the number of its file."""
    sampler: str
    group_id: str = ""
    phase: Literal["train", "eval"] = "train"
    advantage: float | None = None
    importance_weights_L: Float32Array | None = None
    """What the loss multiplied each completion token's log-probability by, before clipping; None if not trained on."""
    learner_logprobs_L: Float32Array | None = None
    """The learner's log-probability of each completion token before the update; None when it was not measured."""
    dropped: str | None = None
    """Why the rollout was not trained on, in words for the user."""

    @property
    def used_in_training(self) -> bool:
        return self.dropped is None and self.importance_weights_L is not None


def rollouts_file(run_dir: Path, step: int) -> Path:
    return RunFolder(run_dir).rollouts / f"step_{step:06d}.parquet"


def write_rollouts(run_dir: Path, step: int, records: Iterable[RecordedRollout]) -> Path:
    """Writes the rollouts of one step, durably and whole or not at all; an earlier file of that step is replaced."""
    path = rollouts_file(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, step, records)
    return path


def write_file(path: Path, step: int, records: Iterable[RecordedRollout]) -> None:
    """Writes rollouts of one step into a file, durably and whole or not at all."""
    aside = path.with_name(f".writing-{path.name}")
    remaining = iter(records)
    try:
        with aside.open("wb") as file:
            with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
                while chunk := list(itertools.islice(remaining, ROWS_PER_CHUNK)):
                    writer.write_table(_to_table(chunk, step))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_directory(path.parent)


def recorded_steps(run_dir: Path) -> list[int]:
    """Steps that have a file, in order."""
    folder = RunFolder(run_dir).rollouts
    names = (_FILE_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name[1]) for name in names if name)


def read_rollouts(run_dir: Path, steps: Iterable[int] | None = None) -> Iterator[RecordedRollout]:
    """The rollouts of a run (of `steps`, if given) in order, reading a chunk at a time."""
    for step in recorded_steps(run_dir) if steps is None else steps:
        yield from read_file(rollouts_file(run_dir, step))


def read_file(path: Path, only: Collection[str] | None = None) -> Iterator[RecordedRollout]:
    """The rollouts of one file in order (those with an id in `only`, if given), reading a chunk at a time."""
    try:
        with pq.ParquetFile(path) as file:
            for chunk in file.iter_batches(batch_size=ROWS_PER_CHUNK):
                if only is not None:
                    chunk = chunk.filter(pa.array([row.as_py() in only for row in chunk["rollout_id"]], pa.bool_()))
                yield from map(_from_row, chunk.to_pylist())
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise UserError(f"{path} is no file of rollouts: {error}") from error


def truncate_after(run_dir: Path, step: int) -> None:
    """Removes the files of later steps, and what a killed write left: a resumed run writes those steps again."""
    folder = RunFolder(run_dir).rollouts
    if not folder.is_dir():
        return
    for leftover in folder.glob(".writing-*"):
        leftover.unlink()
    for later in (number for number in recorded_steps(run_dir) if number > step):
        rollouts_file(run_dir, later).unlink()
    fsync_directory(folder)


def _to_table(records: list[RecordedRollout], step: int) -> pa.Table:
    if wrong := [record.scored.rollout.rollout_id for record in records if record.step != step]:
        raise WeaverRLError(f"rollout {wrong[0]} belongs to another step than the file of step {step}")
    rows = [_to_row(record) for record in records]
    columns = [pa.array([row[field.name] for row in rows], type=field.type) for field in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _to_row(record: RecordedRollout) -> dict[str, Any]:
    rollout = record.scored.rollout
    prompt, completion = rollout.prompt, rollout.completion
    return {
        "rollout_id": _utf8(rollout.rollout_id),
        "group_id": _utf8(record.group_id),
        "prompt_id": _utf8(prompt.prompt_id),
        "step": record.step,
        "phase": record.phase,
        "sampler": _utf8(record.sampler),
        "sample_index": rollout.sample_index,
        "seed": rollout.seed,
        "prompt_text": _utf8(prompt.text),
        "prompt_token_ids": np.asarray(prompt.token_ids_P, np.int32),
        "completion_text": _utf8(rollout.text),
        "token_ids": completion.token_ids_L,
        "sampler_logprobs": completion.logprobs_L,
        "learner_logprobs": record.learner_logprobs_L,
        "versions": completion.versions_L,
        "stop_reason": completion.stop_reason,
        "answer": _utf8(prompt.answer),
        "columns_json": json.dumps({str(key): _jsonable(value) for key, value in prompt.columns.items()}),
        "reward": record.scored.reward,
        "components": [
            {"name": _utf8(part.name), "value": part.value, "missing": _utf8(part.missing), "seconds": part.seconds}
            for part in record.scored.components
        ],
        "advantage": record.advantage,
        "importance_weights": record.importance_weights_L,
        "used_in_training": record.used_in_training,
        "dropped": _utf8(record.dropped),
    }


def _from_row(row: Mapping[str, Any]) -> RecordedRollout:
    prompt = Prompt(
        prompt_id=row["prompt_id"],
        text=row["prompt_text"],
        token_ids_P=tuple(row["prompt_token_ids"]),
        answer=row["answer"],
        columns=json.loads(row["columns_json"]),
    )
    completion = Completion(
        token_ids_L=np.asarray(row["token_ids"], np.int32),
        logprobs_L=np.asarray(row["sampler_logprobs"], np.float32),
        versions_L=np.asarray(row["versions"], np.int32),
        stop_reason=row["stop_reason"],
    )
    rollout = Rollout(
        rollout_id=row["rollout_id"],
        prompt=prompt,
        completion=completion,
        text=row["completion_text"],
        sample_index=row["sample_index"],
        seed=row["seed"],
    )
    components = tuple(RewardComponent(**part) for part in row["components"])
    return RecordedRollout(
        scored=ScoredRollout(rollout=rollout, components=components, reward=row["reward"]),
        step=row["step"],
        sampler=row["sampler"],
        group_id=row["group_id"],
        phase=row["phase"],
        advantage=row["advantage"],
        importance_weights_L=_floats(row["importance_weights"]),
        learner_logprobs_L=_floats(row["learner_logprobs"]),
        dropped=row["dropped"],
    )


def _floats(values: list[float] | None) -> Float32Array | None:
    return None if values is None else np.asarray(values, np.float32)


def _utf8(text: str | None) -> str | None:
    """The text with lone surrogates replaced: Parquet holds UTF-8, users' data and error messages need not be."""
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")


def _jsonable(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return repr(value)
    return value
