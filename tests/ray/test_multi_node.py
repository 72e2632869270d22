"""Head and two workers without a common file system: a run spreads over them, and a node is switched off meanwhile.

Nobody but the head sees the run folder, the configuration and the users' files: models, code and checkpoints must
travel. Where mount namespaces are not permitted the nodes see everything, and the tests' names say so.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from conftest import COMMAND, TINY
from fault_parts import GoingRun
from ray_nodes import free_port
from separate_nodes import Node, SeparateNodes, can_separate, environment

from weaver_rl.live_state import LiveState, read_live_state
from weaver_rl.rollout_files import read_rollouts
from weaver_rl.run_folder import RunFolder

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.parametrize("nodes", ["separate file systems" if can_separate() else "ONE FILE SYSTEM"], indirect=True),
]

T = TypeVar("T")
DEADLINE_S = 150.0

TASK = """
from weaver_rl.tasks.task import Problem


class Sums:
    num_problems = None

    def problem(self, index):
        a, b = index % 7, index % 9
        return Problem(problem_id=f"p-{index}", prompt=f"{a} + {b} =", answer=str(a + b))

    def eval_problems(self, num):
        return [Problem(problem_id=f"e-{i}", prompt=f"{i} + 10 =", answer=str(i + 10)) for i in range(num)]

    def scorer(self):
        return lambda rollout: float(rollout.text.strip() == rollout.prompt.answer)
"""
JUDGE = """
def is_right(rollout):
    return float(rollout.text.strip() == rollout.prompt.answer)
"""
REWARDS = """
import time

from judge import is_right


def brevity(rollout):
    time.sleep(0.02)
    return -len(rollout.text) - 0.01 * rollout.sample_index + is_right(rollout)
