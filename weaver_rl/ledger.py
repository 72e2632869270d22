"""The idle ledger: for every actor and step, seconds in each state, which add up to the step. It reads no clock.

A state (`STATES` has them all) is something the actor does or `wait for X`: what the run was waiting for meanwhile, by
the controller's stages. An actor that came or went within a step has the seconds that it was there for.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from weaver_rl.errors import UserError
from weaver_rl.spans import Span
from weaver_rl.whole_lines import whole_lines

CONTROLLER = "controller"
ROLES = (CONTROLLER, "learner", "sampler", "reward")
"""In the order of the rows."""
STEP = "controller/step"
"""The span of a whole step, with its number and phase."""
REWOUND = "controller/rewound"
"""The run went back to a step."""

BUSY: Mapping[str, str] = {
    "sampler/start": "start",
    "sampler/load_weights": "sync",
    "sampler/prompt_logprobs": "probe",
    "sampler/generate": "generate",
    "sampler/fetch_weights": "sync",
    "learner/start": "start",
    "learner/publish": "sync",
    "learner/save": "checkpoint",
    "learner/load": "checkpoint",
    "learner/forward_backward": "learn",
    "learner/optim_step": "learn",
    "learner/forward": "learn",
    "reward/start": "start",
    "reward/score": "score",
}
"""The state that a span stands for. Where an actor does several things at a time, the one further up counts."""

AWAITED: Mapping[str, str] = {
    "controller/samplers_ready": "start",
    "controller/prompts": "prompts",
    "controller/sample": "samplers",
    "controller/score": "rewards",
    "controller/learn": "learner",
    "controller/sync": "sync",
    "controller/eval": "eval",
    "controller/checkpoint": "checkpoint",
    "controller/wait": "disk",
}
"""What the run waits for during a stage of the controller, inner ones first; outside of them for the controller."""

WORK = frozenset(
    {
        "sampler/generate",
        "reward/score",
        "learner/forward",
        "learner/forward_backward",
        "learner/optim_step",
    }
)
"""What others may be waiting for."""

STATES: Mapping[str, str] = {
    "generate": "a sampler's engine generates",
    "score": "a reward worker scores",
    "learn": "a learner rank computes log-probabilities or gradients, or updates the weights",
    "sync": "new weights are published, fetched or loaded",
    "probe": "the probe is scored, by which a sync proves itself",
    "checkpoint": "a learner rank writes or reads its state or the policy",
    "start": "an actor imports, loads the model or the rewards",
    "other": "the controller computes: batches, advantages, metrics",
    "wait for samplers": "the run has nothing to train before more is sampled; of a sampler: others still sample",
    "wait for rewards": "what the run needs next is being scored",
    "wait for learner": "the learner has its turn; nothing more may be sampled before its update",
    "wait for prompts": "the task makes prompts",
    "wait for start": "others still start: the first sync waits for every sampler of the beginning",
    "wait for sync": "others publish or load new weights, or answer the probe",
    "wait for eval": "others are busy with the evaluation",
    "wait for checkpoint": "the checkpoint is written",
    "wait for disk": "the rollouts of the step before are still being written",
    "wait for controller": "the controller computes, or word of it is on its way",
    "unknown": "the actor never told what it did: it hung",
}
"""Every state and what it says."""

_PRIORITY = {name: place for place, name in enumerate(BUSY)}
_COLLECTIVE = {"sampler": "samplers", "reward": "rewards", "learner": "learner"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """Where one actor's time of one step went.

    Example:
        LedgerRow(step=7, phase="train", actor="sampler 0", role="sampler", seconds={"generate": 1.2, "sync": 0.1})
    """

    step: int
    phase: str
    actor: str
    role: str
    """`controller`, `sampler`, `reward` or `learner`."""
    seconds: Mapping[str, float]
    """By state; they add up to the step's wall time, or to the part of it that the actor existed for."""

    def to_json(self) -> str:
        """One line."""
        seconds = {state: round(value, 6) for state, value in self.seconds.items()}
        head = {"step": self.step, "phase": self.phase, "actor": self.actor, "role": self.role}
        return json.dumps({**head, "seconds": seconds}) + "\n"


