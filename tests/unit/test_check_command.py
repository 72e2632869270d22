"""`weaver-rl check` as a user calls it: lines, exit status, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from check_parts import ROOT, TINY, cluster, node

from weaver_rl import cli
from weaver_rl.check.resources import ClusterFacts
from weaver_rl.local_clusters import ClusterNode, LocalCluster, cluster_files

pytestmark = pytest.mark.unit


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command in an empty working directory; gives its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["weaver-rl", "check", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return ended.value.code or 0, printed.out

    return run


def test_the_quickstart_passes_on_this_machine(check, tmp_path: Path):
    status, printed = check(str(ROOT / "configs" / "quickstart.yaml"), "--no-cluster")
    assert status == 0, printed
    for words in ("gold 1; wrong 0; empty 0", "858,496 parameters", "room 60", "1 × learner rank", "can be written"):
        assert words in printed
    assert "fail" not in printed
    assert list(tmp_path.iterdir()) == []


def test_what_lacks_model_and_data_says_exactly_that(check):
    status, printed = check(str(ROOT / "configs" / "gsm8k_1gpu.yaml"), "--json", "--no-cluster")
    content = json.loads(printed)
    levels = {line["subject"]: line["level"] for line in content["findings"]}
    assert status == 1
    assert {subject for subject, level in levels.items() if level == "fail"} == {"task.path", "task.eval_path", "model"}
    assert any("'Qwen/Qwen2.5-1.5B-Instruct' is not here" in line["seen"] for line in content["findings"])
    assert levels["memory"] == "warn"
    assert content["summary"].startswith("3 failures, 4 warnings: files: task.path; ")


def test_what_plugins_print_is_no_part_of_the_json(check, tmp_path: Path):
    (tmp_path / "loud.py").write_text("print('NOISE')\ndef loud(rollout):\n    print('NOISE')\n    return 1.0\n")
    (tmp_path / "noisy.py").write_text(
        "from weaver_rl.tasks.task import Problem\n"
        "class Noisy:\n"
        "    num_problems = None\n"
        "    def problem(self, index):\n"
        "        print('NOISE')\n"
        "        return Problem(problem_id=f't{index}', prompt=f'{2 * index} =', answer='1')\n"
        "    def eval_problems(self, num):\n"
        "        return [Problem(problem_id=f'e{i}', prompt=f'{2 * i + 1} =', answer='1') for i in range(num)]\n"
        "    def scorer(self):\n"
        "        return None\n"
    )
    task, rewards = f"{tmp_path}/noisy.py:Noisy", f"{tmp_path}/loud.py:loud"
    status, printed = check(str(TINY), "--json", f"task={{name: '{task}'}}", f"rewards=[{{name: '{rewards}'}}]")
    content = json.loads(printed)
    assert status == int(any(line["level"] == "fail" for line in content["findings"]))
    assert {memory["role"] for memory in content["memory"]} == {"learner rank", "sampler", "reward worker"}
    assert any("1 for all 12 completions" in line["seen"] for line in content["findings"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nothing.yaml"], "cannot be read"), ([str(TINY), "num_stepz=1"], "did you mean 'num_steps'?")],
)
def test_a_configuration_that_does_not_load_is_a_line_and_status_2(check, arguments: list[str], words: str):
    status, printed = check(*arguments)
    assert status == 2
    assert "fail" in printed
    assert words in printed
    assert "1 failure, 0 warnings: configuration" in printed


def test_a_local_cluster_is_shown_its_token_and_not_asked_for_its_disk(
    check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "for another cluster")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")  # set back at the end, whatever the command makes of it
    files = cluster_files("default")
    started_at = psutil.Process().create_time()
    head = ClusterNode(name="default-0", pid=os.getpid(), started_at=started_at, num_cpus=2, log="/nowhere")
    seen: list[dict[str, str]] = []

    def ask(address: str, *, run_dir: str) -> ClusterFacts:
        seen.append({name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")})
        return cluster(node(), address=address)

    monkeypatch.setattr("actors.cluster_check.ask_cluster", ask)
    with files.locked():
        files.write(
            LocalCluster(
                name="default",
                session="/nowhere",
                address="127.0.0.1:41001",
                dashboard="http://127.0.0.1:41002",
                token_file=str(files.token),
                nodes=(head,),
                ready=True,
            )
        )
    for address in ("http://127.0.0.1:41002", "127.0.0.1:41001"):
        _, printed = check(str(TINY), "--json", "--address", address, "run_dir=/shared/x")
        found = {line["subject"]: line for line in json.loads(printed)["findings"]}
        assert ("the cluster's head" in found["run_dir"]["seen"]) == address.startswith("http"), found["run_dir"]
    assert seen == 2 * [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(files.token)}]


def test_its_help_needs_no_heavy_import():
    code = (
        "import sys, weaver_rl.cli, weaver_rl.check.run_checklist, weaver_rl.check.subject\n"
        "print(sorted({'ray', 'vllm', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
