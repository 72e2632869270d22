"""The command line: exit status and messages, as a user gets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from weaver_rl import __version__, cli
from weaver_rl.config import load_config
from weaver_rl.errors import EngineError, TaskError

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of `weaver-rl ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["weaver-rl", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_show_prints_yaml_that_reloads_to_the_same_run(monkeypatch, capsys, tmp_path: Path):
    assert run(monkeypatch, "show", QUICKSTART, "num_steps=3", "learner.learning_rate=1e-4") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    again = tmp_path / "again.yaml"
    again.write_text(printed.out)
    assert load_config(again) == load_config(Path(QUICKSTART), ["num_steps=3", "learner.learning_rate=1e-4"])
    assert yaml.safe_load(printed.out)["rollout"]["sampling"]["top_p"] == 1.0


def test_show_needs_no_heavy_import():
    code = (
        "import sys, weaver_rl.cli as cli\n"
        f"sys.argv = ['weaver-rl', 'show', {QUICKSTART!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as end: print(end.code or 0, file=sys.stderr)\n"
        "print(sorted({'ray', 'vllm', 'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.split() == ["0", "[]"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "nothing.yaml"], "nothing.yaml: cannot be read"),
        (["show", QUICKSTART, "num_stepz=3"], "num_stepz: unknown key; did you mean 'num_steps'?"),
        (["show", QUICKSTART, "num_steps"], "the form is key.path=value"),
        (["train", QUICKSTART, "num_steps=[1]"], "num_steps: seen [1]"),
        (["train", "nothing.yaml"], "cannot be read"),
    ],
)
def test_bad_input_is_one_message_and_status_2(monkeypatch, capsys, arguments: list[str], words: str):
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("arguments", [["shov"], ["show"], ["train", QUICKSTART, "--fast"], []])
def test_a_command_that_is_not_there_is_status_2(monkeypatch, capsys, arguments: list[str]):
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    assert "Usage" in printed.err + printed.out


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"weaver-rl {__version__}\n"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (TaskError("row 3 [bold]has[/bold] no prompt"), 2, "error: row 3 [bold]has[/bold] no prompt\n"),
        (EngineError("sampler-0 stopped"), 1, "error: EngineError: sampler-0 stopped\n"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was left running\n"),
    ],
)
def test_errors_become_a_status_and_a_message(capsys, error: BaseException, status: int, message: str):
    def fail() -> None:
        raise error

    assert cli.guarded(fail) == status
    assert capsys.readouterr().err == message


def test_a_defect_keeps_its_traceback():
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.guarded(fail)


def test_an_interrupt_inside_a_command_says_so(monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def leave_at_once(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("weaver_rl.config.load_config", interrupt)
    monkeypatch.setattr("os._exit", leave_at_once)
    assert run(monkeypatch, "show", QUICKSTART) == 130
    assert capsys.readouterr().err.strip() == "interrupted; nothing was left running"


def test_the_installed_command_runs():
    command = Path(sys.executable).with_name("weaver-rl")
    done = subprocess.run([str(command), "show", "no.yaml"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: no.yaml: cannot be read (No such file or directory)\n"
