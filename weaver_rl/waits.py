"""Who waits for what, since when and at most how long. It knows neither Ray nor asyncio.

Every await of the run is wrapped in `Waits.waiting`; that costs O(1). Only who asks for the chain pays for the search.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

from weaver_rl.wait_chain import Chain, ChainSearch, Facts, FactSource, Wait

Names = Collection[str] | Callable[[], Iterable[str]]
"""Names of owners or of things. A live set is read, and a callable called, only when somebody asks for the chain."""


class WaitHandle:
    """A wait that can be entered once; while it lasts, its attributes may be replaced."""

    __slots__ = ("_token", "_waits", "about", "on", "owner", "parent", "root", "since", "timeout_s", "what")

    def __init__(
        self, waits: Waits, owner: str, what: str, timeout_s: float | None, on: Names, about: Names, root: bool
    ) -> None:
        self._waits = waits
        self._token: Token[WaitHandle | None] | None = None
        self.owner = owner
        self.what = what
        self.timeout_s = timeout_s
        self.on = on
        self.about = about
        self.root = root
        self.since = 0.0
        self.parent: WaitHandle | None = None

    def __enter__(self) -> Self:
        self.parent = _INNERMOST.get()
        self._token = _INNERMOST.set(self)
        self._waits._begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waits._end(self)
        token = self._token
        # A task that outlives this wait keeps it in its context. If it then kept the one around it (as a token does
        # too), tasks that each start the next inside a wait would keep every wait of the run in memory.
        self.parent = self._token = None
        if token is not None:
            # An asynchronous generator may be closed in another context than it was begun in.
            with contextlib.suppress(ValueError):
                _INNERMOST.reset(token)

    def snapshot(self) -> Wait:
        return Wait(
            owner=self.owner,
            what=self.what,
            since=self.since,
            timeout_s=self.timeout_s,
            on=_names(self.on),
            about=_names(self.about),
            root=self.root,
        )


class Waits:
    """All waits of a process that last. Any thread may ask; the waits themselves belong to the threads that wait.

    Example:
        with waits.waiting("learner", "3 groups", root=True, on=missing_group_ids):
            await arrived.get()
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Ordered, oldest first. Copied in one step of the interpreter, so that the watching thread needs no lock.
        self._lasting: dict[WaitHandle, None] = {}
        self._facts: dict[str, FactSource] = {}

    def waiting(
        self,
        owner: str,
        what: str,
        *,
        timeout_s: float | None = None,
        on: Names = (),
        about: Names = (),
        root: bool = False,
    ) -> WaitHandle:
        """A wait for the length of a `with` block.

        Args:
            on: what `owner` waits for. Without it, a root waits for what is begun inside the block, by its tasks too.
            about: what `owner` is at work on.
            root: a chain begins here, at the oldest root. What only keeps pace is none, or says `on` whom.
        """
        return WaitHandle(self, owner, what, timeout_s, on, about, root)

    def describe(self, owner: str, facts: FactSource) -> None:
        """What to say of an owner that ends a chain. Called from another thread: quick, and never a remote call."""
        self._facts[owner] = facts

    def forget(self, owner: str) -> None:
        """Takes back `describe`."""
        self._facts.pop(owner, None)

    def alarms(self) -> dict[str, str]:
        """Every owner with an alarming fact, waited for or not. Asks all of them, as facts that count seconds need."""
        facts = Facts(dict(self._facts))
        asked = {owner: facts.of(owner) for owner in sorted(facts.sources)}
        return {owner: fact.text for owner, fact in asked.items() if fact is not None and fact.alarming}

    def current(self) -> tuple[Wait, ...]:
        """Every wait that lasts, oldest first."""
        return tuple(handle.snapshot() for handle in list(self._lasting))

    def chain(self) -> Chain | None:
        """From the oldest wait of a root to what it comes down to; None when no root waits."""
        handles = list(self._lasting)
        if not any(handle.root for handle in handles):
            return None
        places = {handle: place for place, handle in enumerate(handles)}
        parents = [None if handle.parent is None else places.get(handle.parent) for handle in handles]
        search = ChainSearch([handle.snapshot() for handle in handles], parents, Facts(dict(self._facts)))
        return search.chain(self._clock())

    def _begin(self, handle: WaitHandle) -> None:
        handle.since = self._clock()
        self._lasting[handle] = None

    def _end(self, handle: WaitHandle) -> None:
        self._lasting.pop(handle, None)


_INNERMOST: ContextVar[WaitHandle | None] = ContextVar("innermost_wait", default=None)
_DEFAULT = Waits()
_CURRENT: ContextVar[Waits | None] = ContextVar("waits", default=None)


def current_waits() -> Waits:
    """The waits that code without a reference to them registers with; those of the process unless `using` says else."""
    return _CURRENT.get() or _DEFAULT


@contextlib.contextmanager
def using(waits: Waits) -> Iterator[Waits]:
    """Makes `waits` the current ones inside the block and in tasks and threads begun there."""
    token = _CURRENT.set(waits)
    try:
        yield waits
    finally:
        _CURRENT.reset(token)


def _names(names: Names) -> frozenset[str]:
    """The names as they are now, though another thread may be changing them."""
    if isinstance(names, str):
        return frozenset((names,))
    for _ in range(3):
        try:
            return frozenset(names() if callable(names) else names)
        except RuntimeError:  # a collection that was changed while code of its own went over it
            continue
    return frozenset()
