"""Chosen rollouts as compact JSON for the page: an index to filter and sort by, and chunks that it decodes when asked.

It knows rows and token texts, not the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weaver_rl.advantages import log_ratio
from weaver_rl.errors import UserError
from weaver_rl.report.curves import rounded, short
from weaver_rl.report.run_data import RunData
from weaver_rl.report.selection import Selection, select
from weaver_rl.rollout_files import RecordedRollout, read_file, rollouts_file
from weaver_rl.token_texts import TokenReader, as_ids, find_tokenizer

ROLLOUTS_PER_CHUNK = 25
"""Rollouts that the page decodes at a time."""
MAX_TOKENS_SHOWN = 4096
"""Tokens of one completion in the page; the file of rollouts has them all."""
MAX_PROMPT = 8000
"""Characters of a prompt in the page."""
TOKENS_PER_ROLLOUT = 400
"""What bounds the page: on average a rollout may bring so many tokens; those that would go beyond are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutData:
    """The rollouts of one or several runs, ready for the page."""

    index: Mapping[str, Any]
    """A column per figure, an entry per rollout."""
    chunks: tuple[str, ...]
    """JSON texts, each of `ROLLOUTS_PER_CHUNK` rollouts in the order of the index."""
    notes: tuple[str, ...]
    """What was left out, and what could not be read, in words for the reader."""

    @property
    def count(self) -> int:
        return len(self.index["id"])


def rollout_data(runs: Sequence[RunData], max_rollouts: int) -> RolloutData:
    """Chooses and reads the rollouts of the runs, each run with an equal share of `max_rollouts`."""
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    details: list[dict[str, Any]] = []
    notes: list[str] = []
    share = max(1, max_rollouts // len(runs))
    for number, run in enumerate(runs):
        selection = select(run.folder.path, share, run.steps)
        reader = find_tokenizer(run.folder.path, run.config)
        records, num_heavy, damaged = _read(run, selection, TOKENS_PER_ROLLOUT * share)
        for record in records:
            for name, value in _entry(record, number).items():
                columns[name].append(value)
            details.append(_detail(record, reader))
        where = f"{run.name}: " if len(runs) > 1 else ""
        notes += [where + note for note in _notes(run, selection, num_heavy, reader is not None)]
        notes += [where + reason for reason in (*selection.damaged, *damaged)]
    chunks = [details[start : start + ROLLOUTS_PER_CHUNK] for start in range(0, len(details), ROLLOUTS_PER_CHUNK)]
    return RolloutData(index=columns, chunks=tuple(map(_json, chunks)), notes=tuple(notes))


def _read(run: RunData, selection: Selection, max_tokens: int) -> tuple[list[RecordedRollout], int, list[str]]:
    """The chosen rollouts in order of their steps, how many the bound on tokens left out, and what was damaged."""
    records: list[RecordedRollout] = []
    damaged, num_heavy, left = [], 0, max_tokens
    for choice in selection.choices:
        try:
            for record in read_file(rollouts_file(run.folder.path, choice.step), choice.rollout_ids):
                num_tokens = min(len(record.scored.rollout.completion.token_ids_L), MAX_TOKENS_SHOWN)
                if num_tokens > left and records:
                    num_heavy += 1
                    continue
                left -= num_tokens
                records.append(record)
        except UserError as error:
            damaged.append(str(error))
    return records, num_heavy, damaged


def _notes(run: RunData, selection: Selection, num_heavy: int, has_tokenizer: bool) -> list[str]:
    if not selection.num_steps:
        return ["No rollouts were recorded."]
    notes = []
    num_shown = selection.num_chosen - num_heavy
    num_steps = len(selection.choices)
    if selection.num_left_out or num_steps < selection.num_steps or num_heavy:
        heavy = f" {num_heavy} more would have made the page too large." if num_heavy else ""
        notes.append(
            f"{num_shown:,} rollouts of {num_steps} of {selection.num_steps:,} steps are in this page: whole groups of "
            "the highest and lowest reward, with missing rewards, of the widest spread, and others. "
            f"{selection.num_left_out:,} more of these steps are not.{heavy} For more: weaver-rl report "
            f"{run.folder.path} --max-rollouts {max(1000, 2 * selection.num_chosen)}, for other steps: --steps A:B."
        )
    if not has_tokenizer:
        notes.append("No tokenizer was found in the run folder or for its model, so tokens are shown as ids.")
    return notes


_COLUMNS = (
    "run", "id", "step", "phase", "group", "sample", "sampler", "reward", "advantage", "iw", "length", "stop",
    "dropped", "missing",
)  # fmt: skip


def _entry(record: RecordedRollout, run: int) -> dict[str, Any]:
    scored, rollout = record.scored, record.scored.rollout
    weights = record.importance_weights_L
    return {
        "run": run,
        "id": rollout.rollout_id,
        "step": record.step,
        "phase": record.phase,
        "group": record.group_id,
        "sample": rollout.sample_index,
        "reward": None if scored.reward is None else short(scored.reward),
        "advantage": None if record.advantage is None else short(record.advantage),
        "length": len(rollout.completion.token_ids_L),
        "stop": rollout.completion.stop_reason,
        "dropped": record.dropped,
        "missing": int(any(part.value is None for part in scored.components)),
        "iw": None if weights is None or not len(weights) else short(float(np.mean(weights))),
        "sampler": record.sampler,
    }


def _detail(record: RecordedRollout, reader: TokenReader | None) -> dict[str, Any]:
    rollout, completion = record.scored.rollout, record.scored.rollout.completion
    token_ids = completion.token_ids_L.tolist()
    tokens = as_ids(token_ids, rollout.text) if reader is None else reader.read(token_ids, rollout.text)
    shown = slice(0, MAX_TOKENS_SHOWN)
    cut = len(token_ids) > MAX_TOKENS_SHOWN
    detail: dict[str, Any] = {
        "prompt": _clipped(rollout.prompt.text),
        "answer": None if rollout.prompt.answer is None else _clipped(rollout.prompt.answer),
        "parts": [
            [part.name, None if part.value is None else short(part.value), part.missing, short(part.seconds, 3)]
            for part in record.scored.components
        ],
        "ids": token_ids[shown],
        "texts": [_sound(text) for text in tokens.texts[shown]],
        "labels": {str(i): label for i, label in tokens.labels.items() if i < MAX_TOKENS_SHOWN},
        "logprobs": rounded(completion.logprobs_L[shown].tolist()),
        "versions": _run_length(completion.versions_L[shown].tolist()),
    }
    if not tokens.complete:
        detail["text"] = _clipped(rollout.text, MAX_TOKENS_SHOWN * 4)
    if cut:
        detail["cut"] = len(token_ids) - MAX_TOKENS_SHOWN
    if record.learner_logprobs_L is not None:
        # As differences: of two rounded log-probabilities nothing of a gap of 1e-6 would be left.
        detail["gaps"] = rounded(log_ratio(record.learner_logprobs_L, completion.logprobs_L)[shown].tolist(), 4)
    if record.importance_weights_L is not None:
        detail["weights"] = _run_length(rounded(record.importance_weights_L[shown].tolist()))
    return detail


def _run_length(values: Sequence[Any]) -> Any:
    """One value where all are the same: most completions have one version, and one weight without a correction."""
    return values[0] if values and all(value == values[0] for value in values) else values


def _clipped(text: str, limit: int = MAX_PROMPT) -> str:
    return _sound(text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} characters more)")


def _sound(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