def read_ledger(path: Path) -> Iterator[LedgerRow]:
    """The rows of a ledger.jsonl; nothing when there is none. A last line cut short by a kill is left out."""
    for number, line in whole_lines(path):
        try:
            row = LedgerRow(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number} is no row of a ledger: {error}; seen {line[:80]!r}") from error
        yield row


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWindow:
    """From when to when a step lasted.

    Example:
        StepWindow(step=7, phase="train", begin_s=1767225600.0, end_s=1767225602.5)
    """

    step: int
    phase: str
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorLife:
    """One process of an actor and what is known of it.

    Example:
        ActorLife(actor="sampler 0", role="sampler", begun_s=1767225000.0, known_until_s=1767225602.0, spans=(span,))
    """

    actor: str
    role: str
    begun_s: float
    known_until_s: float
    """It told what it did up to here."""
    has_ended: bool = False
    """There is nothing of it after `known_until_s`."""
    spans: Sequence[Span] = field(default_factory=tuple)
    """In any order; those that last end at `known_until_s`."""


Piece = tuple[float, float, str]
"""From when, to when, in which state. Lists of them are in order and disjoint."""


def ledger_rows(window: StepWindow, lives: Iterable[ActorLife]) -> list[LedgerRow]:
    """A row for every actor that existed in the window, in the order of `lives`; the controller's life is one."""
    within = [(life, *_within(life, window)) for life in lives]
    present = [(life, begin, end) for life, begin, end in within if begin < end]
    stages = [span for life, _, _ in present if life.role == CONTROLLER for span in life.spans if span.name in AWAITED]
    done = [(life, begin, end, _busy(life, begin, min(end, life.known_until_s))) for life, begin, end in present]
    awaited = _Awaited(window, stages, [(life.role, pieces) for life, _, _, pieces in done])
    rows: dict[str, LedgerRow] = {}
    for life, begin, end, pieces in done:
        seconds = dict(rows[life.actor].seconds) if life.actor in rows else {}
        for state, value in _add_up(_filled(life, begin, end, pieces, awaited)):
            seconds[state] = seconds.get(state, 0.0) + value
        rows[life.actor] = LedgerRow(
            step=window.step, phase=window.phase, actor=life.actor, role=life.role, seconds=seconds
        )
    return list(rows.values())


def place_of_actor(actor: str, role: str) -> tuple[int, int, str]:
    """Sorts actors: the controller, learner ranks, samplers, reward workers; each kind by number."""
    number = actor.rpartition(" ")[2]
    place = ROLES.index(role) if role in ROLES else len(ROLES)
    return place, int(number) if number.isdigit() else 0, actor


def shares(rows: Iterable[LedgerRow], of: Callable[[LedgerRow], str]) -> dict[str, dict[str, float]]:
    """The states with their shares of the time, largest first, by what `of` gives of a row: its actor or its role."""
    seconds: dict[str, dict[str, float]] = {}
    for row in rows:
        whose = seconds.setdefault(of(row), {})
        for state, value in row.seconds.items():
            whose[state] = whose.get(state, 0.0) + value
    return {
        name: {state: value / sum(by_state.values()) for state, value in _largest_first(by_state) if value > 0}
        for name, by_state in seconds.items()
    }


def in_words(states: Mapping[str, float], at_least: float = 0.005) -> str:
    """`generate 71%  wait for learner 20%`; what is less than `at_least` is left out."""
    return "  ".join(f"{state} {share:.0%}" for state, share in states.items() if share >= at_least)


def _largest_first(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: (-item[1], item[0]))


def _within(life: ActorLife, window: StepWindow) -> tuple[float, float]:
    end = min(window.end_s, life.known_until_s) if life.has_ended else window.end_s
    return max(window.begin_s, life.begun_s), end


def _busy(life: ActorLife, begin: float, end: float) -> list[Piece]:
    """Pieces with the name of the span that counts."""
    spans = [(it.begin_s, it.end_s, it.name) for it in life.spans if it.name in BUSY]
    return _topmost(spans, begin, end, _PRIORITY.__getitem__)


def _topmost(spans: Iterable[tuple[float, float, str]], begin: float, end: float, rank: Any) -> list[Piece]:
    """Disjoint pieces: at each moment the name of least rank; nothing where there is no span."""
    clipped = [(max(at, begin), min(until, end), name) for at, until, name in spans]
    clipped = [piece for piece in clipped if piece[0] < piece[1]]
    edges = sorted({edge for at, until, _ in clipped for edge in (at, until)})
    opening: dict[float, list[str]] = {}
    closing: dict[float, list[str]] = {}
    for at, until, name in clipped:
        opening.setdefault(at, []).append(name)
        closing.setdefault(until, []).append(name)
    active: dict[str, int] = {}
    pieces: list[Piece] = []
    for at, until in pairwise(edges):
        for name in closing.get(at, ()):
            active[name] -= 1
            if not active[name]:
                del active[name]
        for name in opening.get(at, ()):
            active[name] = active.get(name, 0) + 1
        if active:
            name = min(active, key=rank)
            if pieces and pieces[-1][1:] == (at, name):
                at = pieces.pop()[0]  # many actors have many edges, and each is looked at for every actor
            pieces.append((at, until, name))
    return pieces


