"""The history that a journal tells, what rewinds undid left out, and the rules that it must keep. It reads no file."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from weaver_rl.audit_report import AuditReport
from weaver_rl.errors import JournalError
from weaver_rl.journal import JournalEvent

MAX_VIOLATIONS = 1000
"""Violations that a report holds; the rest is counted."""

_MAX_POSITIONS_AHEAD = 1_000_000

_UNSEEN, _AGAIN, _DISPATCHED, _GENERATED, _SCORED, _CONSUMED = range(6)
_IN_WORDS = (
    "never dispatched",
    "in flight at the checkpoint and not dispatched again",
    "in flight",
    "generated",
    "finished",
    "consumed",
)


@dataclass(slots=True)
class _Groups:
    """What became of each group, by position: a few bytes each."""

    first: int
    """Position of the first."""
    states: array[int] = field(default_factory=lambda: array("b"))
    steps: array[int] = field(default_factory=lambda: array("q"))
    """That consumed it; 0 while none did."""
    oldest: array[int] = field(default_factory=lambda: array("q"))
    newest: array[int] = field(default_factory=lambda: array("q"))

    def index(self, position: int) -> int | None:
        """Where to find the group; None where no group can be."""
        index = position - self.first
        missing = index + 1 - len(self.states)
        if index < 0 or missing > _MAX_POSITIONS_AHEAD:
            return None
        if missing > 0:
            for values in (self.states, self.steps, self.oldest, self.newest):
                values.extend(itertools.repeat(0, missing))
        return index

    def name(self, index: int) -> str:
        return _name(self.first + index)


@dataclass(slots=True)
class _Step:
    """The batch of one step, as far as the journal has it."""

    size: int
    """Groups that it must have."""
    num_groups: int = 0
    indices: array[int] = field(default_factory=lambda: array("q"))
    """Of its groups, those that an earlier step had consumed left out."""
    dropped: dict[int, str] = field(default_factory=dict)
    """Reason by index."""
    places: int = 0
    """A bit for each place of the batch that is taken."""

    @property
    def is_whole(self) -> bool:
        return self.num_groups == self.size


class History:
    """The journal, event by event; keeps what stands. Violations of steps that a rewind undoes go with them."""

    def __init__(self) -> None:
        self.steps: dict[int, _Step] = {}
        self.latest = 0
        """Newest step that consumed a group; the one before the first if none did."""
        self.groups: _Groups | None = None
        self.ended: Literal["finished", "interrupted", "failed"] | None = None
        self._wrongs: dict[tuple[str, int | None], None] = {}
        self._first_step = 1
        self._last_step = 0
        self._groups_per_step = 0
        self._max_lag = 0
        self._pending: set[int] = set()
        self._newest_since_rewind = -1
        self._was_rewound = False
        self._must_rewind = False
        self._seq = 0
        self._counts: Counter[str] = Counter()
        self._num_steps_redone = 0

    def wrong(self, what: str, step: int | None = None) -> None:
        """Records a violation, once; one that belongs to a step is forgotten when that step is undone."""
        self._wrongs[what, step] = None

    def add(self, event: JournalEvent) -> None:
        """Takes the next event."""
        if event.seq != self._seq + 1:
            self.wrong(f"events {self._seq + 1} to {event.seq - 1} are missing from the journal")
        self._seq = event.seq
        self._counts[event.kind] += 1
        try:
            self._apply(event)
        except (KeyError, TypeError) as error:
            raise JournalError(
                f"event {event.seq} of the journal ({event.kind}) is not what one is: {error!r}"
            ) from error

    def end(self) -> None:
        """Judges what can only be judged when there are no more events."""
        groups, latest = self.groups, self.latest
        if groups is None:
            self.wrong("the journal does not begin with the start of a run")
            return
        self._require_none_skipped(groups)
        if latest in self.steps and (
            self.ended == "finished" or self.steps[latest].num_groups > self.steps[latest].size
        ):
            self._require_whole(latest)
        if self.ended != "finished":
            return
        if latest != self._last_step:
            self.wrong(f"the run finished at step {latest}; its last step is {self._last_step}")
        for index in sorted(self._pending):
            self.wrong(
                f"group {groups.name(index)} is left over: {_IN_WORDS[groups.states[index]]} when the run finished"
            )

    def report(self, num_steps_compared: int, *, is_claimed: bool) -> AuditReport:
        """What was found."""
        dropped: Counter[str] = Counter()
        lags: Counter[int] = Counter()
        states = [self.groups.states[index] for index in self._pending] if self.groups else []
        for step, batch in self.steps.items():
            dropped.update(batch.dropped.values())
            if self.groups:
                oldest = self.groups.oldest
                lags.update(step - 1 - oldest[index] for index in batch.indices if index not in batch.dropped)
        violations = [what for what, _ in self._wrongs]
        if len(violations) > MAX_VIOLATIONS:
            violations[MAX_VIOLATIONS:] = [f"and {len(violations) - MAX_VIOLATIONS} more"]
        return AuditReport(
            violations=tuple(violations),
            state=self.ended or ("running" if is_claimed else "killed"),
            first_step=self._first_step,
            last_step=self.latest,
            num_trained=lags.total(),
            dropped=dropped,
            groups_by_lag=lags,
            num_in_flight=sum(state < _SCORED for state in states),
            num_finished_untrained=states.count(_SCORED),
            num_checkpoints=self._counts["committed"],
            num_rewinds=self._counts["rewound"],
            num_steps_redone=self._num_steps_redone,
            num_reissued=self._counts["reissued"],
            num_steps_compared=num_steps_compared,
        )

    # -- events --------------------------------------------------------------------------------------------------

    def _apply(self, event: JournalEvent) -> None:
        if event.kind == "started":
            self._started(event)
        elif event.kind == "noted":
            return
        elif self.groups is None:
            self.wrong("the journal does not begin with the start of a run")
        elif event.kind == "committed":
            self._committed(_known(event.step))
        elif event.kind == "rewound":
            self._rewound(event, _known(event.step), self.groups)
        elif event.kind == "ended":
            self.ended = event.detail["state"]
        elif (index := self._find(str(event.group_id), self.groups)) is not None:
            self._of_group(event, index, self.groups)

    def _started(self, event: JournalEvent) -> None:
        start = event.detail
        if self.groups is None:
            self.groups = _Groups(start["first_position"])
            self._first_step = start["first_step"]
            self.latest = self._first_step - 1
        elif (was := (self.groups.first, self._first_step)) != (start["first_position"], start["first_step"]):
            self.wrong(
                f"event {event.seq}: the run was taken up as one that began with position {start['first_position']} "
                f"at step {start['first_step']}; it began with position {was[0]} at step {was[1]}"
            )
        has_history = bool(self._pending or self.steps)
        if has_history and not start["resumed"]:
            self.wrong(f"event {event.seq}: a run was begun anew in the journal of another")
        self._must_rewind = has_history and not self._was_rewound
        self._last_step = start["last_step"]
        self._groups_per_step = start["groups_per_step"]
        self._max_lag = start["max_lag"]
        self.ended = None

    def _committed(self, step: int) -> None:
        if step >= self._first_step and (step not in self.steps or not self.steps[step].is_whole):
            self.wrong(f"a checkpoint of step {step} was committed, {self._how_trained(step)}")

    def _rewound(self, event: JournalEvent, to: int, groups: _Groups) -> None:
        if to >= self._first_step and (to not in self.steps or not self.steps[to].is_whole):
            self.wrong(f"event {event.seq}: the run went back to step {to}, {self._how_trained(to)}")
        undone = [step for step in self.steps if step > to]
        self._num_steps_redone += len(undone)
        self._wrongs = {key: None for key in self._wrongs if key[1] is None or key[1] <= to}
        self.latest = min(self.latest, max(to, self._first_step - 1))
        lost = self._pending.union(*(self.steps.pop(step).indices for step in undone))
        finished = {index for index in lost if groups.states[index] >= _SCORED}
        for index in lost:
            groups.states[index], groups.steps[index] = _UNSEEN, 0
        self._pending = set()
        self._newest_since_rewind = -1
        self._was_rewound, self._must_rewind = True, False
        for name in event.detail["finished"]:
            carried = self._carry(name, groups, _SCORED, finished, to)
            if carried is not None and groups.newest[carried] > to:
                made = f"tokens of v{groups.newest[carried]}, which is made later"
                self.wrong(f"group {name} is carried as finished by the checkpoint of step {to} with {made}")
        for name in event.detail["in_flight"]:
            self._carry(name, groups, _AGAIN, lost, to)

    def _carry(self, name: str, groups: _Groups, state: int, allowed: set[int], to: int) -> int | None:
        """Gives a group of a checkpoint its state; `allowed` are those that the checkpoint can have in it."""
        index = self._find(name, groups)
        if index is None:
            return None
        words = "finished" if state == _SCORED else "in flight"
        if groups.states[index] == _CONSUMED:
            step = groups.steps[index]
            self.wrong(f"group {name} is carried as {words} by the checkpoint of step {to}, and was consumed at {step}")
            return None
        if index in self._pending:
            self.wrong(f"group {name} is carried twice by the checkpoint of step {to}")
            return None
        groups.states[index] = state
        self._pending.add(index)
        if index not in allowed:
            self.wrong(f"group {name} is carried as {words} by the checkpoint of step {to}, and never was it")
            return None
        return index

    def _of_group(self, event: JournalEvent, index: int, groups: _Groups) -> None:
        if self._must_rewind:
            self.wrong(f"event {event.seq}: the run was taken up without saying from which checkpoint")
        self._must_rewind = self._was_rewound = False
        if event.kind == "dispatched":
            if event.position != groups.first + index:
                self.wrong(f"group {event.group_id} was dispatched with the prompt at position {event.position}")
            self._newest_since_rewind = max(self._newest_since_rewind, index)
            self._advance(event, index, groups, (_UNSEEN, _AGAIN), _DISPATCHED)
        elif event.kind == "reissued":
            # What a sampler had delivered is sampled again, too, when it turns out to have had wrong weights.
            self._advance(event, index, groups, (_DISPATCHED, _GENERATED, _SCORED), _DISPATCHED)
        elif event.kind == "generated":
            self._advance(event, index, groups, (_DISPATCHED,), _GENERATED)
            if groups.states[index] == _GENERATED:
                groups.oldest[index] = _known(event.oldest_version)
                groups.newest[index] = _known(event.newest_version)
        elif event.kind == "scored":
            self._advance(event, index, groups, (_GENERATED,), _SCORED)
        else:
            self._consumed(event, index, groups, _known(event.step))

    def _advance(self, event: JournalEvent, index: int, groups: _Groups, allowed: tuple[int, ...], state: int) -> None:
        was = groups.states[index]
        if was not in allowed:
            since = f"{_IN_WORDS[was]} at step {groups.steps[index]}" if was == _CONSUMED else _IN_WORDS[was]
            self.wrong(f"group {event.group_id} was {event.kind} (event {event.seq}) when it was {since}")
        if was != _CONSUMED:
            groups.states[index] = state
            self._pending.add(index)

    def _consumed(self, event: JournalEvent, index: int, groups: _Groups, step: int) -> None:
        batch = self._batch(step)
        self._take_place(event, batch, step)
        state, name = groups.states[index], event.group_id
        if state == _CONSUMED:
            self.wrong(f"group {name} was consumed twice, at step {groups.steps[index]} and at step {step}", step)
            return
        if state != _SCORED:
            self.wrong(f"group {name} was {event.kind} at step {step} when it was {_IN_WORDS[state]}", step)
        if state >= _GENERATED:
            self._require_versions(event, step, groups.oldest[index], groups.newest[index])
        groups.states[index], groups.steps[index] = _CONSUMED, step
        self._pending.discard(index)
        batch.indices.append(index)
        if event.kind == "dropped":
            batch.dropped[index] = str(event.detail["reason"])

    def _require_versions(self, event: JournalEvent, step: int, oldest: int, newest: int) -> None:
        if newest > step - 1:
            made = f"tokens of v{newest}, which is made later"
            self.wrong(f"group {event.group_id} was {event.kind} at step {step} with {made}", step)
        lag = step - 1 - oldest
        if lag > self._max_lag and event.kind == "trained":
            what = f"tokens of v{oldest}: lag {lag}, max_lag is {self._max_lag}"
            self.wrong(f"group {event.group_id} was trained at step {step} with {what}", step)

    # -- batches -------------------------------------------------------------------------------------------------

    def _batch(self, step: int) -> _Step:
        """The batch of a step that consumes a group now."""
        latest = self.latest
        if step in self.steps:
            if step != latest:
                self.wrong(f"step {step} consumed another group after step {latest} had begun", latest)
            return self.steps[step]
        if step != latest + 1:
            self.wrong(f"step {step} came after step {latest}", step)
        if latest in self.steps:
            self._require_whole(latest)
        self.steps[step] = _Step(self._groups_per_step)
        self.latest = max(latest, step)
        return self.steps[step]

    def _take_place(self, event: JournalEvent, batch: _Step, step: int) -> None:
        batch.num_groups += 1
        if event.kind == "dropped":
            return
        place = event.detail["order"]
        if not 0 <= place < batch.size:
            self.wrong(f"group {event.group_id} has place {place} in step {step}, of {batch.size} from 0", step)
        elif batch.places >> place & 1:
            self.wrong(f"group {event.group_id} has place {place} in step {step}, and so has another", step)
        else:
            batch.places |= 1 << place

    def _require_whole(self, step: int) -> None:
        if not self.steps[step].is_whole:
            batch = self.steps[step]
            self.wrong(f"step {step} consumed {batch.num_groups} groups instead of {batch.size}", step)

    def _how_trained(self, step: int) -> str:
        batch = self.steps.get(step)
        seen = f"with {batch.num_groups} of its {batch.size} groups" if batch else f"only steps up to {self.latest} are"
        return f"which the journal does not have as trained ({seen})"

    # -- positions -----------------------------------------------------------------------------------------------

    def _find(self, name: str, groups: _Groups) -> int | None:
        """The index of a group; groups are named by the position of their prompt."""
        index = groups.index(int(name)) if name.isascii() and name.isdigit() else None
        if index is None or groups.name(index) != name:
            self.wrong(f"group {name} is none of this run: names are positions from {_name(groups.first)} on")
            return None
        return index

    def _require_none_skipped(self, groups: _Groups) -> None:
        seen = groups.states.tobytes().rstrip(b"\0")
        for index in (index for index, state in enumerate(seen) if state == _UNSEEN):
            self.wrong(
                f"group {groups.name(index)} was skipped: never dispatched, though {groups.name(len(seen) - 1)} was"
            )
        for index in sorted(self._pending):
            if groups.states[index] == _AGAIN and index < self._newest_since_rewind:
                newest = groups.name(self._newest_since_rewind)
                self.wrong(f"group {groups.name(index)} was skipped: {_IN_WORDS[_AGAIN]}, though {newest} was")


def _name(position: int) -> str:
    return f"{position:08d}"


def _known(value: int | None) -> int:
    if value is None:
        raise TypeError("a number is missing")
    return value
