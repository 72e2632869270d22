"""Files at a URL of any file system that fsspec knows. It knows no runs.

It asks for nothing that an object store lacks: whole files are written, read, listed and removed. Credentials and
options come from the environment, as that file system's own library reads them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from weaver_rl.errors import ConfigError, FilesError
from weaver_rl.run_location import PASSWORD_REFUSED, has_password

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
"""What to install for a scheme; fsspec's own message names others."""
WITHOUT_DIRECTORIES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory", "hf"}
RENAMED_IN_PLACE = {"file", "local", "sftp", "ssh"}
"""Where an upload that is cut off would leave half a file, and a rename is atomic."""


class RemoteFolder:
    """A folder of a remote file system. Any thread may use it.

    Example:
        remote = RemoteFolder("s3://bucket/runs/quickstart")
        remote.upload(Path("metrics.jsonl"), "metrics.jsonl")
    """

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a scheme that is unknown or whose package is not installed."""
        import fsspec

        if has_password(url):
            raise ConfigError(f"run_dir: {PASSWORD_REFUSED}")
        self.url = url.rstrip("/")
        scheme = self.url.partition("://")[0].rpartition("::")[2]
        try:
            self._fs: Any
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            package = PACKAGES.get(scheme)
            hint = f"pip install {package}" if package else str(error)
            raise ConfigError(f"run_dir: {self.url} needs a package that is not installed: {hint}") from None
        except Exception as error:  # boundary: every file system of fsspec raises its own errors
            raise ConfigError(f"run_dir: {self.url} cannot be used: {_words(error)}") from error
        self._root = str(root).rstrip("/")
        self._scheme = scheme
        self._made: set[str] = set()
        self._making = threading.Lock()

    def sizes(self, below: str = "") -> dict[str, int]:
        """Every file by name relative to the folder, with its bytes."""
        with self._errors("be listed"):
            self._fs.invalidate_cache()
            place = f"{self._root}/{below}".rstrip("/")
            try:
                found: dict[str, dict[str, Any]] = self._fs.find(place, detail=True)
            except FileNotFoundError:
                return {}
            return {
                path[len(self._root) + 1 :]: int(facts.get("size") or 0)
                for path, facts in found.items()
                # Consoles of object stores show folders, and keep them as empty files.
                if path.startswith(f"{self._root}/") and not path.endswith("/")
            }

    def read(self, name: str) -> bytes | None:
        """A small file's content; None when it is not there."""
        with self._errors(f"give {name}"):
            try:
                content: bytes = self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None
            return content

    def write(self, name: str, content: bytes) -> None:
        with self._errors(f"take {name}"):
            path = self._path(name)
            self._make_parent(path)
            with self._whole(path) as aside:
                self._fs.pipe_file(aside, content)

    def try_write(self, name: str) -> None:
        """Writes a file and removes it again, with the directories that were made for it."""
        with self._errors("be looked at"):
            missing = self._missing_directories()
        try:
            self.write(name, b"")
            self.remove([name])
        finally:
            for directory in missing:
                # It was not made, or somebody else wrote there meanwhile.
                with contextlib.suppress(NotImplementedError, OSError):
                    self._fs.rmdir(directory)
            self._made.clear()

    def upload(self, file: Path, name: str) -> None:
        with self._errors(f"take {name}"):
            path = self._path(name)
            self._make_parent(path)
            with self._whole(path) as aside:
                self._fs.put_file(str(file), aside)

    def download(self, name: str, file: Path) -> None:
        with self._errors(f"give {name}"):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(self._path(name), str(file))

    def remove(self, names: Iterable[str]) -> None:
        """Removes files, in this order; one that is not there is none."""
        for name in names:
            with self._errors(f"remove {name}"), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_parent(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        with self._making:
            if self._scheme not in WITHOUT_DIRECTORIES and parent not in self._made:
                with contextlib.suppress(NotImplementedError):  # another one without directories
                    self._fs.makedirs(parent, exist_ok=True)
                self._made.add(parent)

    def _missing_directories(self) -> list[str]:
        """What `write` will make, the innermost first."""
        missing: list[str] = []
        place = self._root
        while place and self._scheme not in WITHOUT_DIRECTORIES and not self._fs.exists(place):
            missing.append(place)
            place = place.rpartition("/")[0]
        return missing

    @contextlib.contextmanager
    def _whole(self, path: str) -> Iterator[str]:
        """Where to write a file that shall be there whole or not at all; object stores do that by themselves."""
        if self._scheme not in RENAMED_IN_PLACE:
            yield path
            return
        yield f"{path}.part"
        self._fs.mv(f"{path}.part", path)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # boundary: every file system of fsspec raises its own errors
            raise FilesError(f"{self.url} cannot {what}: {_words(error)}") from error


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
