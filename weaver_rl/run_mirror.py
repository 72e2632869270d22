"""Keeps a run folder at a URL: a thread that uploads what changed. It knows which files there are, not what is in them.

A checkpoint is there when its manifest is: everything that a resume from it reads goes up before the manifest does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from weaver_rl.checkpoints import MANIFEST, find_damage
from weaver_rl.errors import FilesError
from weaver_rl.lease import Lease
from weaver_rl.remote_folder import RemoteFolder
from weaver_rl.run_folder import RunFolder

EVERY_S = 5.0
MAX_PAUSE_S = 60.0
"""Between attempts while the store is out of reach."""
BYTES_PER_S = 2e6
"""A file that grows goes up whole each time, so one of size S waits at least S / BYTES_PER_S between two uploads."""
CHECKPOINTS = "checkpoints"
WORK = ".mirror"
"""Directory in the run folder for what is on its way."""

Stamp = tuple[int, int]
"""Size and time of change of a file."""


class RunMirror:
    """Uploads a run folder while the run writes it. `close` brings up the rest.

    Args:
        sent: files that are at the URL as they are here, by name.
        tell: is told when uploads begin to fail, and when they go on.
    """

    def __init__(
        self,
        folder: RunFolder,
        remote: RemoteFolder,
        lease: Lease,
        *,
        sent: dict[str, Stamp] | None = None,
        tell: Callable[[str], None] = lambda note: None,
        every_s: float = EVERY_S,
    ) -> None:
        self._folder = folder
        self._remote = remote
        self._lease = lease
        self._sent = dict(sent or {})
        self._sent_at: dict[str, float] = {}
        self.tell = tell
        self._every_s = every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run mirror", daemon=True)
        self._failure: str | None = None

    def start(self) -> None:
        self._thread.start()

    def close(self, deadline_s: float) -> None:
        """Uploads what is left; returns when all is at the URL.

        Raises:
            FilesError: that did not succeed in time; says why and where everything is.
        """
        end = time.monotonic() + deadline_s
        self._closing.set()
        self._thread.join(deadline_s)
        pause_s = 1.0
        while True:
            failure: Exception | str | None = self._lease.lost or "the upload before has not ended"
            if self._lease.lost is None and not self._thread.is_alive():
                try:
                    self.upload(is_last=True)
                except (FilesError, OSError, sqlite3.Error) as error:
                    failure = error
                else:
                    return
            if self._lease.lost is not None or time.monotonic() + pause_s > end:
                raise FilesError(
                    f"the run folder could not be brought to {self._remote.url} ({failure}). Everything is in "
                    f"{self._folder.path} on this machine; the next --resume from here goes on from it and uploads it"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def _run(self) -> None:
        pause_s = self._every_s
        while not self._closing.wait(pause_s):
            if self._lease.lost is not None:
                self.tell(f"nothing more is uploaded: {self._lease.lost}; this run goes on in {self._folder.path}")
                return
            try:
                began = time.thread_time()
                self.upload()
                if self._failure is not None:
                    self.tell(f"uploads to {self._remote.url} go on")
                # A run of weeks has many files to look at: that may take a twentieth of one core.
                self._failure, pause_s = None, max(self._every_s, 20 * (time.thread_time() - began))
            except (FilesError, OSError, sqlite3.Error) as error:
                if self._failure is None:
                    self.tell(f"{error}; the run goes on, and so do attempts to upload it")
                self._failure, pause_s = str(error), min(2 * pause_s, MAX_PAUSE_S)

    def upload(self, *, is_last: bool = False) -> None:
        """One pass over the folder; raises at the first file that does not go up."""
        if self._sent and not self._folder.holds_run():
            # Else all of the run would be taken for removed, and removed at the URL.
            raise FilesError(f"{self._folder.path} is gone or holds no run any more; {self._remote.url} stays as it is")
        with self._newest_checkpoint() as snapshot:
            self._remove_undone()
            everything = is_last or snapshot is not None
            self._upload_ordinary(everything)
            if snapshot is None:
                self._upload_journal(everything)
            else:
                # The journal after the checkpoint and before its manifest: it must tell of every step before it.
                name = f"{CHECKPOINTS}/{snapshot.name}"
                for path in _files(snapshot, hidden=True):
                    self._remote.upload(snapshot / path, f"{name}/{path}")
                self._upload_journal(everything)
                self._remote.upload(snapshot.parent / MANIFEST, f"{name}/{MANIFEST}")
        self._prune()

    # -- parts of a pass -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _newest_checkpoint(self) -> Iterator[Path | None]:
        """Links to the files of the newest checkpoint, if it is not at the URL; pruning cannot take them away."""
        work = self._folder.path / WORK / CHECKPOINTS
        shutil.rmtree(work, ignore_errors=True)
        try:
            yield self._snapshot(work)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _snapshot(self, work: Path) -> Path | None:
        steps = self._sealed()
        if not steps:
            return None
        newest = self._folder.checkpoints / steps[-1]
        try:
            manifest = (newest / MANIFEST).read_bytes()
            uploaded = self._remote.read(f"{CHECKPOINTS}/{newest.name}/{MANIFEST}")
            if uploaded == manifest:
                return None
            snapshot = work / newest.name
            for name in _files(newest, hidden=True):  # torch calls a part of a sharded checkpoint `.metadata`
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                _link(newest / name, snapshot / name)
        except FileNotFoundError:
            return None  # it was pruned or undone just now: there is another one in the next pass
        (work / MANIFEST).write_bytes(manifest)
        if uploaded is not None:
            # It was made again after a step back: with the old manifest the new files would be damage.
            self._remote.remove([f"{CHECKPOINTS}/{newest.name}/{MANIFEST}"])
        return snapshot

    def _remove_undone(self) -> None:
        """Checkpoints at the URL that are newer than the newest here: the run went back behind them.

        Before the journal, which says so, goes up: together they would be a run that never was.
        """
        sealed = self._sealed()
        if not sealed:
            return
        for name, files in self._remote_checkpoints().items():
            if name > sealed[-1]:
                self._remove_checkpoint(name, files)

    def _prune(self) -> None:
        """What went here goes there: files that were sent, and checkpoints older than the newest that is whole there.

        Never that one: where checkpoints come faster than they go up it is gone here by now.
        """
        gone = [name for name in self._sent if not (self._folder.path / name).exists()]
        self._remote.remove(gone)
        for name in gone:
            del self._sent[name]
        sealed, there = self._sealed(), self._remote_checkpoints()
        newest = max((n for n, files in there.items() if f"{CHECKPOINTS}/{n}/{MANIFEST}" in files), default="")
        for name, files in there.items():
            if name < newest and name not in sealed and not self._is_pinned(name):
                self._remove_checkpoint(name, files)

    def _remove_checkpoint(self, name: str, files: list[str]) -> None:
        manifest = f"{CHECKPOINTS}/{name}/{MANIFEST}"
        self._remote.remove([manifest, *(file for file in files if file != manifest)])

    def _is_pinned(self, name: str) -> bool:
        content = self._remote.read(f"{CHECKPOINTS}/{name}/{MANIFEST}")
        try:
            return bool(json.loads(content or b"{}").get("pinned", False))
        except (ValueError, AttributeError):
            return False

    def _remote_checkpoints(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self._remote.sizes(CHECKPOINTS):
            found.setdefault(name.split("/")[1], []).append(name)
        return found

    def _upload_ordinary(self, everything: bool) -> None:
        """All but checkpoints, the journal and what is hidden; the policy only when the run has ended."""
        for name in _files(self._folder.path):
            top = name.partition("/")[0]
            journal = self._folder.journal.name
            if top in (CHECKPOINTS, self._folder.scale_file.name) or top.startswith(journal):
                continue
            if top == self._folder.policy.name and not self._closing.is_set():
                continue
            self._upload_changed(name, self._folder.path / name, everything)

    def _upload_changed(self, name: str, path: Path, everything: bool) -> None:
        try:
            stamp = _stamp(path)
            if self._sent.get(name) == stamp or (not everything and self._is_early(name, stamp[0])):
                return
            self._remote.upload(path, name)
        except FilesError:
            if path.exists():
                raise
            return  # it went away meanwhile
        except FileNotFoundError:
            return
        self._sent[name], self._sent_at[name] = stamp, time.monotonic()

    def _is_early(self, name: str, num_bytes: int) -> bool:
        return time.monotonic() - self._sent_at.get(name, -1e9) < num_bytes / BYTES_PER_S

    def _upload_journal(self, everything: bool) -> None:
        """A consistent copy: the file alone lacks what is still in the write-ahead log."""
        journal = self._folder.journal
        if not journal.exists():
            return
        name, num_bytes = journal.name, journal.stat().st_size
        copy = self._folder.path / WORK / name
        with contextlib.closing(sqlite3.connect(f"{journal.resolve().as_uri()}?mode=ro", uri=True)) as source:
            # It is only appended to. Sizes and times of its files change with every reader.
            stamp = (_newest_event(source), 0)
            if self._sent.get(name) == stamp or (not everything and self._is_early(name, num_bytes)):
                return
            copy.parent.mkdir(exist_ok=True)
            copy.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(copy)) as target:
                source.backup(target)
        self._remote.upload(copy, name)
        copy.unlink()
        self._sent[name], self._sent_at[name] = stamp, time.monotonic()

    def _sealed(self) -> list[str]:
        """Names of the checkpoints here, in order."""
        folder = self._folder.checkpoints
        return sorted(p.name for p in folder.glob("step_*") if (p / MANIFEST).is_file()) if folder.is_dir() else []


def _files(directory: Path, *, hidden: bool = False) -> list[str]:
    """Files below a directory, relative to it; without a checkpoint's manifest."""
    names = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(n.as_posix() for n in names if hidden or not any(part.startswith(".") for part in n.parts))


