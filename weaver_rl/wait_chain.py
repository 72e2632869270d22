"""Why a root waits: the records of waits and the search for the causal chain. Pure: it knows no clock and no thread."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

NOBODY_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """What is known of an owner besides its waits.

    Example:
        Fact(text="pid 4711 gone 12 s ago", alarming=True)
    """

    text: str
    alarming: bool = False
    """It explains a stall by itself: of several that are waited for, this one is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """One wait as it stood when it was asked for.

    Example:
        Wait(owner="reward worker 2", what="scores group 00000017", since=12.5, timeout_s=60.0)
    """

    owner: str
    """Who waits, or for a remote call who is at work."""
    what: str
    """For a root what it waits for ("3 groups"), for others what they do ("scores group 00000017")."""
    since: float
    """Seconds of the clock of its `Waits`."""
    timeout_s: float | None = None
    on: frozenset[str] = frozenset()
    """Owners, or things that others are at work on, that it waits for."""
    about: frozenset[str] = frozenset()
    """Things that it is at work on itself."""
    root: bool = False

    def text(self, now: float) -> str:
        """One link of a chain. The age of a root without a deadline is left to who shows the chain."""
        age = f"{max(0.0, now - self.since):.0f} s"
        if self.timeout_s is not None:
            age += f" of {self.timeout_s:g} s"
        if self.root:
            return f"{self.owner} waits for {self.what}" + (f" ({age})" if self.timeout_s is not None else "")
        return f"{self.owner} {self.what} ({age})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Why a root waits: each link waits for the next.

    Example:
        learner waits for 3 groups ← reward worker 2 scores group 00000017 (41 s of 60 s) ← pid 4711 gone 12 s ago
    """

    links: tuple[Wait, ...]
    """The root first; never empty."""
    ending: str | None = None
    """What is known of the owner of the last link, or that no one is at work on what it waits for."""
    now: float
    """When it was asked for, on the clock of the waits."""

    @property
    def line(self) -> str:
        texts = [link.text(self.now) for link in self.links]
        return " ← ".join(texts if self.ending is None else [*texts, self.ending])

    @property
    def progress(self) -> tuple[object, ...]:
        """Changes whenever the root gets something of what it waits for."""
        root = self.links[0]
        return root.owner, root.what, root.since, root.on

    @property
    def substance(self) -> tuple[str, ...]:
        """What the line says but for the time that has passed."""
        links = tuple(f"{link.owner} {link.what}" for link in self.links)
        return links if self.ending is None else (*links, re.sub(r"\b\d+(\.\d+)? s\b", "", self.ending))


FactSource = Callable[[], Fact | str | None]


class Facts:
    """What is known of owners, each asked at most once."""

    def __init__(self, sources: Mapping[str, FactSource]) -> None:
        self.sources = sources
        self._known: dict[str, Fact | None] = {}

    def of(self, owner: str) -> Fact | None:
        if owner not in self._known:
            self._known[owner] = self._asked(owner)
        return self._known[owner]

    def _asked(self, owner: str) -> Fact | None:
        source = self.sources.get(owner)
        if source is None:
            return None
        try:
            fact = source()
        except Exception as error:  # noqa: BLE001 - boundary: what a process is said to be must not end the watching
            return Fact(text=f"its state is unknown ({type(error).__name__}: {error})")
        return Fact(text=fact) if isinstance(fact, str) else fact


class ChainSearch:
    """The search for one chain; waits are known by their place in `waits`.

    Args:
        waits: oldest first.
        parents: for each wait the place of the one inside which it was begun, None where there is none or it is over.
    """

    def __init__(self, waits: Sequence[Wait], parents: Sequence[int | None], facts: Facts) -> None:
        self._waits = waits
        self._facts = facts
        self._by_name: dict[str, list[int]] = {}
        self._by_parent: dict[int, list[int]] = {}
        for place, (wait, parent) in enumerate(zip(waits, parents, strict=True)):
            for name in wait.about | {wait.owner}:
                self._by_name.setdefault(name, []).append(place)
            if parent is not None:
                self._by_parent.setdefault(parent, []).append(place)

    def chain(self, now: float) -> Chain | None:
        """From the oldest root the shortest way to something alarming; if there is none, to the oldest next, and on."""
        root = next((place for place, wait in enumerate(self._waits) if wait.root), None)
        if root is None:
            return None
        path, ending = self._to_an_alarm(root) or self._to_the_oldest(root)
        return Chain(links=tuple(self._waits[place] for place in path), ending=ending, now=now)

    def _to_an_alarm(self, root: int) -> tuple[list[int], str] | None:
        came_from: dict[int, int | None] = {root: None}
        queue, followed = deque([root]), set[str]()
        while queue:
            place = queue.popleft()
            if (alarm := self._alarm(self._waits[place])) is not None:
                return _way_to(place, came_from), alarm
            for after in self._next(place, followed):
                if after not in came_from:
                    came_from[after] = place
                    queue.append(after)
        return None

    def _to_the_oldest(self, root: int) -> tuple[list[int], str | None]:
        path = [root]
        while after := [place for place in self._next(path[-1], set()) if place not in path]:
            path.append(after[0])
        return path, self._ending(self._waits[path[-1]])

    def _next(self, place: int, followed: set[str]) -> list[int]:
        """What the wait at `place` waits for, oldest first, without names in `followed`; its own are added to those."""
        on = self._waits[place].on
        if not on:
            # Roots only: what others happen to begin inside a wait of theirs (a task) need not be what they wait for.
            return self._by_parent.get(place, []) if self._waits[place].root else []
        found = {after for name in on - followed for after in self._by_name.get(name, ()) if after != place}
        followed |= on
        return sorted(found)

    def _alarm(self, wait: Wait) -> str | None:
        fact = self._facts.of(wait.owner)
        if fact is not None and fact.alarming:
            return fact.text
        for name in sorted(wait.on & self._facts.sources.keys()):
            if name not in self._by_name and (fact := self._facts.of(name)) is not None and fact.alarming:
                return f"{name}: {fact.text}"
        return None

    def _ending(self, wait: Wait) -> str | None:
        if (fact := self._facts.of(wait.owner)) is not None:
            return fact.text
        idle = sorted(name for name in wait.on if name not in self._by_name)
        unknown = [name for name in idle if self._facts.of(name) is None]
        if unknown:
            more = f" and {len(unknown) - NOBODY_SHOWN} more" if len(unknown) > NOBODY_SHOWN else ""
            return f"no one is at work on {', '.join(unknown[:NOBODY_SHOWN])}{more}"
        return next((f"{name}: {fact.text}" for name in idle if (fact := self._facts.of(name)) is not None), None)


def _way_to(place: int, came_from: Mapping[int, int | None]) -> list[int]:
    path: list[int] = []
    step: int | None = place
    while step is not None:
        path.append(step)
        step = came_from[step]
    return path[::-1]
