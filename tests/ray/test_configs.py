"""The CPU configurations that ship, really run: the quickstart to its end, SmolLM2 for two steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import REPOSITORY, run

from weaver_rl.metrics import read_metrics
from weaver_rl.rollout_files import read_rollouts
from weaver_rl.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def _eval_prompts(folder: RunFolder, step: int) -> set[str]:
    records = read_rollouts(folder.path, steps=[step])
    return {record.scored.rollout.prompt.text for record in records if record.phase == "eval"}


@pytest.mark.usefixtures("nothing_left_behind")
def test_the_quickstart_learns(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    ended = run("train", str(REPOSITORY / "configs" / "quickstart.yaml"), f"run_dir={folder.path}", timeout_s=800)
    assert ended.status == 0, ended.output
    assert "held-out accuracy" in ended.output
    lines = list(read_metrics(folder.metrics_file))
    last_warm = next(line for line in reversed(lines) if line.phase == "warm_start")
    assert last_warm.values["eval/num_prompts"] >= 200
    assert last_warm.values["eval/accuracy"] <= 0.6
    assert lines[-1].values["eval/accuracy"] >= 0.9
    held_out = _eval_prompts(folder, lines[-1].step)
    assert len(held_out) >= 200
    trained = {r.scored.rollout.prompt.text for r in read_rollouts(folder.path) if r.phase == "train"}
    assert len(trained) > 200
    assert not held_out & trained


@pytest.mark.usefixtures("nothing_left_behind")
def test_smollm2_runs_two_steps(tmp_path: Path, smollm2: tuple[Path, Path]) -> None:
    folder = RunFolder(tmp_path / "run")
    config = str(REPOSITORY / "configs" / "smollm2_cpu.yaml")
    ended = run(
        "train",
        config,
        f"run_dir={folder.path}",
        "num_steps=2",
        "rollout.prompts_per_step=2",
        "rollout.samples_per_prompt=2",
        "eval.num_prompts=2",
        timeout_s=800,
        env={"XDG_CACHE_HOME": str(smollm2[0])},
    )
    assert ended.status == 0, ended.output
    before, *lines = read_metrics(folder.metrics_file)
    assert (before.step, before.values["eval/num_prompts"]) == (0, 2)
    assert [line.step for line in lines] == [1, 2]
    assert all(line.values["logprob_gap/max"] < 1e-2 for line in lines)
    assert all(line.values["sync/probe_max_abs"] < 1e-3 for line in lines)
    texts = [record.scored.rollout.text for record in read_rollouts(folder.path)]
    assert any(character.isdigit() for text in texts for character in text)
