"""Goes through checks one after the other: each bounded in time, none able to stop the next. It knows no check."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from weaver_rl.check.finding import Finding, RoleMemory, failed, warned
from weaver_rl.check.given import NotCheckedError
from weaver_rl.errors import UserError

Entry = Finding | RoleMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One group of lines.

    Example:
        Check(title="versions", run=lambda: check_versions(), timeout_s=5)
    """

    title: str
    run: Callable[[], Iterable[Entry]]
    """Yields what it finds as it finds it: what it found before it failed or hung is kept."""
    timeout_s: float


def go_through(checks: Iterable[Check]) -> Iterator[tuple[Check, tuple[Entry, ...]]]:
    """Each check with all it found; a check that raised or took too long has a last line that says so."""
    for check in checks:
        yield check, run_check(check)


def run_check(check: Check) -> tuple[Entry, ...]:
    """Everything that one check found."""
    found: list[Entry] = []
    last: list[Finding] = []

    def run() -> None:
        try:
            found.extend(check.run())
        except NotCheckedError as error:
            last.append(warned(check.title, f"not checked: {error}", "mend that first, then check again"))
        except UserError as error:
            last.append(failed(check.title, str(error), "correct it and check again"))
        except Exception as error:  # noqa: BLE001  boundary: a check that crashes is a line, not the end of all
            last.append(
                failed(check.title, f"the check itself failed: {type(error).__name__}: {error}", "see the reason given")
            )

    # A daemon: one that hangs in a file system or a socket must not keep the command from ending.
    thread = threading.Thread(target=run, name=f"check {check.title}", daemon=True)
    thread.start()
    thread.join(check.timeout_s)
    if thread.is_alive():
        advice = "look at what the lines above do not mention: a file system or address that does not answer"
        return (*found, failed(check.title, f"not done after {check.timeout_s:g} s", advice))
    return (*found, *last)
