"""deploy/Dockerfile, read as a builder would: what it copies, who it runs as, where pins are. It builds nothing."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from deploy_manifests import pod_specs

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
TARGETS = ("cpu", "gpu")


@dataclass(slots=True)
class Stage:
    """A FROM and what follows it."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all_of(self, word: str) -> list[str]:
        return [text for keyword, text in self.steps if keyword == word]


def parsed(text: str) -> dict[str, Stage]:
    """Stages by name; arguments are put in."""
    joined = re.sub(r"\\\n", " ", "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#")))
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in filter(None, (line.strip() for line in joined.splitlines())):
        keyword, _, rest = line.partition(" ")
        if keyword == "ARG" and stage is None:
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif keyword == "FROM":
            image, _, name = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], rest).partition(" AS ")
            stage = stages[name] = Stage(name=name, base=image)
        else:
            assert stage is not None
            assert keyword in {"RUN", "COPY", "ENV", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}, line
            stage.steps.append((keyword, rest.strip()))
    return stages


STAGES = parsed(DOCKERFILE)


def lineage(name: str) -> list[Stage]:
    """The stages that an image is made of, from the outside base on; those that are only copied from are not."""
    stage = STAGES[name]
    return [*(lineage(stage.base) if stage.base in STAGES else []), stage]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file out: the last pattern that matches it, or a folder above it, decides."""
    decided = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.lstrip("!").rstrip("/")
        above = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
        anywhere = pattern.removeprefix("**/")
        if any(
            fnmatch.fnmatch(part, pattern) or (anywhere != pattern and fnmatch.fnmatch(Path(part).name, anywhere))
            for part in above
        ):
            decided = not line.startswith("!")
    return decided


def copied() -> list[str]:
    """What is copied out of the repository."""
    lines = [shlex.split(text) for stage in STAGES.values() for text in stage.all_of("COPY")]
    return [source for words in lines if not words[0].startswith("--from=") for source in words[:-1]]


def test_both_targets_are_there():
    assert set(TARGETS) <= STAGES.keys()


def test_bases_are_pinned_to_a_whole_version():
    outside = {stage.base for stage in STAGES.values() if stage.base not in STAGES}
    assert outside
    assert all(re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w-]+(@sha256:[0-9a-f]{64})?", image) for image in outside)
    assert all(image.startswith("python:3.11.") for image in outside)  # what the Makefile asks for
    assert "latest" not in DOCKERFILE


def test_everything_that_is_copied_exists_and_gets_to_the_builder():
    assert {"Makefile", "pyproject.toml", "requirements/", "weaver_rl/", "actors/"} <= set(copied())
    for source in copied():
        path = ROOT / source
        assert path.exists(), source
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        files = [file for file in files if "__pycache__" not in file.parts]
        assert files
        assert not [file for file in files if ignored(file.relative_to(ROOT).as_posix())]


@pytest.mark.parametrize(
    "path",
    [".git/config", ".venv/bin/ray", "runs/quickstart/run.json", "ray-token", "keys.txt", "deploy/Dockerfile",
     "tests/unit/fakes.py", "weaver_state/weaver.sqlite", "weaver_rl/__pycache__/cli.pyc", "weaver_rl/cli.pyc"],
)  # fmt: skip
def test_nothing_else_gets_to_the_builder(path: str):
    assert ignored(path)


@pytest.mark.parametrize("target", TARGETS)
def test_nobody_runs_as_root_and_pods_run_as_the_same_user(target: str):
    user = next(text for stage in reversed(lineage(target)) for text in reversed(stage.all_of("USER")))
    assert STAGES[target].steps[-1][0] in {"CMD", "ENTRYPOINT"}
    uid, gid = map(int, user.split(":"))
    assert uid > 0
    made = " ".join(text for stage in lineage(target) for text in stage.all_of("RUN"))
    assert f"--gid {gid}" in made
    assert f"useradd --uid {uid}" in made
    assert {
        (spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]) for _, spec in pod_specs()
    } == {(uid, gid)}


@pytest.mark.parametrize("target", TARGETS)
def test_no_build_tools_are_left_in_an_image(target: str):
    installed = " ".join(text for stage in lineage(target) for text in stage.all_of("RUN"))
    assert not re.search(r"\b(build-essential|make|git|pip install|curl|g\+\+)\b", installed)
    # Triton compiles at run time, so the one for GPUs has a C compiler, and says why.
    assert ("gcc" in installed) is (target == "gpu")
    assert all("builder" not in stage.name for stage in lineage(target))
    for text in (text for stage in STAGES.values() for text in stage.all_of("RUN") if "apt-get" in text):
        assert "--no-install-recommends" in text
        assert "rm -rf /var/lib/apt/lists/*" in text


@pytest.mark.parametrize("target", TARGETS)
def test_kuberay_finds_what_it_calls(target: str):
    steps = [step for stage in lineage(target) for step in stage.steps]
    everything = " ".join(text for _, text in steps)
    assert "wget" in everything  # in its probes
    assert "PATH=/opt/weaver-rl/bin:" in everything
    # A login shell's PATH has only this one of ours.
    assert "ln -s /opt/weaver-rl/bin/ray /opt/weaver-rl/bin/weaver-rl /usr/local/bin/" in everything
    # Its pods have probes of their own; one of Docker's would ask every node whether it is a server.
    assert "HEALTHCHECK" not in DOCKERFILE


@pytest.mark.parametrize("target", TARGETS)
def test_the_launchers_autoscaler_finds_what_it_calls_in_the_heads_container(target: str):
    installed = " ".join(text for stage in lineage(target) for text in stage.all_of("RUN")).split()
    assert {"openssh-client", "rsync"} <= set(installed)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["aws"] == ["boto3"]
    if target == "gpu":
        (asked,) = re.findall(r'--editable "\.\[(.*?)\]"', "\n".join(commands(target)))
        assert "aws" in asked.split(",")
    else:  # all that is pinned is installed
        assert re.search(r"^boto3==", (ROOT / "requirements" / "cpu.txt").read_text(), flags=re.MULTILINE)


def commands(target: str) -> list[str]:
    """What `make`, as the Dockerfile calls it, would run."""
    (call,) = re.findall(r"make (venv packages-\w+ [^&\n]*)", "\n".join(STAGES[f"builder-{target}"].all_of("RUN")))
    done = subprocess.run(
        ["make", "--dry-run", *shlex.split(call)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("target", TARGETS)
def test_pins_have_one_home(target: str):
    # The Dockerfile names no version of a package: what it installs is what `make install` installs.
    assert "==" not in DOCKERFILE
    ran = "\n".join(commands(target))
    assert "/opt/weaver-rl/bin/python" in ran
    if target == "cpu":
        torch = re.search(r"^TORCH := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert torch is not None
        assert f"torch=={torch[1]}+cpu" in ran
        assert "--requirement requirements/cpu.txt" in ran
        assert "--no-deps --requirement requirements/cpu-nodeps.txt" in ran
    else:
        assert "requirements/cpu.txt >/opt/weaver-rl/constraints.txt" in ran
        (extras,) = re.findall(r'--constraint \S+constraints.txt --editable "\.\[(.*?)\]"', ran)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert "gpu" in extras.split(",")
        assert set(extras.split(",")) <= known.keys()
        assert "dev" not in extras.split(",")


@pytest.mark.parametrize("target", TARGETS)
def test_our_own_packages_are_installed_and_not_linked(target: str):
    (last,) = (text for text in STAGES[f"builder-{target}"].all_of("RUN") if "--no-deps" in text)
    assert re.search(r"pip install --no-deps (--force-reinstall )?\. ", last)
    assert f"--from=builder-{target} /opt/weaver-rl /opt/weaver-rl" in STAGES[target].all_of("COPY")
    order = [keyword + " " + text for keyword, text in STAGES[f"builder-{target}"].steps]
    packages = next(index for index, step in enumerate(order) if "packages-" in step)
    assert packages < order.index("COPY weaver_rl/ weaver_rl/")  # a change of ours downloads nothing


def test_the_tag_that_the_readme_and_the_manifests_use_is_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert set(re.findall(r"weaver-rl:([\d.]+)-(?:cpu|gpu)", DOCKERFILE)) == {version}
