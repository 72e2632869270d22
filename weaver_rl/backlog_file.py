"""The finished groups that no step has trained yet, as one file of a checkpoint. It decides nothing about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from weaver_rl.batch import ScoredGroup
from weaver_rl.group_stream import Backlog
from weaver_rl.rollout_files import RecordedRollout, read_file, write_file

NAME = "finished_groups.parquet"


def save_backlog(directory: Path, backlog: Backlog) -> None:
    """Writes the finished groups: tokens, log-probabilities, versions and rewards."""
    if backlog.finished:
        write_file(directory / NAME, 0, _records(backlog))


def load_backlog(directory: Path, without_groups: Backlog) -> Backlog:
    """The backlog with its finished groups. Raises UserError for a file that cannot be read."""
    path = directory / NAME
    return replace(without_groups, finished=tuple(_groups(path)) if path.exists() else ())


def _records(backlog: Backlog) -> Iterator[RecordedRollout]:
    for group in backlog.finished:
        for scored in group.scored_G:
            yield RecordedRollout(scored=scored, step=0, sampler=group.sampler, group_id=group.group_id)


def _groups(path: Path) -> Iterator[ScoredGroup]:
    for group_id, records in groupby(read_file(path), key=lambda record: record.group_id):
        rollouts = list(records)
        yield ScoredGroup(
            group_id=group_id,
            sampler=rollouts[0].sampler,
            scored_G=tuple(record.scored for record in rollouts),
            position=int(group_id),
        )