def _newest_event(journal: sqlite3.Connection) -> int:
    has_events, *_ = journal.execute("SELECT count(*) FROM sqlite_master WHERE name = 'events'").fetchone()
    newest, *_ = journal.execute("SELECT max(seq) FROM events").fetchone() if has_events else (None,)
    return int(newest or 0)


def _link(file: Path, name: Path) -> None:
    """Another name for a file that nobody changes; a copy where the file system has no second names."""
    try:
        os.link(file, name)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(file, name)


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def download_run(remote: RemoteFolder, folder: Path, names: list[str]) -> dict[str, Stamp]:
    """Brings files of a run here; returns what is here as it is there."""
    for name in names:
        remote.download(name, folder / name)
    return {name: _stamp(folder / name) for name in names}


def download_checkpoint(
    remote: RemoteFolder, folder: Path, sizes: dict[str, int], warn: Callable[[str], None]
) -> int | None:
    """Brings the newest checkpoint that is whole into the run folder; returns its step, None when there is none."""
    found: dict[str, list[str]] = {}
    for name in sizes:
        if name.startswith(f"{CHECKPOINTS}/step_"):
            found.setdefault(name.split("/")[1], []).append(name)
    for checkpoint in sorted(found, reverse=True):
        if f"{CHECKPOINTS}/{checkpoint}/{MANIFEST}" not in found[checkpoint]:
            continue  # its upload was cut off
        download_run(remote, folder, found[checkpoint])
        damage = find_damage(folder / CHECKPOINTS / checkpoint)
        if damage is None:
            return int(checkpoint.removeprefix("step_"))
        warn(f"checkpoint {remote.url}/{CHECKPOINTS}/{checkpoint} is damaged ({damage}); trying the one before it")
        shutil.rmtree(folder / CHECKPOINTS / checkpoint, ignore_errors=True)
    return None
