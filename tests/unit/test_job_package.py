"""What travels with a job, and that the configuration finds it there."""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from actors import job_package
from actors.job_package import JobPackage, plan_package, write_package
from weaver_rl.config import RunConfig, load_config
from weaver_rl.errors import ConfigError
from weaver_rl.rewards.plugin import load_reward
from weaver_rl.tasks.load import load_task

pytestmark = pytest.mark.unit

HEAD = """
name: mine
model: {name: scratch, hidden_size: 64, num_heads: 2, num_layers: 1}
num_steps: 1
"""
REWARD = "from weaver_rl.types import Rollout\n\n\ndef one(rollout: Rollout) -> float:\n    return 1.0\n"
ROWS = '{"prompt": "1+1", "answer": "2"}\n' * 20


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's directory; commands are run from it."""
    (tmp_path / "work" / "configs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    # Loading a reward adds to both.
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("rewards_here", "rewards_beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "work"


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def configured(path: Path, rewards: str, task: str = "{name: reasoning_gym, dataset: chain_sum}") -> Path:
    return write(path, f"{HEAD}task: {task}\nrewards: {rewards}\n")


def planned(config: Path, *overrides: str, **options: object) -> JobPackage:
    return plan_package(config, load_config(config, overrides), **options)  # type: ignore[arg-type]


def in_the_job(package: JobPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> RunConfig:
    """The configuration as the job loads it: in its unpacked package, with everything else gone."""
    write_package(package, tmp_path / "package.zip")
    job = tmp_path / "job"
    zipfile.ZipFile(tmp_path / "package.zip").extractall(job)
    for entry in tmp_path.iterdir():
        if entry.is_dir() and entry != job:
            shutil.rmtree(entry)
    monkeypatch.chdir(job)
    return load_config(Path(package.config), [*overrides, *package.overrides])


def loads(config: RunConfig) -> None:
    """Every reward and the task are found."""
    assert config.base_dir is not None
    for spec in config.rewards:
        if spec.name != "task":
            load_reward(spec, config.base_dir)
    load_task(config.task, config.base_dir, 0)


@pytest.mark.parametrize(
    ("reward", "file"),
    [
        ("mine.py:one", "configs/mine.py"),
        ("../rewards/mine.py:one", "rewards/mine.py"),
        ("rewards/mine.py:one", "rewards/mine.py"),  # from the working directory
        ("rewards_here.mine:one", "rewards_here/mine.py"),
        ("rewards_beside.mine:one", "configs/rewards_beside/mine.py"),
    ],
)
def test_rewards_are_found_in_the_job(work: Path, tmp_path: Path, monkeypatch, reward: str, file: str):
    write(work / file, REWARD)
    config = configured(work / "configs" / "run.yaml", f"[{{name: '{reward}'}}]")
    package = planned(config)
    loads(in_the_job(package, tmp_path, monkeypatch))


def test_what_is_outside_a_given_directory_is_packed_beside_under_its_old_name(work: Path, tmp_path: Path, monkeypatch):
    reward = write(tmp_path / "elsewhere" / "mine.py", REWARD)
    write(tmp_path / "data" / "rows.jsonl", ROWS)
    write(tmp_path / "data" / "eval.jsonl", ROWS.replace("1+1", "2+2"))
    config = configured(
        tmp_path / "other" / "run.yaml",
        f"[{{name: '{reward}:one'}}, {{name: '../elsewhere/mine.py:one', weight: 0.5}}]",
        "{name: jsonl, path: ../data/rows.jsonl, eval_path: ../data/eval.jsonl}",
    )
    package = planned(config, working_dir=work)
    loaded = in_the_job(package, tmp_path, monkeypatch)
    loads(loaded)
    assert [spec.component_name for spec in loaded.rewards] == [f"{reward}:one", "../elsewhere/mine.py:one"]


def test_a_directory_of_everything_is_not_packed_for_one_file(work: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "private" / "secret.txt")
    write(tmp_path / "private" / "mine.py", REWARD)
    config = configured(work / "configs" / "run.yaml", "[{name: '../../private/mine.py:one'}]")
    package = planned(config)
    assert package.root == work / "configs"
    assert not [name for name in package.files if "secret" in name]
    loads(in_the_job(package, tmp_path, monkeypatch))


def test_a_configuration_in_a_directory_of_everything_travels_with_what_it_names(work: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(work))
    write(work / "mine.py", REWARD)
    write(work / "letters.txt")
    package = planned(configured(work / "run.yaml", "[{name: 'mine.py:one'}]"))
    assert set(package.files) == {"run.yaml", "mine.py"}
    assert "only what the configuration names" in package.notes[0]


SECRETS = (
    ".env",
    ".env.local",
    ".netrc",
    ".ssh/id_rsa",
    ".aws/credentials",
    ".kube/config",
    "deploy.pem",
    "id_ed25519",
    "ray-token",
    "api-keys.txt",
    ".ray/auth_token",
)


@pytest.mark.parametrize("secret", SECRETS)
def test_what_lets_somebody_in_stays_here(work: Path, secret: str):
    write(work / "configs" / secret)
    config = configured(work / "configs" / "run.yaml", "[{name: task}]")
    assert set(planned(config, working_dir=work).files) == {"configs/run.yaml"}


def test_what_is_kept_back_for_that_reason_is_said(work: Path):
    write(work / "api-keys.txt")
    config = configured(work / "run.yaml", "[{name: task}]")
    assert any("api-keys.txt" in note for note in planned(config, working_dir=work).notes)


def test_the_token_of_this_user_stays_here_whatever_its_name(work: Path, monkeypatch):
    token = write(work / "configs" / "model" / "mine.txt")
    (work / "configs" / "linked.txt").symlink_to(token)
    config = configured(work / "configs" / "run.yaml", "[{name: task}]")
    monkeypatch.chdir(work / "configs")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "model/mine.txt")
    write(work / "configs" / "model" / "config.json")
    assert set(planned(config, "model={name: ./model}").files) == {"run.yaml", "model/config.json"}


def test_the_tokens_that_the_documents_have_users_make_are_kept_back():
    root = Path(__file__).parents[2]
    made = re.findall(r"(?<=>)[a-z][\w.-]+", (root / "docs" / "clusters.md").read_text())
    assert {"ray-token", "api-keys.txt"} <= set(made)
    ignored = (root / ".gitignore").read_text().splitlines()
    for name in ("ray-token", "api-keys.txt"):
        assert job_package._spec(job_package.SECRETS).match_file(name)
        assert job_package._spec(ignored).match_file(name)


def test_a_base_dir_of_the_cluster_is_kept(work: Path, tmp_path: Path, monkeypatch):
    write(work / "rewards" / "mine.py", REWARD)
    task = write(tmp_path / "elsewhere" / "task.py")
    config = configured(work / "configs" / "run.yaml", "[{name: 'rewards/mine.py:one'}]", f"{{name: '{task}:Mine'}}")
    for there, options in (
        (tmp_path / "of_the_cluster", {}),
        (work / "configs" / "of_the_cluster", {"working_dir": work / "configs"}),
    ):
        package = planned(config, f"base_dir={there}", **options)
        assert package.notes == (
            f"base_dir is {there}: the cluster's machines must have it",
            f"task.name is {task}:Mine: the cluster's machines must have it there",
        )
        assert not [item for item in package.overrides if item.startswith(("base_dir", "task"))]
    loaded = in_the_job(package, tmp_path, monkeypatch, f"base_dir={there}")
    assert loaded.base_dir == there
    load_reward(loaded.rewards[0], there)


def test_a_base_dir_of_this_machine_is_replaced_and_that_is_said(work: Path, tmp_path: Path, monkeypatch):
    write(work / "rewards" / "mine.py", REWARD)
    config = configured(work / "configs" / "run.yaml", "[{name: 'mine.py:one'}]")
    package = planned(config, f"base_dir={work}/rewards")
    assert package.notes == (f"base_dir is {work}/rewards here; in the job it is 'rewards' of the package",)
    assert planned(config).notes == ()
    loads(in_the_job(package, tmp_path, monkeypatch, f"base_dir={work}/rewards"))


def test_a_name_that_is_not_utf_8_is_an_error_that_says_how_to_leave_it_out(work: Path, tmp_path: Path):
    (work / "configs" / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    config = configured(work / "configs" / "run.yaml", "[{name: task}]")
    with pytest.raises(ConfigError, match=r"caf\?\.txt: .*not UTF-8.*--exclude 'caf\?\.txt'"):
        planned(config)
    package = planned(config, excludes=["caf?.txt"])
    assert set(package.files) == {"run.yaml"}
    write_package(package, tmp_path / "package.zip")


def test_a_link_to_everything_is_not_followed(work: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "home" / "letters.txt")
    config = configured(work / "configs" / "run.yaml", "[{name: task}]")
    (work / "configs" / "home").symlink_to(tmp_path / "home")
    (work / "configs" / "root").symlink_to("/")
    assert set(planned(config).files) == {"run.yaml"}


def test_what_is_ignored_stays_here_unless_the_configuration_names_it(work: Path):
    config = configured(work / "configs" / "run.yaml", "[{name: task}]", "{name: jsonl, path: ../data/rows.jsonl}")
    for name in ("data/rows.jsonl", "data/more.jsonl", ".git/HEAD", ".venv/bin/python", "runs/a/metrics.jsonl"):
        write(work / name, ROWS)
    for name in ("a/__pycache__/b.pyc", "a/model.safetensors", "a/notes.md", "a/keep.log", "a/drop.log", "b/old.py"):
        write(work / name)
    write(work / ".gitignore", "data/\n*.log\n!keep.log\n")
    write(work / "b" / ".rayignore", "old.py\n")
    package = planned(config, excludes=["*.md"])
    assert package.root == work
    names = {name for name in package.files if "ignore" not in name}
    assert names == {"configs/run.yaml", "data/rows.jsonl", "a/keep.log"}


def test_ignore_files_above_count_up_to_the_top_of_the_repository(work: Path):
    write(work / ".git" / "HEAD")
    write(work / ".gitignore", "*.csv\n")
    write(work.parent / ".gitignore", "*.txt\n")
    write(work / "configs" / "big.csv")
    write(work / "configs" / "small.txt")
    assert set(planned(configured(work / "configs" / "run.yaml", "[{name: task}]")).files) == {"run.yaml", "small.txt"}
    write(work / ".gitignore", "configs/\n")  # that would be all of it
    assert "small.txt" in planned(work / "configs" / "run.yaml").files


def test_links_are_packed_as_what_they_lead_to_and_a_circle_ends(work: Path, tmp_path: Path):
    write(tmp_path / "shared" / "lib.py", "y = 1")
    config = configured(work / "configs" / "run.yaml", "[{name: task}]")
    (work / "configs" / "shared").symlink_to(tmp_path / "shared")
    (work / "configs" / "again").symlink_to(work / "configs")
    (work / "configs" / "broken").symlink_to(work / "nothing")
    assert set(planned(config).files) == {"run.yaml", "shared/lib.py"}


def test_a_model_directory_travels_whole_where_it_is_relative(work: Path, tmp_path: Path):
    write(work / "configs" / "model" / "model.safetensors")
    config = configured(work / "configs" / "run.yaml", "[{name: task}]")
    relative = planned(config, "model={name: ./model}")
    assert "model/model.safetensors" in relative.files
    assert relative.notes == ()
    write(work / "configs" / "model" / ".ssh" / "id_other")
    write(work / "configs" / "model" / ".env")
    assert planned(config, "model={name: ./model}").files == relative.files

    absolute = planned(config, f"model={{name: {work}/configs/model}}")
    assert "model/model.safetensors" not in absolute.files
    assert absolute.notes == (f"model.name is {work}/configs/model: the cluster's machines must have it there",)


def test_a_package_that_is_too_large_names_its_largest_files(work: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(job_package, "MAX_PACKAGE_BYTES", 200_000)
    config = configured(work / "configs" / "run.yaml", "[{name: task}]")
    for name in ("a.npz", "b.npz"):
        (work / "configs" / name).write_bytes(random.Random(name).randbytes(150_000))
    with pytest.raises(ConfigError, match=r"job server takes 0\..*--exclude(.|\n)*0\.1 MB  b\.npz"):
        write_package(planned(config), tmp_path / "package.zip")
    write_package(planned(config, excludes=["b.npz"]), tmp_path / "package.zip")


def test_a_directory_that_is_not_there_is_an_error(work: Path):
    config = configured(work / "run.yaml", "[{name: task}]")
    with pytest.raises(ConfigError, match="--working-dir"):
        planned(config, working_dir=work / "nothing")


def test_a_module_that_the_job_would_not_find_is_an_error(work: Path):
    write(work / "rewards_here" / "mine.py", REWARD)
    config = configured(work / "configs" / "run.yaml", "[{name: 'rewards_here.mine:one'}]")
    with pytest.raises(ConfigError, match=rf"--working-dir {work}"):
        planned(config, working_dir=work / "configs")
