"""What `make install` asks of Python and pip, with stubs that only write it down. It installs nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/bin/sh
# A Python of version $STUB_VERSION, or of the one in the file beside it.
here=$(dirname "$0")
version=$(cat "$here/version" 2>/dev/null || echo "$STUB_VERSION")
echo "$*" >>"$STUB_LOG"
case "$*" in
  -V) echo "Python $version" ;;
  -c*) test "$version" = 3.11 ;;
  "-m venv .venv"|"-m venv --without-pip .venv")
    mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo "$version" >.venv/bin/version
    case "$*" in
      *--without-pip*) ;;
      *) if test -n "$STUB_NO_VENV"; then echo "apt install python3-venv"; exit 1; fi; touch .venv/bin/has-pip ;;
    esac ;;
  "-m pip --python .venv/bin/python install"*) touch .venv/bin/has-pip ;;
  "-m pip --version") test -e "$here/has-pip" ;;
  *"torch=="*"--extra-index-url"*) test -z "$STUB_NO_TORCH" || { echo "second reason"; exit 1; } ;;
  *"torch=="*) test -z "$STUB_NO_LOCAL_TORCH" || { echo "first reason" >&2; exit 1; } ;;
esac
"""


class Install:
    """A copy of the Makefile and what it reads, with the stub as Python."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "copy", folder / "log"
        self.folder.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder)
        shutil.copytree(ROOT / "requirements", self.folder / "requirements")
        self.python = folder / "stub-python"
        self.python.write_text(STUB)
        self.python.chmod(0o755)

    def make(self, *arguments: str, version: str = "3.11", device: str | None = "cpu", **stub: str) -> tuple[int, str]:
        """Status and output; `asked` has what Python was asked meanwhile."""
        self.log.write_text("")
        env = {
            "PATH": f"{self.python.parent}:{os.environ['PATH']}",
            "STUB_LOG": str(self.log),
            "STUB_VERSION": version,
            **stub,
        }
        command = [
            "make",
            *(arguments or ("install",)),
            f"PYTHON={self.python}",
            *([f"DEVICE={device}"] if device else []),
        ]
        done = subprocess.run(
            command, cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        self.asked = self.log.read_text().splitlines()
        return done.returncode, done.stdout

    def pip_installs(self) -> list[str]:
        return [line.partition(" install ")[2] for line in self.asked if " install " in line]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    return Install(tmp_path)


def test_the_first_call_installs_and_the_second_does_nothing(install: Install):
    status, output = install.make()
    assert status == 0, output
    assert install.pip_installs() == [
        "--quiet --constraint requirements/cpu.txt torch==2.13.0+cpu",
        "--quiet --requirement requirements/cpu.txt",
        "--quiet --no-deps --requirement requirements/cpu-nodeps.txt",
        "--quiet --no-deps --editable .",
    ]
    for arguments in (("-n", "install"), ("install",)):
        status, output = install.make(*arguments)
        assert (status, install.asked) == (0, [])
        assert "pip" not in output


@pytest.mark.parametrize(("status", "device"), [(0, "gpu"), (1, "cpu")])
def test_nvidia_smi_is_asked_once_and_decides(install: Install, status: int, device: str):
    nvidia_smi = install.python.with_name("nvidia-smi")
    nvidia_smi.write_text(f'#!/bin/sh\necho nvidia-smi >>"$STUB_LOG"\nexit {status}\n')
    nvidia_smi.chmod(0o755)
    assert install.make(device=None)[0] == 0
    assert install.asked.count("nvidia-smi") == 1
    assert (install.folder / ".venv" / f".installed-{device}").exists()


def test_another_python_is_refused_before_anything_is_made(install: Install):
    status, output = install.make(version="3.12")
    assert status != 0
    assert "Python 3.11 is needed (make PYTHON=/path/to/python3.11), found Python 3.12" in output
    assert not (install.folder / ".venv").exists()


def test_a_venv_of_another_python_is_made_anew_by_a_good_one_only(install: Install):
    install.make()
    venv = install.folder / ".venv"
    (venv / "bin" / "version").write_text("3.12")
    (venv / "old").touch()
    os.utime(install.folder / "pyproject.toml", (2**32, 2**32))
    assert install.make(version="3.13")[0] != 0
    assert (venv / "old").exists()
    assert install.make()[0] == 0
    assert (venv / "bin" / "version").read_text() == "3.11\n"
    assert not (venv / "old").exists()
    assert "-m venv .venv" in install.asked


def test_a_good_venv_stays_when_pins_change_whatever_python_is_called(install: Install):
    install.make()
    os.utime(install.folder / "requirements" / "cpu.txt", (2**32, 2**32))
    assert install.make(version="3.12")[0] == 0
    assert not any("-m venv" in line for line in install.asked)
    assert len(install.pip_installs()) == 4


def test_without_python3_venv_pip_comes_from_outside_and_no_hint_is_shown(install: Install):
    status, output = install.make(STUB_NO_VENV="1")
    assert status == 0, output
    assert "apt install" not in output
    assert "-m pip --python .venv/bin/python install --quiet pip" in install.asked


def test_torch_comes_from_pytorch_when_pip_does_not_know_it(install: Install):
    status, output = install.make(STUB_NO_LOCAL_TORCH="1")
    assert status == 0, output
    assert "first reason" not in output
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in install.pip_installs()[1]


def test_when_torch_comes_from_nowhere_both_reasons_are_told(install: Install):
    status, output = install.make(STUB_NO_LOCAL_TORCH="1", STUB_NO_TORCH="1")
    assert status != 0
    assert "first reason" in output
    assert "second reason" in output
    assert not list((install.folder / ".venv").glob(".installed-*"))


def test_a_gpu_machine_gets_the_same_pins_but_for_what_cuda_wants_otherwise(install: Install):
    status, output = install.make(device="gpu")
    assert status == 0, output
    assert install.pip_installs()[0] == "--quiet --constraint .venv/constraints.txt --editable .[gpu,dev,gguf]"
    pins = set((install.folder / "requirements" / "cpu.txt").read_text().splitlines())
    constraints = set((install.folder / ".venv" / "constraints.txt").read_text().splitlines())
    assert {pin.partition("==")[0] for pin in pins - constraints} == {"apache-tvm-ffi", "numpy"}
    assert constraints < pins
