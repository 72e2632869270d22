"""Who may write at a URL: a record there that its holder renews. It does not know what is written.

Stores have no locks that every one of them offers, so two that ask in the same second may both believe for a moment:
the one whose record was overwritten finds that out at its next renewal, and stops writing. What is being written at
that moment gets there all the same. Before `begin` a holder changes nothing but the record: when it gives up by then,
a holder before it that lives all the same has the lease again.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from weaver_rl.errors import ConfigError, FilesError
from weaver_rl.process_state import GONE, ZOMBIE, process_state, start_time
from weaver_rl.remote_folder import RemoteFolder

NAME = "lease.json"
RENEW_EVERY_S = 10.0
STALE_AFTER_S = 90.0
"""Nobody who lives is silent for so long; of a holder on this machine its process is asked instead."""
SETTLE_S = 1.0
WATCH_S = 2.5 * RENEW_EVERY_S
"""For a record of another machine that looks old or of the future: a clock may be wrong, and its holder live."""
SURE_FOR_S = 2 * RENEW_EVERY_S
"""After a renewal; less than others watch before they take over."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """What is written at the URL.

    Example:
        LeaseRecord(holder="4f1c…", staging="9a2b…", host="node-1", machine="5d0e…", pid=4711, renewed_at=1767225600.0)
    """

    holder: str
    """Of one process, and no other."""
    staging: str
    """Of the folder that has all that was ever written here; until the holder has begun, that of the holder before."""
    host: str
    pid: int
    machine: str
    process_started_at: float | None = None
    renewed_at: float
    """Seconds since the epoch, by the holder's clock."""
    complete_at: float | None = None
    """When all that was due had last been written, by the holder's clock; None: never."""
    is_released: bool = False

    def is_held(self, now: float) -> bool:
        """Whether its holder may still be at work."""
        if self.is_released:
            return False
        if self.machine == this_machine():  # it may have been paused, or the store out of its reach, for long
            return process_state(self.pid, self.process_started_at) not in (GONE, ZOMBIE)
        return now - self.renewed_at <= STALE_AFTER_S

    def who(self, now: float) -> str:
        """Its holder, in words."""
        ago = now - self.renewed_at
        if ago < -1:
            return f"process {self.pid} on {self.host}, whose record is {-ago:.0f} s ahead of the clock here"
        return f"process {self.pid} on {self.host}, which said so {max(0.0, ago):.0f} s ago"


def this_machine() -> str:
    """The same for processes that can see each other by their numbers; two containers may have one host name."""
    machine = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else socket.gethostname()
    return f"{machine} {Path('/proc/self/ns/pid').readlink()}"


