"""metrics.jsonl and the TensorBoard events: each step once, nothing unknown, nothing that is no number."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from weaver_rl.errors import UserError, WeaverRLError
from weaver_rl.metrics import METRICS, STAGES, MetricsWriter, deterministic_part, find_metric, read_metrics
from weaver_rl.run_folder import RunFolder

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def folder(tmp_path: Path):
    return RunFolder(tmp_path)


def scalars(folder: RunFolder, tag: str):
    accumulator = EventAccumulator(str(folder.tensorboard))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_a_step_is_one_line_with_its_step_phase_and_time(folder):
    clock = Clock()
    with MetricsWriter(folder, clock) as writer:
        clock.now += 2.5
        writer.write(1, "warm_start", {"loss": 0.5, "eval/accuracy": 0.25})
        assert [json.loads(line) for line in folder.metrics_file.read_text().splitlines()] == [
            {"step": 1, "phase": "warm_start", "time_s": 2.5, "loss": 0.5, "eval/accuracy": 0.25}
        ]


def test_tensorboard_reads_the_same_scalars(folder):
    with MetricsWriter(folder) as writer:
        writer.write(1, "warm_start", {"loss": 0.5})
        writer.write(2, "train", {"loss": 0.25, "reward/mean": 1.0})
    assert scalars(folder, "loss") == [(1, 0.5), (2, 0.25)]
    assert scalars(folder, "reward/mean") == [(2, 1.0)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_a_value_that_is_not_finite_is_refused_by_name(folder, bad):
    with MetricsWriter(folder) as writer:
        with pytest.raises(WeaverRLError, match=r"metric grad_norm is -?(nan|inf) in step 4 \(train\)"):
            writer.write(4, "train", {"loss": 1.0, "grad_norm": bad})
        assert folder.metrics_file.read_text() == ""
        writer.write(4, "train", {"loss": 1.0})


def test_an_unknown_name_or_phase_is_refused(folder):
    with MetricsWriter(folder) as writer:
        with pytest.raises(WeaverRLError, match=r"metric 'los' is not known"):
            writer.write(1, "train", {"los": 1.0})
        with pytest.raises(WeaverRLError, match="allowed: warm_start, train"):
            writer.write(1, "test", {"loss": 1.0})


def test_a_step_comes_once(folder):
    with MetricsWriter(folder) as writer:
        writer.write(3, "train", {"loss": 1.0})
        for step in (3, 2):
            with pytest.raises(WeaverRLError, match=f"step {step} after those of step 3"):
                writer.write(step, "train", {"loss": 1.0})


def test_numpy_scalars_are_written_exactly(folder):
    with MetricsWriter(folder) as writer:
        writer.write(1, "train", {"loss": np.float64(0.1), "reward/mean": np.float32(0.1), "lag/max": np.int64(2)})
    (line,) = read_metrics(folder.metrics_file)
    assert line.values == {"loss": 0.1, "reward/mean": float(np.float32(0.1)), "lag/max": 2.0}


def test_resuming_gives_the_file_of_an_uninterrupted_run(folder, tmp_path):
    for step in range(1, 6):
        with MetricsWriter(folder, Clock()) as writer:
            writer.write(step, "train", {"loss": 1 / step})
    whole = folder.metrics_file.read_text()
    with MetricsWriter(folder, Clock()) as writer:
        writer.truncate_after(2)
        assert [line.step for line in read_metrics(folder.metrics_file)] == [1, 2]
        for step in range(3, 6):
            writer.write(step, "train", {"loss": 1 / step})
    assert folder.metrics_file.read_text() == whole


def test_tensorboard_forgets_what_came_after_the_resumed_step(folder):
    with MetricsWriter(folder) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": float(step)})
        writer.truncate_after(1)
        writer.write(2, "train", {"loss": 20.0})
    assert scalars(folder, "loss") == [(1, 1.0), (2, 20.0)]


def test_tensorboard_that_cannot_write_warns_once_and_goes_on(folder, caplog):
    with MetricsWriter(folder) as writer:
        (events,) = folder.tensorboard.iterdir()
        events.unlink()
        events.mkdir()
        for step in (1, 2):
            writer.write(step, "train", {"loss": float(step)})
        writer.truncate_after(1)
        events.rmdir()
        for step in (2, 3):
            writer.write(step, "train", {"loss": float(10 * step)})
    assert [record.message.partition(" in ")[0] for record in caplog.records] == ["TensorBoard's events"]
    assert [line.step for line in read_metrics(folder.metrics_file)] == [1, 2, 3]
    assert scalars(folder, "loss") == [(2, 20.0), (3, 30.0)]


def test_tensorboard_whose_folder_goes_away_ends_no_run(folder):
    with MetricsWriter(folder) as writer:
        shutil.rmtree(folder.tensorboard)
        folder.tensorboard.write_text("in the way")
        for step in (1, 2):
            writer.write(step, "train", {"loss": 1.0})
        folder.tensorboard.unlink()
        writer.write(3, "train", {"loss": 1.0})
    assert scalars(folder, "loss") == [(3, 1.0)]


FULL = """
import logging, resource, sys
from pathlib import Path
from weaver_rl.metrics_sinks import TensorBoardEvents
logging.basicConfig(format="%(message)s")
directory = Path(sys.argv[1])
events = TensorBoardEvents(directory)
events.write(1, {"loss": 1.0})
(path,) = directory.iterdir()
full = path.stat().st_size + 5, resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, full)
for step in range(2, 9):
    events.write(step, {"loss": float(step)})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