"""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[SeparateNodes]:
    """The cluster; only the head sees anything of `tmp_path`."""
    cluster = SeparateNodes(free_port(), dashboard_port=free_port())
    for name in ("run", "work"):
        (tmp_path / name).mkdir()
    try:
        cluster.add("head", num_cpus=1, sees=[tmp_path / "run", tmp_path / "work"])
        cluster.add("learner's", num_cpus=2)
        cluster.add("sampler's", num_cpus=1)
        yield cluster
    finally:
        cluster.close()


def write_run(directory: Path, **changes: Any) -> Path:
    """A configuration with task and rewards in files of their own, beside it."""
    for name, text in (("my_task.py", TASK), ("judge.py", JUDGE), ("my_rewards.py", REWARDS)):
        (directory / name).write_text(text)
    config = yaml.safe_load(TINY.read_text())
    config |= {
        "task": {"name": "my_task.py:Sums"},
        "rewards": [{"name": "task"}, {"name": "my_rewards.py:brevity", "weight": 0.1}],
        "warm_start": {"num_steps": 1, "prompts_per_step": 16, "learning_rate": 3.0e-3},
        "eval": {"every": 0, "num_prompts": 2},
        "checkpoint": {"every": 2, "keep": 3},
        "learner": config["learner"] | {"num_cpus": 2},
        "reward_workers": {"num_workers": 4, "unresponsive_after_s": 20.0},
        "cluster": {"start_timeout_s": 20.0},
    } | changes
    config["model"] |= {"max_position_embeddings": 512}
    config["rollout"] |= {"max_lag": 1, "sampling": {"temperature": 1.0, "max_tokens": 200}}
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextlib.contextmanager
def going(command: list[str], run_dir: Path) -> Iterator[GoingRun]:
    """A run that a command carries out or follows."""
    log = run_dir.with_suffix(f".{time.monotonic_ns()}.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            env=environment(),
            start_new_session=True,
        )
    try:
        yield GoingRun(RunFolder(run_dir), None, process, log)  # type: ignore[arg-type]  # it has no gate
    finally:
        process.kill()
        process.wait()


def submitting(nodes: SeparateNodes, config: Path, *more: str) -> list[str]:
    """`weaver-rl submit`, on a machine that is none of the nodes."""
    return [*COMMAND, "submit", str(config), *more, "--address", f"http://127.0.0.1:{nodes.dashboard_port}"]


def training(nodes: SeparateNodes, config: Path, *more: str) -> list[str]:
    """`weaver-rl train` on the head."""
    return nodes.nodes[0].command(*COMMAND, "train", str(config), *more, "--address", nodes.address)


def seen_until(found: Callable[[], T], it: GoingRun) -> T:
    return it.until("what the test waits for", found, DEADLINE_S)


def ended(it: GoingRun) -> int:
    try:
        return it.process.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end within {DEADLINE_S:g} s\n{it.live()}\n{it.output[-6000:]}") from None


def written_after(it: GoingRun, time_s: float) -> LiveState | None:
    """What the run last said of itself, if that was a second later or more."""
    live = read_live_state(it.folder.live_file)
    return live if live is not None and live.time_s > time_s + 1 else None


def stop_at_work(it: GoingRun, node: Node) -> None:
    """Stops (SIGSTOP) the sampler of a node while it has groups, which it will not finish then."""
    [sampler] = node.processes("Sampler")
    for _ in range(5):
        before = it.now()
        seen_until(lambda before=before: it.events("dispatched", before), it)
        sampler.suspend()
        stopped_at = time.time()
        live = seen_until(lambda at=stopped_at: written_after(it, at), it)
        if any(s["pid"] == sampler.pid and "owes 0" not in s["doing"] for s in live.facts["samplers"]):
            return
        sampler.resume()
    raise AssertionError(f"the sampler had no work whenever it was stopped\n{it.output[-3000:]}")


def by_actor(cluster: SeparateNodes) -> dict[str, set[str]]:
    return {node.name: node.actors() for node in cluster.nodes if node.process.poll() is None}


@pytest.mark.usefixtures("nothing_left_behind")
def test_a_run_spread_over_nodes_outlives_a_samplers_node_and_ends_with_the_learners(
    nodes: SeparateNodes, tmp_path: Path
) -> None:
    head, learners, samplers = nodes.nodes
    config = write_run(tmp_path / "work", num_steps=7, sampler={"num_replicas": 2, **_engine()})
    run_dir = tmp_path / "run"
    if can_separate():
        assert head.sees(run_dir)
        assert not learners.sees(tmp_path)
        assert not samplers.sees(tmp_path)
    with going(submitting(nodes, config, f"run_dir={run_dir}"), run_dir) as it:
        seen_until(lambda: it.step() >= 2, it)
        placed = by_actor(nodes)
        assert "LearnerRank" in placed["learner's"]
        assert "Sampler" in placed["sampler's"]
        assert "Sampler" in placed["head"]
        if can_separate():
            assert len(learners.files("models/*")) == 1
            assert len(samplers.files("models/*")) == 1
            assert not head.files("models/* code/*")
        step = it.step()
        stop_at_work(it, samplers)
        samplers.kill()
        assert ended(it) == 0, it.output[-6000:]
    lost = [event.detail["subject"] for event in it.events("noted") if event.detail["what"] == "lost"]
    assert [subject for subject in lost if subject.startswith("sampler")], it.output
    assert it.events("reissued")
    assert step < it.step() == 8
    assert it.audit().ok, it.audit().violations
    assert (run_dir / "policy" / "config.json").is_file()
    assert not learners.files("on_their_way/*")
    scored = [component for record in read_rollouts(run_dir) for component in record.scored.components]
    assert all(component.value is not None for component in scored)

    # It goes on from a checkpoint that the learner's node never kept; then that node goes, and there is no other.
    more = ("--resume", "num_steps=60", "sampler.num_replicas=1", "cluster.start_timeout_s=10")
    with going(training(nodes, config, f"run_dir={run_dir}", *more), run_dir) as again:
        seen_until(lambda: again.step() >= 9, again)
        if can_separate() and "RewardActor" in learners.actors():
            assert len(learners.files("code/*")) == 1
        learners.kill()
        status = ended(again)
    assert status == 2, again.output[-6000:]
    assert "a node with actors of this run is gone" in again.output
    assert "Traceback" not in again.output
    assert again.audit().ok, again.audit().violations
    end = time.monotonic() + 15
    while head.actors() and time.monotonic() < end:
        time.sleep(0.1)
    assert not head.actors()


def _engine() -> dict[str, Any]:
    return {"engine_args": {"max_num_seqs": 32, "kv_cache_memory_bytes": 33554432}}
