"""What a person sees of a run: a live panel on a terminal, log lines elsewhere. It knows metrics, not the run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from weaver_rl.ledger import LedgerRow
from weaver_rl.terminal_panel import Progress, draw_panel, step_line

SECONDS_BETWEEN_LINES = 1.0


class LiveView(Protocol):
    """What the controller tells about the run. A context manager; leaving it gives the terminal back as it was."""

    def phase(self, name: str, total_steps: int, offset: int = 0) -> None:
        """A phase of `total_steps` starts; its first step is number `offset + 1` in what `step` is told."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done; `metrics` by the names of weaver_rl.metrics."""

    def evaluation(self, accuracy: float, step: int) -> None:
        """An evaluation is done with the weights after `step`."""

    def waiting(self, reason: str | None) -> None:
        """What the run waits for from now on; None, or the next step, ends it. A stall is a `note` (stall_watch)."""

    def note(self, text: str) -> None:
        """A line that stays."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class RunView(LiveView, Protocol):
    """What the whole program tells about the run: the controller and who watches its actors."""

    def ledger(self, rows: Sequence[LedgerRow]) -> None:
        """Where the actors' time of one or several steps went."""


def make_view(console: Console, title: str = "weaver-rl") -> RunView:
    """The live panel when the console is a terminal, else log lines."""
    return LivePanel(console, title) if console.is_terminal else LogLines(console)


@contextlib.contextmanager
def notes(view: LiveView) -> Iterator[None]:
    """While inside, the library's warnings are notes of the view: written past a panel they would tear it."""
    logger = logging.getLogger("weaver_rl")
    handler, propagate = _NoteHandler(view), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)


class _NoteHandler(logging.Handler):
    """Gives log records to a view."""

    def __init__(self, view: LiveView) -> None:
        super().__init__(logging.WARNING)
        self._view = view

    def emit(self, record: logging.LogRecord) -> None:
        self._view.note(self.format(record))


class LivePanel:
    """A panel that redraws itself; notes scroll by above it."""

    def __init__(self, console: Console, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._title = title
        self._clock = clock
        self._progress = Progress(started_at=clock())
        self._live = Live(self, console=console, refresh_per_second=4, transient=False)

    def __rich__(self) -> RenderableType:
        return draw_panel(self._progress, self._title, self._clock(), self._console.width)

    def phase(self, name: str, total_steps: int, offset: int = 0) -> None:
        self._progress = self._progress.begin(name, total_steps, offset, self._clock())

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress = self._progress.after_step(step, metrics, self._clock())

    def evaluation(self, accuracy: float, step: int) -> None:
        self._progress = self._progress.after_evaluation(accuracy, step)

    def ledger(self, rows: Sequence[LedgerRow]) -> None:
        self._progress = self._progress.after_ledger(rows)

    def waiting(self, reason: str | None) -> None:
        self._progress = self._progress.while_waiting(reason, self._clock())

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress = replace(self._progress, waiting=None)
        self._live.stop()


class LogLines:
    """One line per step, at most one a second; the first and last of a phase, evaluations and notes always."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._progress = Progress(started_at=clock())
        self._printed_at = float("-inf")

    def phase(self, name: str, total_steps: int, offset: int = 0) -> None:
        self._progress = self._progress.begin(name, total_steps, offset, self._clock())
        self._print(f"{name}: {total_steps} steps")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        before = self._progress
        self._progress = before.after_step(step, metrics, self._clock())
        due = self._clock() - self._printed_at >= SECONDS_BETWEEN_LINES
        if due or before.first_step is None or self._progress.is_last:
            self._printed_at = self._clock()
            self._print(step_line(self._progress))

    def evaluation(self, accuracy: float, step: int) -> None:
        self._progress = self._progress.after_evaluation(accuracy, step)
        self._print(f"{self._progress.phase} step {step} | eval accuracy {accuracy:.3f}")

    def ledger(self, rows: Sequence[LedgerRow]) -> None:
        """Nothing: a line has the stages already, and ledger.jsonl all of it."""

    def waiting(self, reason: str | None) -> None:
        """Nothing: waits are short, and the stall watch tells those that are not, with their cause."""

    def note(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self._console.print(Text(f"{stamp} {text}"), soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to give back."""