events.write(9, {"loss": 9.0})
"""


def test_on_a_full_disk_tensorboard_leaves_one_file_that_can_be_read_and_one_warning(folder):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(folder.tensorboard)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [line.partition(" in ")[0] for line in done.stderr.splitlines()] == ["TensorBoard's events"]
    assert len(list(folder.tensorboard.iterdir())) == 1
    assert scalars(folder, "loss") == [(1, 1.0), (9, 9.0)]


def test_a_file_that_cannot_be_closed_is_said(folder):
    writer = MetricsWriter(folder)
    writer.write(1, "train", {"loss": 1.0})
    writer._file.close()
    writer._file = FullDisk()
    with pytest.raises(OSError, match="No space left"):
        writer.write(2, "train", {"loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        writer.close()


class FullDisk:
    """A file on a disk that is full."""

    def write(self, text: str):
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        self.write("")


def test_time_counts_on_after_a_resume(folder):
    clock = Clock()
    with MetricsWriter(folder, clock) as writer:
        clock.now += 7
        writer.write(1, "train", {"loss": 1.0})
    clock.now = 5.0
    with MetricsWriter(folder, clock) as writer:
        clock.now += 3
        writer.write(2, "train", {"loss": 1.0})
    assert [line.time_s for line in read_metrics(folder.metrics_file)] == [7.0, 10.0]


def test_a_line_cut_by_a_kill_is_dropped_and_its_step_written_again(folder):
    with MetricsWriter(folder) as writer:
        writer.write(1, "train", {"loss": 1.0})
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 2, "pha')
    assert [line.step for line in read_metrics(folder.metrics_file)] == [1]
    with MetricsWriter(folder) as writer:
        writer.write(2, "train", {"loss": 2.0})
    assert [line.step for line in read_metrics(folder.metrics_file)] == [1, 2]


@pytest.mark.parametrize("line", [b'{"step": 1}\n', b"[1, 2]\n", b"3\n", b"garbage \xff\n"])
def test_a_damaged_line_in_the_middle_is_named(folder, line: bytes):
    folder.metrics_file.write_bytes(line)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1"):
        list(read_metrics(folder.metrics_file))


def test_the_deterministic_part_leaves_out_what_the_clock_decides():
    timed = {f"seconds/{stage}": 1.0 for stage in (*STAGES, "step", "other")}
    values = {"loss": 1.0, "tokens_per_s": 9.0, "reward/f.py:g/seconds": 0.1, "reward/f.py:g/mean": 0.5, **timed}
    assert deterministic_part(values) == {"loss": 1.0, "reward/f.py:g/mean": 0.5}


def test_the_table_has_each_name_once_and_every_unit_of_time_is_timed():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert all(metric.timed for metric in METRICS if metric.unit in ("s", "tokens/s"))


@pytest.mark.parametrize("label", ["task", "dir/my_rewards.py:brevity", "a b"])
def test_a_reward_label_may_be_any_text(label):
    assert find_metric(f"reward/{label}/mean").name == "reward/<label>/mean"
    assert find_metric("reward//mean") is None


def test_a_lag_is_a_number():
    assert find_metric("lag/0/fraction").name == find_metric("lag/12/fraction").name == "lag/<lag>/fraction"
    assert find_metric("lag/x/fraction") is None
    assert find_metric("lag//fraction") is None


def test_importing_metrics_pulls_in_neither_torch_nor_ray():
    code = "import sys, weaver_rl.metrics; sys.exit(bool({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
