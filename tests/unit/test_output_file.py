"""What a command writes where the user said: a file, and never in the place of something else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weaver_rl.errors import ConfigError
from weaver_rl.output_file import output_file
from weaver_rl.report import write_page
from weaver_rl.step_range import StepRange

pytestmark = pytest.mark.unit


def test_a_file_that_is_there_or_not_will_do(tmp_path: Path):
    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        assert output_file(tmp_path / name) == tmp_path / name


def test_a_link_goes_on_leading_there(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("")
    assert output_file(tmp_path / "link") == tmp_path / "file"


@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
def test_nothing_else_is_replaced(tmp_path: Path, kind: str):
    path = tmp_path / "out"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(ConfigError, match="out is no file that can be replaced"):
        output_file(path)


def test_a_report_asks(tmp_path: Path):
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "phase": "train", "time_s": 1.0, "loss": 0.5}\n')
    os.mkfifo(out)
    with pytest.raises(ConfigError, match="no file that can be replaced"):
        write_page([run], out)
    out.unlink()
    out.write_text("a page about all steps")
    with pytest.raises(ConfigError, match="--steps names no step that was finished"):
        write_page([run], out, steps=StepRange.parse("7:9"))
    assert out.read_text() == "a page about all steps"
