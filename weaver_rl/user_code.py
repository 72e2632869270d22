"""The Python files that a run's rewards and task are made of, as something that travels to nodes without them.

It knows names of the form `file.py:function` and `package.module:function`, and imports none of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from weaver_rl.errors import FilesError

MAX_BYTES = 16 << 20
MAX_FILES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeFile:
    """One file.

    Example:
        CodeFile(name="rewards/brevity.py", content=b"def brevity(rollout): ...")
    """

    name: str
    """Relative to the root of the code, with `/`."""
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCode:
    """Files of the driver, and where they were.

    Example:
        code = collect_code(["my_rewards.py:brevity"], Path("configs"))
        base_dir = write_code(code, Path("/somewhere"))
    """

    base_dir: Path
    """Where relative names start, on the driver's machine."""
    working_dir: Path
    """The driver's working directory."""
    base: str
    """`base_dir` relative to the root of `files`."""
    files: tuple[CodeFile, ...]
    problem: str | None = None
    """Why the files cannot travel; a node that has them itself does not mind."""

    @property
    def fingerprint(self) -> str:
        """The same for the same files."""
        digest = hashlib.sha256(self.base.encode())
        for file in self.files:
            digest.update(f"\0{file.name}\0{len(file.content)}\0".encode())
            digest.update(file.content)
        return digest.hexdigest()[:32]


def collect_code(names: Sequence[str], base_dir: Path) -> UserCode:
    """The files of these plugins: each one's own file, Python files beside it, and packages beside it.

    Names that are no file below `base_dir` or the working directory are of installed packages and not collected.
    """
    base_dir, working_dir = base_dir.absolute(), Path.cwd()
    found: dict[Path, Path] = {}
    """Where a file shall be, as if everything was found from `base_dir`; and where it is."""
    problem = None
    for name in names:
        place = name.rpartition(":")[0]
        if place.endswith(".py"):
            if Path(place).is_absolute():
                problem = f"{name!r} is an absolute path"
                continue
            start = next((d for d in (base_dir, working_dir) if (d / place).is_file()), None)
            if start is not None:
                _add(found, _beside((start / place).parent), start, base_dir)
        elif place:
            package = place.partition(".")[0]
            for start in (base_dir, working_dir):
                if (start / package).is_dir() or (start / f"{package}.py").is_file():
                    _add(found, _beside(start), start, base_dir)
                    break
    root = Path(os.path.commonpath([base_dir, *(path.parent for path in found)]))
    files: tuple[CodeFile, ...] = ()
    try:
        if (total := _size(found)) > MAX_BYTES or len(found) > MAX_FILES:
            problem = (
                f"the Python files beside the rewards and the task are {len(found):,} of {total / 1e6:,.1f} MB; at "
                f"most {MAX_FILES:,} of {MAX_BYTES / 1e6:.0f} MB travel"
            )
        if problem is None:
            files = tuple(
                CodeFile(name=path.relative_to(root).as_posix(), content=found[path].read_bytes())
                for path in sorted(found)
            )
    except OSError as error:  # of a file that happens to lie there: a run of one node does not need it
        problem = f"{error.filename or 'a file beside them'} cannot be read ({error.strerror})"
    if problem is not None:
        return UserCode(base_dir=base_dir, working_dir=working_dir, base="", files=(), problem=problem)
    return UserCode(base_dir=base_dir, working_dir=working_dir, base=base_dir.relative_to(root).as_posix(), files=files)


def find_code(code: UserCode, working_dir: Path) -> Path | None:
    """The base directory on a machine that has the same files: at the driver's paths, or in its own working directory.

    The latter is so under Ray jobs, which give every node a copy of the submitted directory.
    """
    candidates = [code.base_dir]
    if code.base_dir.is_relative_to(code.working_dir):
        candidates.append(working_dir / code.base_dir.relative_to(code.working_dir))
    return next((directory for directory in candidates if _has(directory, code)), None)


def write_code(code: UserCode, root: Path) -> Path:
    """Writes the files below `root`; returns the base directory there.

    Raises:
        FilesError: they cannot travel; says why and what to do.
    """
    if code.problem is not None:
        raise FilesError(
            f"the rewards and the task cannot be brought to a node that lacks them: {code.problem}. Put their files "
            "beside the configuration file, or install them as a package on every node"
        )
    for file in code.files:
        path = root / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.content)
    base_dir = root / code.base
    base_dir.mkdir(parents=True, exist_ok=True)
    return base_dir


def _has(base_dir: Path, code: UserCode) -> bool:
    up = len(PurePosixPath(code.base).parts)
    if not base_dir.is_dir() or code.problem is not None:
        return base_dir.is_dir()
    root = base_dir.parents[up - 1] if up and len(base_dir.parents) >= up else base_dir
    try:
        return all((root / file.name).read_bytes() == file.content for file in code.files)
    except OSError:
        return False


def _add(found: dict[Path, Path], files: Iterator[Path], start: Path, base_dir: Path) -> None:
    """Files that were found from another directory than `base_dir` travel as if they were found from there."""
    for file in files:
        if len(found) > MAX_FILES:
            return
        wanted = Path(os.path.normpath(base_dir / os.path.relpath(file, start)))
        found.setdefault(wanted, file)


def _beside(directory: Path) -> Iterator[Path]:
    """Python files of a directory, and those of packages in it."""
    for path in sorted(directory.glob("*.py")):
        if path.is_file():
            yield path
    for package in sorted(directory.glob("*/__init__.py")):
        # Unsorted, to stop at MAX_FILES: a package may hold anything, environments and data sets among it.
        yield from (path for path in package.parent.rglob("*.py") if path.is_file())


def _size(found: dict[Path, Path]) -> int:
    return sum(path.stat().st_size for path in found.values())
