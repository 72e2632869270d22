"""`weaver-rl status RUN`: how a run stands, from its folder alone. It never speaks to the run itself."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from weaver_rl.errors import ConfigError
from weaver_rl.ledger import in_words
from weaver_rl.live_state import LiveState, LiveWait, read_live_state
from weaver_rl.process_state import GONE, RUNNING, process_state
from weaver_rl.run_folder import RunFolder, RunStatus
from weaver_rl.terminal_panel import duration

OLD_S = 15.0
"""A driver tells every few seconds; one that has told nothing for longer does not run freely."""
WAITS_SHOWN = 12
ACTORS_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the folder says, put together."""

    status: RunStatus
    live: LiveState | None
    """None unless told by the driver of this status."""
    age_s: float
    """Of `live`."""
    killed: bool
    driver: str | None
    """What is wrong with a driver that tells nothing new."""

    @property
    def exit_status(self) -> int:
        return int(self.killed or self.status.state in ("interrupted", "failed"))


def print_status(console: Console, run_dir: Path, clock: Callable[[], float] = time.time) -> int:
    """Prints how the run stands. Returns 0 while it runs and when it has finished, 1 when it ended otherwise.

    Raises:
        ConfigError: there is no run there.
    """
    folder = RunFolder(run_dir)
    standing = _standing(folder, clock())
    status, live = standing.status, standing.live
    _say(console, f"{run_dir}: {_state(standing, clock())}")
    _say(console, _step(status, live, _total_steps(folder)))
    if standing.driver is not None:
        _say(console, standing.driver, "red")
    if live is None or status.state != "running":
        return standing.exit_status
    _say(console, f"as of {duration(standing.age_s)} ago" + (", before it was killed" if standing.killed else ""))
    if live.chain is not None:
        _say(console, f"waiting {live.waited_s:.0f} s: {live.chain}", "yellow")
    for owner, alarm in live.alarms.items():
        _say(console, f"{owner}: {alarm}", "red")
    _print_facts(console, live.facts)
    _print_waits(console, live.waits, live.num_waits)
    return standing.exit_status


def _standing(folder: RunFolder, now: float) -> Standing:
    status = _read(folder)
    claimed = folder.is_claimed()
    if status.state == "running" and not claimed:
        # It may have ended, or been resumed, between the two looks; what run.json says of that came before.
        again = _read(folder)
        claimed = again.state == "running" and again.pid != status.pid
        status = again
    live = read_live_state(folder.live_file)
    if live is not None and (live.pid != status.pid or live.time_s < status.started_at):
        live = None
    age_s = max(0.0, now - live.time_s) if live is not None else 0.0
    if status.state != "running":
        return Standing(status=status, live=live, age_s=age_s, killed=False, driver=None)
    local = status.host == socket.gethostname()
    fresh = live is not None and age_s <= OLD_S
    # Another machine's lock may not be visible here; news from it are.
    killed = not claimed and (local or not fresh)
    driver = None if killed or fresh or live is None else _driver(status, age_s, local)
    return Standing(status=status, live=live, age_s=age_s, killed=killed, driver=driver)


def _read(folder: RunFolder) -> RunStatus:
    status = folder.read_status()
    if status is None:
        seen = "does not exist" if not folder.path.exists() else f"has no {folder.status_file.name}"
        raise ConfigError(f"{folder.path} {seen}: give the folder of a run (the `run_dir` of its configuration)")
    return status


def _driver(status: RunStatus, age_s: float, local: bool) -> str:
    told = f"the driver (pid {status.pid} on {status.host}) has told nothing for {age_s:.0f} s"
    if not local:
        return f"{told}; look at that process there"
    state = process_state(status.pid)
    if state.startswith("stopped"):
        return f"{told}: it is {state}; let it go on with `kill -CONT {status.pid}`"
    if state == GONE:
        return f"{told}: it is gone, but another process still holds the folder"
    return told if state == RUNNING else f"{told}: it is {state}"


def _state(standing: Standing, now: float) -> str:
    status = standing.status
    resumed = f", resumed {status.num_resumes} times" if status.num_resumes > 1 else ""
    resumed = ", resumed once" if status.num_resumes == 1 else resumed
    if standing.killed:
        return f"killed (pid {status.pid} on {status.host} is gone without a word); continue with --resume{resumed}"
    if status.state == "running":
        what = "running" if standing.live is not None else "starting"
        return f"{what} for {duration(now - status.started_at)} (pid {status.pid} on {status.host}){resumed}"
    reason = f": {status.reason}" if status.reason else ""
    ended = f" {duration(now - status.ended_at)} ago" if status.ended_at is not None else ""
    advice = "; continue with --resume" if status.state == "interrupted" else ""
    return f"{status.state}{ended}{resumed}{reason}{advice}"


def _step(status: RunStatus, live: LiveState | None, total: int | None) -> str:
    step = status.last_step
    if status.state == "running" and live is not None and isinstance(told := live.facts.get("step"), int):
        step = told
    return f"step {step}" + (f" of {total}" if total is not None else "")


def _total_steps(folder: RunFolder) -> int | None:
    """Read without the schema of the configuration, which another version may have written."""
    try:
        config = json.loads(folder.config_json.read_text())
        warm_start = config.get("warm_start") or {}
        return int(config["num_steps"]) + int(warm_start.get("num_steps", 0))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _print_facts(console: Console, facts: Mapping[str, Any]) -> None:
    figures = {name: value for name, value in facts.items() if name not in ("samplers", "step", "ledger")}
    if figures:
        _say(console, " · ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items()))
    samplers = facts.get("samplers")
    if isinstance(samplers, list) and samplers and all(isinstance(sampler, dict) for sampler in samplers):
        columns = list(dict.fromkeys(column for sampler in samplers for column in sampler))
        rows = [[_cell(sampler.get(column)) for column in columns] for sampler in samplers]
        _print_table(console, "samplers", [column.replace("_", " ") for column in columns], rows)
    ledger = facts.get("ledger")
    if isinstance(ledger, dict) and ledger and all(isinstance(states, dict) for states in ledger.values()):
        spent = [[actor, in_words(states)] for actor, states in ledger.items()]
        left_out = f" (the first {ACTORS_SHOWN} of {len(spent)})" if len(spent) > ACTORS_SHOWN else ""
        _print_table(console, f"the last step{left_out}", ["who", "spent its time with"], spent[:ACTORS_SHOWN])


def _print_waits(console: Console, waits: Sequence[LiveWait], num_waits: int) -> None:
    shown = waits[:WAITS_SHOWN]
    if not shown:
        return
    rows = [
        [wait.owner, wait.what, f"{wait.seconds:.0f} s", "–" if wait.timeout_s is None else f"{wait.timeout_s:g} s"]
        for wait in shown
    ]
    title = "waits" if num_waits <= len(shown) else f"waits: the oldest {len(shown)} of {num_waits}"
    _print_table(console, title, ["who", "what", "for", "at most"], rows)


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(Text(column, style="bright_black"), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _cell(value: Any) -> str:
    return "–" if value is None else str(value)


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)
