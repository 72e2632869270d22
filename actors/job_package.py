"""What travels with a job: the working directory without what is ignored, and what the configuration names beside it.

What a configuration names by a relative path travels with it; an absolute path is the cluster's own, but for Python
files of rewards and tasks, which travel too. It knows no cluster.
"""

from __future__ import annotations

import os
import shlex
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.thirdparty.pathspec import PathSpec  # type: ignore[attr-defined]

from weaver_rl.config import RunConfig
from weaver_rl.errors import ConfigError
from weaver_rl.job_files import NamedFile, modules_of_working_dir, named_files, override
from weaver_rl.local_clusters import TOKEN_PATH

MAX_PACKAGE_BYTES = int(DASHBOARD_CLIENT_MAX_SIZE) - 2**16
"""What Ray's job server takes in one request."""
NUM_LARGEST = 8
IGNORE_FILES = (".gitignore", ".rayignore")
SECRETS = (
    *(".env", ".env.*", ".netrc", "_netrc", ".pypirc", ".git-credentials", ".aws/", ".azure/", ".docker/", ".gnupg/"),
    *(".kube/", ".ssh/", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*.pem", "*.key", "*.p12"),
    *(".ray/", "ray-token", "api-keys.txt"),
)
"""What lets somebody in: a package is seen by everybody who uses the cluster. As in a .gitignore."""
NEVER_PACKED = (
    *SECRETS,
    *(".git/", ".hg/", ".svn/", ".venv/", "venv/", "node_modules/", "__pycache__/", "*.pyc", ".DS_Store"),
    *(".mypy_cache/", ".pytest_cache/", ".ruff_cache/", ".hypothesis/", ".ipynb_checkpoints/", "*.egg-info/"),
    *("runs/", "wandb/", "mlruns/", "checkpoints/", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.gguf"),
)
"""As in a .gitignore; `--exclude` adds to them. Files that the configuration names are packed nevertheless, directories
without the secrets in them."""
BESIDE = "_beside"
"""Directory of the package for what lies outside of the working directory."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Of every file in the package: the same content is the same package, which is sent only once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPackage:
    """What a job is started with.

    Example:
        JobPackage(root=Path("/home/me/work"), files={"tiny.yaml": Path("/home/me/work/tiny.yaml")},
                   config="tiny.yaml", overrides=("base_dir=.",), notes=())
    """

    root: Path
    """The working directory."""
    files: dict[str, Path]
    """Name in the package → file of this machine."""
    config: str
    """Name of the configuration file in the package."""
    overrides: tuple[str, ...]
    """What makes the configuration find its files in the package."""
    notes: tuple[str, ...]
    """What the user should know, one sentence each."""

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())


def plan_package(
    config_file: Path, config: RunConfig, *, working_dir: Path | None = None, excludes: Sequence[str] = ()
) -> JobPackage:
    """Decides what travels; reads directories, no file's content.

    Args:
        config: what `config_file` and the overrides say.
        working_dir: None: the least directory with the configuration file and all files that it names, if that is no
            directory of everything; else the configuration file's.

    Raises:
        ConfigError: a directory that is not there, a file that cannot be packed.
    """
    config_file = config_file.resolve()
    base_dir = (config.base_dir or config_file.parent).resolve()
    is_given = config.base_dir is not None and config.base_dir.is_absolute() and base_dir != config_file.parent
    is_clusters = is_given and not base_dir.is_dir()
    named = named_files(config, base_dir)
    if is_clusters:
        # From there no path leads into the package, wherever that is unpacked.
        named = [item for item in named if item.also_from_working_dir]
    modules = modules_of_working_dir(config, base_dir)
    if working_dir is not None:
        root = _given(working_dir)
    else:
        starts = [*(() if is_clusters else [base_dir]), *([Path.cwd()] if modules else ())]
        root = _least(config_file, [*starts, *_parents(named)])
    if modules and root != Path.cwd():
        raise ConfigError(
            f"the module {modules[0]!r} of a reward is in {Path.cwd()}, the package begins at {root}: the job would "
            f"not find it. Give --working-dir {Path.cwd()}, or name the file: {modules[0]}.py:FUNCTION"
        )
    notes = []
    if working_dir is None and root in _of_everything():
        files = {}
        notes.append(
            f"of {root} only what the configuration names is packed; --working-dir DIRECTORY packs a directory"
        )
    else:
        files = dict(_walk(root, [*NEVER_PACKED, *excludes]))
        if secrets := [name for name in SECRETS if any(root.glob(name.rstrip("/")))]:
            notes.append(f"not packed, because it may let somebody in: {', '.join(secrets)} of {root}")
    where = _place_in(files, root, config_file, Path(BESIDE))
    # Relative: every node unpacks the package at a place of its own.
    inside = base_dir if base_dir.is_relative_to(root) and not is_clusters else root
    in_package = inside.relative_to(root).as_posix()
    overrides = [] if is_clusters else [override("base_dir", in_package)]
    if is_clusters:
        notes.append(f"base_dir is {base_dir}: the cluster's machines must have it")
    elif is_given:
        notes.append(f"base_dir is {base_dir} here; in the job it is {in_package!r} of the package")
    overrides += _place_named(files, named, root, inside)
    notes += [f"{key} is {path}: the cluster's machines must have it there" for key, path in _absolute(config, named)]
    files = _without_token(files)
    _check_names(files)
    return JobPackage(root=root, files=files, config=str(where), overrides=tuple(overrides), notes=tuple(notes))


def write_package(package: JobPackage, target: Path) -> None:
    """Writes the package as a zip file.

    Raises:
        ConfigError: it is larger than the job server takes; names the largest files.
    """
    # Nothing shrinks to a hundredth: that would not be worth writing first.
    if package.num_bytes > 100 * MAX_PACKAGE_BYTES:
        raise ConfigError(_too_large(package, package.num_bytes, "unpacked"))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(package.files.items()):
            info = zipfile.ZipInfo(name, EPOCH)
            info.external_attr = (path.stat().st_mode & 0o777) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as packed:
                while block := source.read(2**20):
                    packed.write(block)
            if archive.fp is not None and archive.fp.tell() > MAX_PACKAGE_BYTES:
                break
    if target.stat().st_size > MAX_PACKAGE_BYTES:
        raise ConfigError(_too_large(package, target.stat().st_size, "or more, packed"))


def _too_large(package: JobPackage, num_bytes: int, how: str) -> str:
    sizes = sorted(((path.stat().st_size, name) for name, path in package.files.items()), reverse=True)
    largest = "\n".join(f"  {size / 2**20:8.1f} MB  {name}" for size, name in sizes[:NUM_LARGEST])
    return (
        f"the package of {package.root} has {num_bytes / 2**20:.0f} MB ({how}), the job server takes "
        f"{MAX_PACKAGE_BYTES / 2**20:.0f}. Leave files out with --exclude PATTERN or a .gitignore or .rayignore, or "
        "give a smaller --working-dir; put data on storage that the cluster has and name it by its absolute path. The "
        f"largest files:\n{largest}"
    )


def _given(working_dir: Path) -> Path:
    if not working_dir.is_dir():
        raise ConfigError(f"--working-dir {working_dir}: not a directory")
    return working_dir.resolve()


def _without_token(files: dict[str, Path]) -> dict[str, Path]:
    """Without the file by which Ray lets this user in, whatever its name."""
    if not (token := os.environ.get(TOKEN_PATH)):
        return files
    kept_back = Path(token).resolve()
    return {name: path for name, path in files.items() if path.resolve() != kept_back}


def _check_names(files: Iterable[str]) -> None:
    """An error and no note: a reward may look for the file."""
    for name in files:
        try:
            name.encode()
        except UnicodeEncodeError:
            pattern = "".join("?" if "\udc80" <= letter <= "\udcff" else letter for letter in name)
            raise ConfigError(
                f"{pattern}: a name that is not UTF-8 cannot be packed; rename the file, or leave it out with "
                f"--exclude {shlex.quote(pattern)}"
            ) from None


def _parents(named: Iterable[NamedFile]) -> list[Path]:
    return [item.path.parent for item in named if item.relative]


def _least(config_file: Path, directories: Iterable[Path]) -> Path:
    """The least directory with all of it; a directory of everything is never packed for one file somewhere in it."""
    least = Path(os.path.commonpath([config_file.parent, *directories]))
    return config_file.parent if least in _of_everything() else least


def _of_everything() -> set[Path]:
    home = Path(os.path.expanduser("~")).resolve()  # noqa: PTH111  Path.home() fails for a user without one
    return {Path("/"), Path("/home"), Path("/root"), Path(tempfile.gettempdir()).resolve(), home, *home.parents}


def _place_named(files: dict[str, Path], named: Iterable[NamedFile], root: Path, inside: Path) -> list[str]:
    """Sees to it that all of them are in the package; returns the `key=value` that name them anew."""
    overrides: list[str] = []
    for index, item in enumerate(named):
        if not item.path.is_dir():
            place = _place_in(files, root, item.path, Path(BESIDE) / str(index))
        else:
            place = _place_directory(files, root, item.path, Path(BESIDE) / str(index))
        written = os.path.relpath(root / place, inside)
        if written != item.written and not _finds(item, root / place, inside, root):
            overrides.extend(item.overrides(written))
    return overrides


def _place_in(files: dict[str, Path], root: Path, path: Path, beside: Path) -> Path:
    """Sees to it that the file is in the package; returns where."""
    place = path.relative_to(root) if path.is_relative_to(root) else beside / path.name
    files[place.as_posix()] = path
    return place


def _place_directory(files: dict[str, Path], root: Path, path: Path, beside: Path) -> Path:
    place = path.relative_to(root) if path.is_relative_to(root) else beside / path.name
    secrets = _spec(SECRETS)
    for file in sorted(path.rglob("*")):
        if file.is_file() and not _matches(secrets, path, file, is_directory=False):
            files[(place / file.relative_to(path)).as_posix()] = file
    return place


def _finds(item: NamedFile, place: Path, inside: Path, root: Path) -> bool:
    """Whether what the configuration says leads there in the job, whose working directory is the package."""
    starts = (inside, root) if item.also_from_working_dir else (inside,)
    return any(Path(os.path.normpath(start / item.written)) == place for start in starts)


def _absolute(config: RunConfig, named: Iterable[NamedFile]) -> Iterator[tuple[str, str]]:
    packed = {item.key for item in named}
    for key, value in (
        ("task.name", config.task.name),
        ("task.path", getattr(config.task, "path", None)),
        ("task.eval_path", getattr(config.task, "eval_path", None)),
        ("model.name", config.model.name),
    ):
        if isinstance(value, str) and key not in packed and Path(value).is_absolute():
            yield key, value


def _walk(root: Path, patterns: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Files below `root` that no pattern and no ignore file leaves out; links are followed, never in a circle."""
    rules = [(root, _spec(patterns))]
    repository = next((directory for directory in (root, *root.parents) if (directory / ".git").exists()), root)
    # Ignore files above count too, up to the top of the repository, unless they leave out all of this.
    above = [
        rule for directory in root.parents if directory.is_relative_to(repository) for rule in _rules_in(directory)
    ]
    if not any(_matches(spec, start, root, True) for start, spec in above):
        rules.extend(above)
    yield from _walk_directory(root, root, rules, frozenset())


def _walk_directory(
    root: Path, directory: Path, rules: list[tuple[Path, PathSpec]], inside: frozenset[Path]
) -> Iterator[tuple[str, Path]]:
    here = directory.resolve()
    # A link to a home directory or to / leads to everything that the user has.
    if here in inside or (directory != root and here in _of_everything()):
        return
    rules = [*rules, *_rules_in(directory)]
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be read ({error.strerror}); leave it out with --exclude, or give another --working-dir"
        ) from None
    for path in entries:
        is_directory = path.is_dir()
        if any(_matches(spec, start, path, is_directory) for start, spec in rules):
            continue
        if is_directory:
            yield from _walk_directory(root, path, rules, inside | {here})
        elif path.is_file():
            yield path.relative_to(root).as_posix(), path


def _rules_in(directory: Path) -> list[tuple[Path, PathSpec]]:
    found = []
    for name in IGNORE_FILES:
        file = directory / name
        if file.is_file():
            lines = file.read_text(errors="replace").splitlines()
            found.append((directory, _spec(lines)))
    return found


def _spec(patterns: Sequence[str]) -> PathSpec:
    spec: PathSpec = PathSpec.from_lines("gitwildmatch", patterns)  # type: ignore[no-untyped-call]
    return spec


def _matches(spec: PathSpec, start: Path, path: Path, is_directory: bool) -> bool:
    return bool(spec.match_file(path.relative_to(start).as_posix() + ("/" if is_directory else "")))  # type: ignore[no-untyped-call]
