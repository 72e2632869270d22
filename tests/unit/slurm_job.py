"""A Slurm job without Slurm: deploy/slurm/weaver-rl.sbatch, and stubs of what it calls, which write it down."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "slurm" / "weaver-rl.sbatch"
PATIENCE_S = 30.0

STUBS = {
    "hostname": 'case "$*" in *ip*) echo "127.0.0.1 ::1" ;; *) echo n1 ;; esac',
    "scontrol": """
echo "scontrol $*" >>"$CALLS"
case "$1" in
  show) echo "$STUB_NODES" | tr ' ' '\\n' ;;
  requeue) exit "${STUB_REQUEUE:-0}" ;;
esac""",
    # Runs the command of the step here, on behalf of the node that it is meant for.
    "srun": """
echo "srun $*" >>"$CALLS"
for option in "$@"; do
  case "$option" in
    --nodelist=*) export SLURMD_NODENAME="${option#--nodelist=}"; shift ;;
    -*) shift ;;
    *) break ;;
  esac
done
exec "$@" """,
    # A node of Ray: there while it runs.
    "ray": """
node=$SLURMD_NODENAME
echo "ray on $node: $*" >>"$CALLS"
echo "$RAY_AUTH_MODE:$RAY_AUTH_TOKEN" >>"$NODES/../tokens"
mkdir -p "$DISKS/$node-$SLURM_JOB_ID/session_latest/logs"
echo "raylet of $node" >"$DISKS/$node-$SLURM_JOB_ID/session_latest/logs/raylet.out"
[ "$node" != "${STUB_BROKEN:-}" ] || { echo "cannot start"; exit 1; }
[ "$node" != "${STUB_LATE:-}" ] || late=yes
trap 'rm -f "$NODES/$node"; echo "ray ended on $node" >>"$CALLS"; exit 0' TERM
[ -n "${late:-}" ] || echo $$ >"$NODES/$node"
while :; do sleep 0.1 & wait "$!"; done""",
    "weaver-rl": """
echo "weaver-rl $*" >>"$CALLS"
case "$1" in
  show)
    [ -z "${STUB_SHOW:-}" ] || echo "error: rewards: missing, must be given" >&2
    exit "${STUB_SHOW:-0}" ;;
esac
echo "$RAY_AUTH_MODE:$RAY_AUTH_TOKEN" >>"$NODES/../tokens"
case "${STUB_TRAIN:-ends}" in
  ends) exit 0 ;;
  fails) exit 1 ;;
  waits) trap 'echo "train stopped" >>"$CALLS"; exit 130' TERM ;;
  ignores) trap '' TERM ;;
esac
echo $$ >"$NODES/../train"
echo "train runs" >>"$CALLS"
[ "$STUB_TRAIN" != ignores ] || exec sleep 300
while :; do sleep 0.1 & wait "$!"; done""",
    # Each node has a /tmp of its own.
    "rm": 'exec /bin/rm "${@//\\/tmp\\/slurm-weaver-rl/$DISKS/$SLURMD_NODENAME}"',
    "cp": 'exec /bin/cp "${@//\\/tmp\\/slurm-weaver-rl/$DISKS/$SLURMD_NODENAME}"',
    "apptainer": """
echo "apptainer $*" >>"$CALLS"
while [ "${1##*.}" != sif ]; do shift; done
shift
exec "$@" """,
}
"""What each command does in place of the real one."""
OF_A_STUB_OF_RAY = ("ray", "rm", "cp")

FAKE_RAY = '''
"""Ray as the waiting part of the script asks it."""
import os
from pathlib import Path


def is_initialized():
    return False


def init(address, **options):
    if not list(Path(os.environ["NODES"]).iterdir()):
        raise ConnectionError("nobody answers at " + address)


def nodes():
    names = [path.name for path in Path(os.environ["NODES"]).iterdir()]
    return [{"NodeManagerHostname": name, "Alive": True} for name in names]
'''


class SlurmJob:
    """One start of the script, in a directory of its own.

    Example:
        job = SlurmJob(tmp_path, nodes=3)
        assert job.ended() == 0
    """

    def __init__(
        self, folder: Path, *arguments: str, nodes: int = 1, real_ray: bool = False, number: int = 4711, **env: str
    ) -> None:
        self.folder = folder
        self.calls_file, self.nodes, self.output = folder / "calls", folder / "nodes", folder / "output"
        self.nodes.mkdir(exist_ok=True)
        self.disks = folder / "disks"
        self.disks.mkdir(exist_ok=True)
        self.calls_file.touch()
        (folder / "fake").mkdir(exist_ok=True)
        bin_dir = folder / "bin"
        bin_dir.mkdir(exist_ok=True)
        for name, text in STUBS.items():
            if real_ray and name in OF_A_STUB_OF_RAY:
                continue
            (bin_dir / name).write_text(f"#!/bin/bash\n{text}\n")
            (bin_dir / name).chmod(0o755)
        if not real_ray:
            (folder / "fake" / "ray.py").write_text(FAKE_RAY)
        python = bin_dir / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        names = [f"n{index + 1}" for index in range(nodes)]
        bash = shutil.which("bash")
        assert bash
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [bash, str(SCRIPT), *(arguments or ("run.yaml",))],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    "PATH": f"{bin_dir}:{Path(sys.executable).parent if real_ray else bin_dir}:/usr/bin:/bin",
                    "HOME": os.environ.get("HOME", "/"),
                    "PYTHONPATH": f"{folder / 'fake'}:{ROOT}",
                    "CALLS": str(self.calls_file),
                    "NODES": str(self.nodes),
                    "DISKS": str(self.disks),
                    "STUB_NODES": " ".join(names),
                    "SLURM_JOB_ID": str(number),
                    "SLURM_JOB_NODELIST": f"n[1-{nodes}]",
                    "SLURMD_NODENAME": "n1",
                    "SLURM_CPUS_ON_NODE": "2",
                    **env,
                },
            )

    def in_temp(self) -> list[str]:
        """Nodes on which Ray's session directory lies."""
        return sorted(path.name.partition("-")[0] for path in self.disks.iterdir())

    def ray_logs(self) -> dict[str, str]:
        """What is kept of Ray's logs where all nodes see it, by node."""
        return {path.parent.name: path.read_text() for path in self.folder.glob("ray-*-logs/*/raylet.out")}

    def calls(self) -> list[str]:
        """What the stubs were called with, in order."""
        return self.calls_file.read_text().splitlines()

    def said(self) -> str:
        """What the script printed."""
        return self.output.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        """Returns when it holds; fails when the job ends before, or after half a minute."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, self.said()
            assert self.process.poll() is None or condition(), self.said()
            time.sleep(0.01)

    def until_called(self, call: str) -> None:
        """Returns when a stub has written that."""
        self.until(lambda: any(call in line for line in self.calls()))

    def signal(self, number: signal.Signals) -> None:
        """What Slurm sends to the batch script alone."""
        self.process.send_signal(number)

    def ended(self) -> int:
        """The exit status; nothing of the job is left by then."""
        status = self.process.wait(timeout=PATIENCE_S)
        end = time.monotonic() + 5
        while left := self.left():
            assert time.monotonic() < end, left
            time.sleep(0.05)
        return status

    def left(self) -> list[str]:
        """Processes of the job's session."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--sid", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        return [line for line in listed.stdout.splitlines() if "defunct" not in line]

    def close(self) -> None:
        """Ends what a failed test leaves."""
        if self.left() or self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=PATIENCE_S)
