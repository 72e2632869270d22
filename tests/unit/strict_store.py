"""A file system of fsspec that can do what an object store can, and no more. It keeps everything in memory.

Files are written whole; there are no renames, no appends and no directories. Tests make it fail, and see what was done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem


class StrictStore(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """`strict://bucket/name`."""

    protocol = "strict"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    log: ClassVar[list[str]] = []
    """`put NAME` and `rm NAME`, in order."""
    before: ClassVar[Callable[[str], None] | None] = None
    """Called with each such line before it is done; what it raises is the store's error."""

    @classmethod
    def empty(cls) -> None:
        cls.files.clear()
        cls.log.clear()
        cls.before = None

    def _done(self, what: str, path: str) -> str:
        path = self._strip_protocol(path)
        if StrictStore.before is not None:
            StrictStore.before(f"{what} {path}")
        self.log.append(f"{what} {path}")
        return path

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self.files[self._done("put", path)] = bytes(value)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        with open(lpath, "rb") as file:  # noqa: PTH123
            content = file.read()
        self.files[self._done("put", rpath)] = content

    def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
        try:
            return self.files[self._strip_protocol(path)]
        except KeyError:
            raise FileNotFoundError(path) from None

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        with open(lpath, "wb") as file:  # noqa: PTH123
            file.write(self.cat_file(rpath))

    def find(self, path: str, *_: Any, **__: Any) -> dict[str, dict[str, Any]]:
        path = self._strip_protocol(path)
        return {
            name: {"name": name, "size": len(content), "type": "file"}
            for name, content in sorted(self.files.items())
            if name.startswith(f"{path}/")
        }

    def rm_file(self, path: str) -> None:
        self.files.pop(self._done("rm", path), None)

    def _refused(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("an object store cannot do that")

    _open = mv = cp_file = touch = created = modified = makedirs = mkdir = _refused


fsspec.register_implementation("strict", StrictStore, clobber=True)