class _Awaited:
    """What an idle actor waits for at a moment: the controller's stage, and who else is at work."""

    def __init__(self, window: StepWindow, stages: Sequence[Span], busy: Sequence[tuple[str, Sequence[Piece]]]) -> None:
        spans = [(it.begin_s, it.end_s, it.name) for it in stages]
        staged = _topmost(spans, window.begin_s, window.end_s, list(AWAITED).index)
        at_work = {
            role: _topmost(
                [
                    (at, until, role)
                    for its, pieces in busy
                    if its == role
                    for at, until, name in pieces
                    if name in WORK
                ],
                window.begin_s,
                window.end_s,
                lambda name: name,
            )
            for role in _COLLECTIVE
        }
        edges = {window.begin_s, window.end_s}
        for pieces in (staged, *at_work.values()):
            edges |= {edge for at, until, _ in pieces for edge in (at, until)}
        self._edges = sorted(edges)
        stage_at = _Lookup(staged)
        work_at = {role: _Lookup(pieces) for role, pieces in at_work.items()}
        self._stages: list[str | None] = []
        self._at_work: list[frozenset[str]] = []
        for at, until in pairwise(self._edges):
            middle = (at + until) / 2
            self._stages.append(stage_at(middle))
            self._at_work.append(frozenset(role for role in _COLLECTIVE if work_at[role](middle) is not None))

    def idle(self, role: str, begin: float, end: float) -> Iterator[Piece]:
        """An idle time of an actor of that role, by what it waited for."""
        for at, until, place in self._places(begin, end):
            yield at, until, _idle_state(role, self._stages[place], self._at_work[place])

    def busy(self, name: str, begin: float, end: float) -> Iterator[Piece]:
        """The time of a span, by the state that it stands for."""
        if name != "learner/forward":
            yield begin, end, BUSY[name]
            return
        for at, until, place in self._places(begin, end):  # the learner does not know what its answer is for
            yield at, until, "probe" if self._stages[place] == "controller/sync" else BUSY[name]

    def _places(self, begin: float, end: float) -> Iterator[tuple[float, float, int]]:
        place = max(0, bisect_right(self._edges, begin) - 1)
        while begin < end:
            until = min(end, self._edges[place + 1])
            yield begin, until, place
            begin, place = until, place + 1


def _idle_state(role: str, stage: str | None, at_work: Collection[str]) -> str:
    awaited = AWAITED.get(stage or "", CONTROLLER)
    if role == CONTROLLER:
        return "other" if awaited == CONTROLLER else f"wait for {awaited}"
    # Rewards come after samplers, whatever the learner is doing meanwhile.
    if role == "reward" and awaited != "rewards" and "sampler" in at_work:
        return "wait for samplers"
    # Who waits for its own kind waits for a slower one; if there is none at work, for word from the controller.
    if awaited == _COLLECTIVE.get(role) and role not in at_work:
        return f"wait for {CONTROLLER}"
    return f"wait for {awaited}"


class _Lookup:
    """The state of disjoint pieces at a moment."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._begins = [begin for begin, _, _ in pieces]

    def __call__(self, moment: float) -> str | None:
        place = bisect_right(self._begins, moment) - 1
        return self._pieces[place][2] if place >= 0 and moment < self._pieces[place][1] else None


def _filled(life: ActorLife, begin: float, end: float, busy: Sequence[Piece], awaited: _Awaited) -> Iterator[Piece]:
    """The busy pieces and what lies between them, without a gap."""
    known = max(begin, min(end, life.known_until_s))
    reached = begin
    for piece in busy:
        yield from awaited.idle(life.role, reached, piece[0])
        yield from awaited.busy(piece[2], piece[0], piece[1])
        reached = piece[1]
    yield from awaited.idle(life.role, reached, known)
    if known < end:
        yield known, end, "unknown"


def _add_up(pieces: Iterable[Piece]) -> Iterator[tuple[str, float]]:
    seconds: dict[str, float] = {}
    for begin, end, state in pieces:
        seconds[state] = seconds.get(state, 0.0) + end - begin
    return iter(seconds.items())
