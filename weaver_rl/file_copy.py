"""A directory described so that another machine can tell whether it has the same, and written from pieces of it.

It knows neither how the pieces travel nor what is in the files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weaver_rl.errors import FilesError

CHUNK_BYTES = 32 << 20
"""A piece of a file; what a copy holds in memory is a few of them."""
SAMPLE_BYTES = 64 << 10
NUM_SAMPLES = 18
SAMPLE_EVERY_BYTES = 32 << 20
"""A large file is compared at `NUM_SAMPLES` places or more, its beginning and end among them, and never further apart
than this: two models may differ in one layer. Small files are compared whole."""
SPARE_BYTES = 256 << 20
"""Free space that a copy leaves on a disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """One file of a directory.

    Example:
        FileFacts(name="model.safetensors", num_bytes=538_090_408, sample="9f86d0…")
    """

    name: str
    """Relative to the directory, with `/`."""
    num_bytes: int
    sample: str
    """SHA-256 over the file's size and bytes at fixed places of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryFacts:
    """The files of a directory, by name.

    Example:
        facts = describe(Path("runs/quickstart/policy"))
        has_files(Path("/elsewhere/policy"), facts)
    """

    files: tuple[FileFacts, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def fingerprint(self) -> str:
        """The same for directories with the same files."""
        content = json.dumps([asdict(file) for file in self.files], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a file on its way.

    Example:
        Chunk(name="model.safetensors", offset=0, content=np.zeros(3, np.uint8), crc32=4282505490)
    """

    name: str
    offset: int
    content: npt.NDArray[np.uint8]
    crc32: int


def describe(directory: Path, wanted: Callable[[str], bool] = lambda name: True) -> DirectoryFacts:
    """Every file below the directory whose name is wanted, links followed.

    Raises:
        FilesError: it is not there, or a file cannot be read.
    """
    if not directory.is_dir():
        raise FilesError(f"directory {directory} is not there")
    try:
        names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
        return DirectoryFacts(files=tuple(_facts(directory, name) for name in names if wanted(name)))
    except OSError as error:
        raise FilesError(f"directory {directory} cannot be read: {error}") from error


def num_bytes_of(directory: Path) -> int:
    """What all files below a directory have together, links followed."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def has_files(directory: Path, facts: DirectoryFacts) -> bool:
    """Whether the directory has these files with this content; it may have others."""
    try:
        # Sizes first: they tell most differences without reading anything.
        if any((directory / file.name).stat().st_size != file.num_bytes for file in facts.files):
            return False
        return all(_facts(directory, file.name) == file for file in facts.files)
    except OSError:
        return False


def pieces(facts: DirectoryFacts) -> Iterator[tuple[str, int]]:
    """Name and offset of every chunk that a copy consists of; an empty file has one."""
    for file in facts.files:
        for offset in range(0, max(file.num_bytes, 1), CHUNK_BYTES):
            yield file.name, offset


def read_chunk(directory: Path, name: str, offset: int) -> Chunk:
    """One piece of a file. Raises FilesError when it cannot be read."""
    try:
        with (directory / name).open("rb") as file:
            file.seek(offset)
            content = np.frombuffer(file.read(CHUNK_BYTES), np.uint8)
    except OSError as error:
        raise FilesError(f"{directory / name} cannot be read: {error}") from error
    return Chunk(name=name, offset=offset, content=content, crc32=zlib.crc32(content.data))


def write_files(directory: Path, facts: DirectoryFacts, chunks: Iterable[Chunk]) -> None:
    """Writes the files out of their pieces, in the order of `pieces`, and compares what is written with the facts.

    Raises:
        FilesError: the disk has too little room, or what came is not what was described.
    """
    require_room(directory, facts.num_bytes)
    try:
        for chunk in chunks:
            if zlib.crc32(chunk.content.data) != chunk.crc32:
                raise FilesError(f"{chunk.name} was damaged on its way at byte {chunk.offset:,}")
            path = directory / chunk.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if chunk.offset else "wb") as file:
                file.seek(chunk.offset)
                file.write(chunk.content.data)
    except OSError as error:
        raise FilesError(f"{directory} cannot be written: {error}") from error
    if not has_files(directory, facts):
        raise FilesError(f"{directory} is not what was copied into it: the files changed while they were copied")


def require_room(directory: Path, num_bytes: int) -> None:
    """Raises FilesError where a copy of that size would fill the disk."""
    free = shutil.disk_usage(directory).free
    if num_bytes + SPARE_BYTES > free:
        raise FilesError(
            f"a copy of {num_bytes / 1e6:,.0f} MB is needed in {directory}, which has {free / 1e6:,.0f} MB free "
            f"({SPARE_BYTES / 1e6:,.0f} MB stay free). Free some space there, or point it elsewhere: run_dir for "
            "checkpoints, XDG_CACHE_HOME of Ray's processes on that node for its cache"
        )


def _facts(directory: Path, name: str) -> FileFacts:
    path = directory / name
    num_bytes = path.stat().st_size
    digest = hashlib.sha256(str(num_bytes).encode())
    with path.open("rb") as file:
        for offset in _sampled(num_bytes):
            file.seek(offset)
            digest.update(file.read(SAMPLE_BYTES))
    return FileFacts(name=name, num_bytes=num_bytes, sample=digest.hexdigest())


def _sampled(num_bytes: int) -> Iterable[int]:
    """Where the samples of a file begin."""
    if num_bytes <= NUM_SAMPLES * SAMPLE_BYTES:
        return range(0, num_bytes, SAMPLE_BYTES)
    num = max(NUM_SAMPLES, -(-num_bytes // SAMPLE_EVERY_BYTES) + 1)
    return [(num_bytes - SAMPLE_BYTES) * index // (num - 1) for index in range(num)]
