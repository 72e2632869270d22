"""The body of `weaver-rl reward`: what it reads, prints and returns."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from weaver_rl.errors import RewardError
from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig
from weaver_rl.rewards.tryout import load_rollouts, try_reward
from weaver_rl.rollout_files import RecordedRollout, rollouts_file, write_rollouts
from weaver_rl.types import ScoredRollout

pytestmark = pytest.mark.unit

PLUGINS = Path(__file__).parent / "reward_plugins"
WORKERS = RewardWorkersConfig(num_workers=2, timeout_s=10)


def write_jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "rollouts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def try_on(spec: RewardSpec, path: Path) -> tuple[int, str]:
    printed = StringIO()
    console = Console(file=printed, width=160)
    status = try_reward(spec, load_rollouts(path), console, workers=WORKERS, base_dir=PLUGINS)
    return status, printed.getvalue()


def test_it_prints_distribution_timing_and_extremes(tmp_path: Path) -> None:
    rows = [{"prompt": f"[b]{n}", "completion": "x" * n} for n in range(1, 41)]
    status, printed = try_on(RewardSpec(name="friendly.py:brevity", args={"limit": 10}), write_jsonl(tmp_path, *rows))
    assert status == 0
    assert "40 rollouts, 40 scored" in printed
    assert "min -4  mean -2.05  median -2.05  max -0.1  std 1.154" in printed
    bars = [line for line in printed.splitlines() if " … " in line]
    assert sum(int(line.split()[3]) for line in bars) == 40
    assert "p95" in printed
    assert "missing  none" in printed
    highest, lowest = printed.split("highest")[1].split("lowest")
    assert [f"line-{n} " in highest for n in (1, 5, 6)] == [True, True, False]
    assert [f"line-{n} " in lowest for n in (40, 36, 35)] == [True, True, False]
    assert "[b]40" in lowest


def test_it_prints_failures_by_reason_and_says_so_in_its_status(tmp_path: Path) -> None:
    rows: list[object] = [
        {"prompt": "?", "completion": "x", "does": does} for does in ("exception", "exception", "nan")
    ]
    rows += ["", {"prompt": "?", "completion": "x"}]
    status, printed = try_on(RewardSpec(name="hostile.py:misbehave"), write_jsonl(tmp_path, *rows))
    assert status == 1
    assert "4 rollouts, 1 scored" in printed
    counts = [line.split("│")[1:3] for line in printed.splitlines() if "raised" in line or "NaN" in line]
    assert [[cell.strip() for cell in row] for row in counts] == [["2", "raised ValueError"], ["1", "returned NaN"]]
    assert "line-1: raised ValueError: bad thing (hostile.py:" in printed


def test_a_plugin_that_cannot_be_loaded_is_one_error(tmp_path: Path) -> None:
    rows = [{"prompt": "?", "completion": "x"}] * 40
    with pytest.raises(RewardError, match="did you mean 'brevity'"):
        try_on(RewardSpec(name="friendly.py:brevty"), write_jsonl(tmp_path, *rows))


def test_columns_and_answers_reach_the_rollout(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, {"prompt": "1+1", "completion": "2", "answer": 2, "level": [1]})
    (rollout,) = load_rollouts(path)
    assert (rollout.prompt.text, rollout.text, rollout.prompt.answer) == ("1+1", "2", "2")
    assert rollout.prompt.columns == {"level": [1]}


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("{", r"line 2: not JSON"),
        ("[1]", "line 2: expected an object with prompt and completion, seen a list"),
        ('{"prompt": "x"}', r"line 2: 'completion' must be a string, seen only the keys \['prompt'\]"),
        ('{"prompt": 3, "completion": "x"}', "line 2: 'prompt' must be a string, seen 3"),
        (
            '{"prompt": "", "completion": "x", "answer": [1]}',
            "line 2: 'answer' must be a string, a number or null, seen list",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, seen: str) -> None:
    with pytest.raises(RewardError, match=seen):
        load_rollouts(write_jsonl(tmp_path, {"prompt": "a", "completion": "b"}, line))


def test_a_run_folder_is_read_and_what_is_missing_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"})
    rollouts = load_rollouts(path)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    records = [
        RecordedRollout(scored=ScoredRollout(rollout=rollout, components=(), reward=1.0), step=1, sampler="s")
        for rollout in rollouts
    ]
    write_rollouts(run_dir, 1, records)
    assert [rollout.text for rollout in load_rollouts(run_dir)] == ["b", "d"]
    assert [rollout.text for rollout in load_rollouts(run_dir, limit=1)] == ["b"]
    with pytest.raises(RewardError, match=r"no run folder or JSONL file at .*nowhere"):
        load_rollouts(tmp_path / "nowhere")


def test_of_a_run_the_newest_training_rollouts_are_tried(tmp_path: Path) -> None:
    def write(step: int, **texts: Literal["train", "eval"]) -> None:
        path = write_jsonl(tmp_path, *({"prompt": "?", "completion": text} for text in texts))
        scored = [ScoredRollout(rollout=rollout, components=(), reward=1.0) for rollout in load_rollouts(path)]
        records = zip(scored, texts.values(), strict=True)
        write_rollouts(run_dir, step, (RecordedRollout(scored=s, step=step, sampler="s", phase=p) for s, p in records))

    def texts(limit: int | None = None) -> list[str]:
        return [rollout.text for rollout in load_rollouts(run_dir, limit)]

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with pytest.raises(RewardError, match=r"/run has no rollouts"):
        load_rollouts(run_dir)
    write(1, held_out="eval")
    assert texts() == ["held_out"]
    write(2, a="train", b="train")
    write(3, c="train", also_held_out="eval", d="train")
    write(4, held_out_last="eval")
    assert texts() == ["c", "d", "a", "b"]
    rollouts_file(run_dir, 2).write_bytes(b"damaged, and not needed")
    assert texts(limit=2) == ["c", "d"]