class Lease:
    """A held lease, renewed by a thread of its own until `release`.

    Args:
        staging: names the folder that the holder works in.
    """

    def __init__(
        self,
        remote: RemoteFolder,
        staging: str,
        *,
        clock: Callable[[], float] = time.time,
        settle_s: float = SETTLE_S,
        watch_s: float = WATCH_S,
        renew_every_s: float = RENEW_EVERY_S,
    ) -> None:
        self.remote = remote
        self._clock = clock
        self._renew_every_s = renew_every_s
        self._record = LeaseRecord(
            holder=uuid.uuid4().hex,
            staging="",
            host=socket.gethostname(),
            machine=this_machine(),
            pid=os.getpid(),
            renewed_at=clock(),
        )
        self._staging = staging
        self._settle_s = settle_s
        self._watch_s = watch_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.lost: str | None = None
        """Why nothing more may be written; None: all is well."""
        self._renewed_at = -math.inf

    def find(self) -> LeaseRecord | None:
        """The record there is, for `take`; writes nothing.

        Raises:
            ConfigError: another process holds the lease.
        """
        found = read_lease(self.remote)
        if found is not None and self._is_in_use(found):
            raise ConfigError(self._refusal(found))
        return found

    def take(self, before: LeaseRecord | None) -> None:
        """Takes the lease if the record is still the one that `find` returned.

        Raises:
            ConfigError: another process holds it.
        """
        now = read_lease(self.remote)
        if now != before:
            raise ConfigError(self._refusal(now or self._record))
        if before is not None:
            self._record = replace(self._record, staging=before.staging, complete_at=before.complete_at)
        self._write(is_released=False)
        time.sleep(self._settle_s)
        now = read_lease(self.remote)
        if now is None or now.holder != self._record.holder:
            raise ConfigError(self._refusal(now or self._record))
        self._thread.start()

    def begin(self, *, is_new_run: bool = False) -> None:
        """Says that from now on the holder's staging folder is the one that has everything.

        Args:
            is_new_run: nothing that was written here before is of it.
        """
        self.confirm()
        complete_at = None if is_new_run else self._record.complete_at
        self._record = replace(self._record, staging=self._staging, complete_at=complete_at)
        self._write(is_released=False)

    def confirm(self) -> None:
        """Raises FilesError when another process has it by now; one that gave up before it began does not count."""
        now = None if self.lost is not None else read_lease(self.remote)
        if now is not None and now.holder != self._record.holder:
            if now.is_released and now.staging == self._record.staging:
                self._write(is_released=False)
            else:
                self.lost = f"process {now.pid} on {now.host} has taken over {self.remote.url}"
        if self.lost is not None:
            raise FilesError(self.lost)

    def upload(self, file: Path, name: str) -> None:
        """Raises FilesError, and writes nothing, when another process has it by all that is known here."""
        self._require()
        self.remote.upload(file, name)

    def remove(self, names: Iterable[str]) -> None:
        """Removes files in this order, each of them as `upload` writes one."""
        for name in names:
            self._require()
            self.remote.remove([name])

    def completed(self) -> None:
        """Says, at the next renewal, that all that was due has been written by now."""
        self._record = replace(self._record, complete_at=self._clock())

    def release(self) -> None:
        """Lets others have it at once."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(self._renew_every_s)
        if self.lost is None:
            self.confirm()
            self._write(is_released=True)

    def _renew(self) -> None:
        while not self._ended.wait(self._renew_every_s):
            try:
                self.confirm()
                self._write(is_released=False)
            except FilesError:
                if self.lost is not None:
                    return
                # The store is out of reach; who uploads says so.

    def _require(self) -> None:
        """Asks the store only when the last renewal is long ago: the process may have been paused."""
        if self.lost is not None:
            raise FilesError(self.lost)
        if not 0 <= self._clock() - self._renewed_at <= SURE_FOR_S:
            self.confirm()

    def _is_in_use(self, record: LeaseRecord) -> bool:
        now = self._clock()
        is_dated_well = 0 <= now - record.renewed_at <= STALE_AFTER_S
        if record.is_released or record.machine == this_machine() or is_dated_well:
            return record.is_held(now)
        time.sleep(self._watch_s)
        return read_lease(self.remote) != record

    def _write(self, *, is_released: bool) -> None:
        now = self._clock()
        # When a process was started is told by the clock of now, which may have been set since.
        started_at = start_time(self._record.pid)
        changes = {"process_started_at": started_at, "renewed_at": now, "is_released": is_released}
        content = asdict(self._record) | changes
        self.remote.write(NAME, json.dumps(content, indent=2).encode() + b"\n")
        self._renewed_at = now

    def _refusal(self, record: LeaseRecord) -> str:
        return (
            f"run_dir: {self.remote.url} is in use by a live run ({record.who(self._clock())}); wait for it, stop it, "
            f"or give another `run_dir`. The claim of a process that was killed ends {STALE_AFTER_S:.0f} s after it "
            "last said so"
        )


def read_lease(remote: RemoteFolder) -> LeaseRecord | None:
    """The record at the URL; None when there is none that can be read."""
    content = remote.read(NAME)
    try:
        raw: dict[str, Any] = json.loads(content or b"null")
        known = {item.name for item in fields(LeaseRecord)}
        return LeaseRecord(**{key: value for key, value in raw.items() if key in known})
    except (ValueError, TypeError, AttributeError):
        return None
