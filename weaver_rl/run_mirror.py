"""Keeps a run folder at a URL: a thread that uploads what changed. It knows which files there are, not what is in them.

A checkpoint is there when its manifest is: everything that a resume from it reads goes up before the manifest does.
Journal and manifests decide what a resume makes of the rest: before each the store is asked who holds the lease.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
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

_CHECKPOINT = re.compile(rf"{CHECKPOINTS}/(step_\d{{6,}})/.+")
"""Others that lie there are somebody's own."""

Stamp = tuple[int, int]
"""Size and time of change of a file."""
UNKNOWN: Stamp = (-1, -1)
"""Of a file that is at the URL with a content that is not known to be the one here."""


class RunMirror:
    """Uploads a run folder while the run writes it. `close` brings up the rest.

    Args:
        keep: how many of the newest checkpoints stay at the URL, whether they are here or not.
        sent: files that are at the URL, by name; as they are here unless the stamp is `UNKNOWN`.
        tell: is told when uploads begin to fail, and when they go on.
    """

    def __init__(
        self,
        folder: RunFolder,
        remote: RemoteFolder,
        lease: Lease,
        *,
        keep: int,
        sent: dict[str, Stamp] | None = None,
        tell: Callable[[str], None] = lambda note: None,
        every_s: float = EVERY_S,
    ) -> None:
        self._folder = folder
        self._remote = remote
        self._lease = lease
        self._keep = keep
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
                what_next = (
                    "a run at this URL from here replaces it: move it elsewhere to keep it"
                    if self._lease.lost is not None
                    else "the next --resume from here goes on from it and uploads it"
                )
                raise FilesError(
                    f"the run folder could not be brought to {self._remote.url} ({failure}). Everything is in "
                    f"{self._folder.path} on this machine; {what_next}"
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
                if self._failure is None and self._lease.lost is None:
                    self.tell(f"{error}; the run goes on, and so do attempts to upload it")
                self._failure, pause_s = str(error), min(2 * pause_s, MAX_PAUSE_S)

    def upload(self, *, is_last: bool = False) -> None:
        """One pass over the folder; raises at the first file that does not go up."""
        self._lease.confirm()
        if self._sent and not self._folder.holds_run():
            # Else all of the run would be taken for removed, and removed at the URL.
            raise FilesError(f"{self._folder.path} is gone or holds no run any more; {self._remote.url} stays as it is")
        with self._newest_checkpoint() as snapshot:
            self._remove_undone()
            everything = is_last or snapshot is not None
            self._upload_ordinary(everything)
            self._upload_spans(is_last)
            if snapshot is None:
                self._upload_journal(everything)
            else:
                # The journal after the checkpoint and before its manifest: it must tell of every step before it.
                name = f"{CHECKPOINTS}/{snapshot.name}"
                for path in _files(snapshot, checkpoint=True):
                    self._lease.upload(snapshot / path, f"{name}/{path}")
                self._upload_journal(everything)
                self._lease.confirm()
                self._lease.upload(snapshot.parent / MANIFEST, f"{name}/{MANIFEST}")
        if is_last:
            self._upload_older_checkpoints()
        self._prune()
        self._lease.completed()

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
            for name in _files(newest, checkpoint=True):  # torch calls a part of a sharded checkpoint `.metadata`
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                _link(newest / name, snapshot / name)
        except FileNotFoundError:
            return None  # it was pruned or undone just now: there is another one in the next pass
        (work / MANIFEST).write_bytes(manifest)
        if uploaded is not None:
            # It was made again after a step back: with the old manifest the new files would be damage.
            self._lease.remove([f"{CHECKPOINTS}/{newest.name}/{MANIFEST}"])
        return snapshot

    def _upload_older_checkpoints(self) -> None:
        """Those that are kept here and were not the newest for long enough to get to the URL; the run has ended."""
        there = self._remote_checkpoints()
        for checkpoint in self._sealed():
            name, folder = f"{CHECKPOINTS}/{checkpoint}", self._folder.checkpoints / checkpoint
            if f"{name}/{MANIFEST}" not in there.get(checkpoint, ()):
                for path in _files(folder, checkpoint=True):
                    self._lease.upload(folder / path, f"{name}/{path}")
                self._lease.confirm()
                self._lease.upload(folder / MANIFEST, f"{name}/{MANIFEST}")

    def _remove_undone(self) -> None:
        """Checkpoints at the URL that are newer than the newest here: the run went back behind them.

        Before the journal, which says so, goes up: together they would be a run that never was.
        """
        sealed = self._sealed()
        if not sealed:
            return
        for name, files in self._remote_checkpoints().items():
            if _step(name) > _step(sealed[-1]):
                self._remove_checkpoint(name, files)

    def _prune(self) -> None:
        """What went here goes there: files that were sent, and checkpoints older than the newest that is whole there.

        Never that one: where checkpoints come faster than they go up it is gone here by now. Nor those that are to be
        kept: a run that goes on on another machine brings only the newest there.
        """
        self._lease.confirm()  # what was uploaded before this may have taken hours
        gone = [name for name in self._sent if not (self._folder.path / name).exists()]
        self._lease.remove(gone)
        for name in gone:
            del self._sent[name]
        sealed, there = self._sealed(), self._remote_checkpoints()
        whole = [name for name, files in there.items() if f"{CHECKPOINTS}/{name}/{MANIFEST}" in files]
        kept = {*sealed, *whole[-self._keep :]}
        for name, files in there.items():
            if whole and _step(name) < _step(whole[-1]) and name not in kept and not self._is_pinned(name):
                self._remove_checkpoint(name, files)

    def _remove_checkpoint(self, name: str, files: list[str]) -> None:
        manifest = f"{CHECKPOINTS}/{name}/{MANIFEST}"
        self._lease.remove([manifest, *(file for file in files if file != manifest)])

    def _is_pinned(self, name: str) -> bool:
        content = self._remote.read(f"{CHECKPOINTS}/{name}/{MANIFEST}")
        try:
            return bool(json.loads(content or b"{}").get("pinned", False))
        except (ValueError, AttributeError):
            return False

    def _remote_checkpoints(self) -> dict[str, list[str]]:
        return _by_checkpoint(self._remote.sizes(CHECKPOINTS))

    def _upload_ordinary(self, everything: bool) -> None:
        """All but checkpoints, the journal, spans and what is hidden; the policy only when the run has ended."""
        for name in _files(self._folder.path):
            top = name.partition("/")[0]
            journal = self._folder.journal.name
            if top in (CHECKPOINTS, self._folder.scale_file.name, self._folder.spans.name) or top.startswith(journal):
                continue
            if top == self._folder.policy.name and not self._closing.is_set():
                continue
            self._upload_changed(name, self._folder.path / name, everything)

    def _upload_spans(self, is_last: bool) -> None:
        """Every actor has a file that grows, and no checkpoint needs them: all together they go up as one would."""
        spans = self._folder.spans
        names = _files(spans) if spans.is_dir() else []
        num_bytes = 0
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # it is being renamed
                num_bytes += _stamp(spans / name)[0]
        for name in names:
            self._upload_changed(f"{spans.name}/{name}", spans / name, is_last, num_bytes)

    def _upload_changed(self, name: str, path: Path, everything: bool, together_B: int = 0) -> None:
        try:
            stamp = _stamp(path)
            if self._sent.get(name) == stamp or (not everything and self._is_early(name, max(stamp[0], together_B))):
                return
            self._lease.upload(path, name)
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
        self._lease.confirm()
        self._lease.upload(copy, name)
        copy.unlink()
        self._sent[name], self._sent_at[name] = stamp, time.monotonic()

    def _sealed(self) -> list[str]:
        """Names of the checkpoints here, in order."""
        folder = self._folder.checkpoints
        return list(_by_checkpoint(f"{CHECKPOINTS}/{p.parent.name}/{p.name}" for p in folder.glob(f"*/{MANIFEST}")))


def _by_checkpoint(names: Iterable[str]) -> dict[str, list[str]]:
    """Files of every checkpoint, whole or not; the oldest one first."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _CHECKPOINT.fullmatch(name):
            found.setdefault(match[1], []).append(name)
    return dict(sorted(found.items(), key=lambda item: _step(item[0])))


def _step(checkpoint: str) -> int:
    return int(checkpoint.removeprefix("step_"))


def _files(directory: Path, *, checkpoint: bool = False) -> list[str]:
    """Files below a directory, relative to it; of a checkpoint hidden ones too, but not its manifest."""
    found = []
    for parent, folders, names in os.walk(directory):  # not `rglob`: the run removes folders meanwhile
        folders[:] = [name for name in folders if checkpoint or not name.startswith(".")]
        paths = [Path(parent) / name for name in names if checkpoint or not name.startswith(".")]
        found += [path.relative_to(directory).as_posix() for path in paths if path.is_file()]
    if checkpoint and MANIFEST in found:
        found.remove(MANIFEST)
    return sorted(found)


def folder_bytes(directory: Path) -> int:
    """What is in a folder that may be changing."""
    num_bytes = 0
    for name in _files(directory, checkpoint=True):
        with contextlib.suppress(FileNotFoundError):
            num_bytes += _stamp(directory / name)[0]
    return num_bytes


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
        # Object stores take any name; the folder may be somebody else's.
        if name.startswith("/") or ".." in name.split("/"):
            raise FilesError(f"{remote.url} has a file {name}, which leads out of the run folder: not downloaded")
        remote.download(name, folder / name)
    return {name: _stamp(folder / name) for name in names}


def download_checkpoint(
    remote: RemoteFolder, folder: Path, sizes: dict[str, int], warn: Callable[[str], None]
) -> int | None:
    """Brings the newest checkpoint that is whole into the run folder; returns its step, None when there is none."""
    found = _by_checkpoint(sizes)
    for checkpoint in reversed(found):
        if f"{CHECKPOINTS}/{checkpoint}/{MANIFEST}" not in found[checkpoint]:
            continue  # its upload was cut off
        download_run(remote, folder, found[checkpoint])
        damage = find_damage(folder / CHECKPOINTS / checkpoint)
        if damage is None:
            return _step(checkpoint)
        warn(f"checkpoint {remote.url}/{CHECKPOINTS}/{checkpoint} is damaged ({damage}); trying the one before it")
        shutil.rmtree(folder / CHECKPOINTS / checkpoint, ignore_errors=True)
    return None
