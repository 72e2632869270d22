"""The best and the worst rollouts of a step as HTML, every text escaped. It does not know the page around them."""

from __future__ import annotations

import heapq
import html
from collections.abc import Iterator
from pathlib import Path

from weaver_rl.errors import UserError
from weaver_rl.rollout_files import RecordedRollout, read_rollouts, recorded_steps

NUM_SAMPLES = 5
"""Rollouts shown from either end of the last step."""
MAX_TEXT = 4000
"""Characters of a prompt or completion shown."""


def rollouts_section(run_dir: Path) -> str:
    """The best and the worst training rollouts of the last recorded step; nothing when none was recorded."""
    steps = recorded_steps(run_dir)
    if not steps:
        return ""
    try:
        high, low, count, missing = _extremes(read_rollouts(run_dir, steps[-1:]))
    except UserError as error:
        return f'<h2>Rollouts</h2><p class="banner">{html.escape(str(error))}</p>'
    about = f"{count} in step {steps[-1]}" + (f", {missing} without a reward" if missing else "")
    columns = [("Highest reward", high)] + ([("Lowest reward", low)] if low else [])
    cells = "".join(f"<div><h3>{title}</h3>{''.join(map(_rollout, group))}</div>" for title, group in columns)
    return f'<h2>Rollouts<small>{about}</small></h2><div class="samples">{cells}</div>'


def _extremes(
    records: Iterator[RecordedRollout],
) -> tuple[list[RecordedRollout], list[RecordedRollout], int, int]:
    """The highest and the lowest by reward, none twice; how many rollouts there are and how many have no reward."""
    high: list[tuple[float, int, RecordedRollout]] = []
    low: list[tuple[float, int, RecordedRollout]] = []
    count = missing = 0
    for record in records:
        if record.phase == "eval":
            continue
        count += 1
        reward = record.scored.reward
        if reward is None:
            missing += 1
            continue
        # The count breaks ties: records are never compared, and of equal ones the first are high and the last are low.
        for heap, key, order in ((high, reward, -count), (low, -reward, count)):
            heapq.heappush(heap, (key, order, record))
            if len(heap) > NUM_SAMPLES:
                heapq.heappop(heap)
    best = [record for _, _, record in sorted(high, reverse=True)]
    shown = {record.scored.rollout.rollout_id for record in best}
    worst = [record for _, _, record in sorted(low, reverse=True) if record.scored.rollout.rollout_id not in shown]
    return best, worst, count, missing


def _rollout(record: RecordedRollout) -> str:
    rollout, reward = record.scored.rollout, record.scored.reward
    advantage = "–" if record.advantage is None else f"{record.advantage:+.3f}"
    figures = [
        f"advantage {advantage}",
        f"{len(rollout.completion.token_ids_L)} tokens, {rollout.completion.stop_reason}",
    ]
    figures += [
        f"{part.name} {'missing: ' + str(part.missing) if part.value is None else f'{part.value:.3f}'}"
        for part in record.scored.components
    ]
    figures += [f"not trained on: {record.dropped}"] if record.dropped else []
    header = "".join(f"<span>{html.escape(figure)}</span>" for figure in figures)
    answer = f"<dt>answer</dt><dd><pre>{_clipped(rollout.prompt.answer)}</pre></dd>" if rollout.prompt.answer else ""
    return (
        f'<div class="rollout"><header><b>{reward:.3f}</b>{header}</header><dl>'
        f'<dt>prompt</dt><dd class="prompt"><pre>{_clipped(rollout.prompt.text)}</pre></dd>'
        f"<dt>completion</dt><dd><pre>{_clipped(rollout.text)}</pre></dd>{answer}</dl></div>"
    )


def _clipped(text: str) -> str:
    return html.escape(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT:,} more)")
