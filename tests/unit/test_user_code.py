"""Users' files that travel to nodes without them."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from test_rewards_worker import make_rollout

from actors.reward import RewardActor, code_here
from weaver_rl import user_code
from weaver_rl.errors import FilesError
from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig
from weaver_rl.rewards.plugin import load_reward
from weaver_rl.tasks.config import CustomTask
from weaver_rl.user_code import UserCode, collect_code, find_code, write_code

pytestmark = pytest.mark.unit


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "configs/my_rewards.py": "from words import GOOD\ndef good(rollout): return GOOD\n",
        "configs/words.py": "GOOD = 1.0\n",
        "configs/package/__init__.py": "",
        "configs/package/inner/deep.py": "",
        "configs/data/not_code.jsonl": "{}",
        "shared/judge.py": "def judge(rollout): return 0.5\n",
        "installed_here/__init__.py": "def f(rollout): return 2.0\n",
        "elsewhere/by_cwd.py": "def f(rollout): return 3.0\n",
    }
    for name, text in files.items():
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text(text)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def names(code: UserCode) -> list[str]:
    return [file.name for file in code.files]


def test_a_file_travels_with_what_it_can_import(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = collect_code(["task", "numeric", "my_rewards.py:good"], project / "configs")
    assert names(code) == ["my_rewards.py", "package/__init__.py", "package/inner/deep.py", "words.py"]
    base_dir = write_code(code, tmp_path / "node")
    shutil.rmtree(project / "configs")
    assert load_reward(RewardSpec(name="my_rewards.py:good"), base_dir).call(None) == 1.0


def test_names_lead_to_the_same_files_as_before(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Upwards, and from the working directory where the base directory has no such file."""
    wanted = ["../shared/judge.py:judge", "elsewhere/by_cwd.py:f", "installed_here:f"]
    code = collect_code(wanted, project / "configs")
    base_dir = write_code(code, tmp_path / "node")
    monkeypatch.chdir("/")
    assert (base_dir / "../shared/judge.py").is_file()
    assert (base_dir / "elsewhere/by_cwd.py").is_file()
    assert (base_dir / "installed_here/__init__.py").is_file()


def test_code_is_found_at_the_drivers_path_or_in_the_working_directory_of_a_job(project: Path, tmp_path: Path):
    code = collect_code(["my_rewards.py:good"], project / "configs")
    assert find_code(code, Path("/")) == project / "configs"
    project.rename(tmp_path / "copy")
    assert find_code(code, Path("/")) is None
    assert find_code(code, tmp_path / "copy") == tmp_path / "copy" / "configs"


def test_other_code_at_the_same_path_is_not_it(project: Path):
    code = collect_code(["my_rewards.py:good"], project / "configs")
    (project / "configs" / "words.py").write_text("GOOD = 9.0\n")
    assert find_code(code, Path("/")) is None


def test_without_files_of_users_nothing_travels(tmp_path: Path):
    code = collect_code(["reasoning_gym", "task"], tmp_path)
    assert code.files == ()
    assert write_code(code, tmp_path / "node").is_dir()


def test_an_absolute_path_is_refused_where_it_is_not_there(project: Path, tmp_path: Path):
    code = collect_code([f"{project}/configs/my_rewards.py:good"], project / "configs")
    assert find_code(code, Path("/")) == project / "configs"
    with pytest.raises(FilesError, match=r"absolute path. Put their files beside the configuration file"):
        write_code(code, tmp_path / "node")


def test_too_much_is_refused_with_both_numbers(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(user_code, "MAX_FILES", 2)
    code = collect_code(["my_rewards.py:good"], project / "configs")
    with pytest.raises(FilesError, match=r"are 3 of .*; at most 2 of"):
        write_code(code, tmp_path / "node")


def test_a_file_that_cannot_be_read_stops_only_nodes_without_the_code(project: Path, tmp_path: Path):
    (project / "configs" / "unreadable.py").symlink_to("/proc/self/mem")
    code = collect_code(["my_rewards.py:good"], project / "configs")
    assert find_code(code, Path("/")) == project / "configs"
    with pytest.raises(FilesError, match=r"cannot be read \(Input/output error\)"):
        write_code(code, tmp_path / "node")


def test_a_worker_elsewhere_scores_with_the_drivers_code(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The real worker, its rewards, and the scorer of a task of the user's, after the driver's files are gone."""
    (project / "configs" / "my_task.py").write_text(
        "from weaver_rl.tasks.task import Problem\n"
        "class Mine:\n"
        "    num_problems = None\n"
        "    def problem(self, index): return Problem(problem_id=str(index), prompt='x')\n"
        "    def eval_problems(self, num): return []\n"
        "    def scorer(self): return lambda rollout: 7.0\n"
    )
    names = ["my_task.py:Mine", "my_rewards.py:good"]
    code = collect_code(names, project / "configs")
    shutil.rmtree(project / "configs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node"))
    specs = (RewardSpec(name="task"), RewardSpec(name="my_rewards.py:good"))

    async def scored() -> list[float | None]:
        actor = RewardActor(specs, RewardWorkersConfig(), code, CustomTask(name="my_task.py:Mine"))
        await actor.start()
        try:
            [components] = await actor.score([make_rollout()])
            return [component.value for component in components]
        finally:
            await actor.close()

    assert asyncio.run(scored()) == [7.0, 1.0]
    assert code_here(code) == code_here(code)
    assert len(list((tmp_path / "node" / "weaver-rl" / "code").glob("[!.]*"))) == 1
