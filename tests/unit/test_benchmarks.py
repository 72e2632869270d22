"""The benchmarks' own parts: turns, ratios, table, JSON, command line, child processes. Nothing real is measured."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.alternation import Effort, Ratio, alternate, ratio
from benchmarks.chaos import Ended, require_survived, rows_of
from benchmarks.child import Child
from benchmarks.command import BENCHMARKS, RESULTS, json_path, main
from benchmarks.command_run import require_finished, train_steps
from benchmarks.fleet_run import Mark, Point
from benchmarks.fleet_scale import Cost, cost_of, growth_row
from benchmarks.kill_plan import TITLES, kill_plan
from benchmarks.machine import machine_facts
from benchmarks.overlap import Stages, stages_of, step_seconds
from benchmarks.results import Aim, Results, Row, number
from benchmarks.scale import Scale
from benchmarks.service_load import Level, Load, Served, closed_loop
from benchmarks.service_memory import memory_rows
from benchmarks.service_process import serving
from benchmarks.service_samples import ALONE, WITH_LORA, level_rows
from benchmarks.service_training import Sequences, check_same_loss, sdk_data
from benchmarks.sleeping_sampler import Pace, SleepingSampler, fake_probe, stamps
from benchmarks.step_share import outside_share
from weaver_rl.audit_report import AuditReport
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import GroupSample, PublishedWeights, SampleRequest

pytestmark = pytest.mark.unit

AT_LEAST = Aim(kind="at least", value=0.95)


def row(values: list[float], aim: Aim | None = AT_LEAST) -> Row:
    return Row(
        benchmark="sampler",
        case="tiny",
        quantity="tokens/s",
        ours=1234.5,
        baseline=1300.0,
        baseline_name="plain",
        ratio=Ratio.of(values),
        aim=aim,
    )


def test_every_other_round_goes_in_the_opposite_order_and_warmups_do_not_count() -> None:
    order: list[str] = []

    def contender(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    values = alternate({"a": contender("a"), "b": contender("b")}, Effort(rounds=3, max_seconds=60, warmups=1))
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert values == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_a_slow_machine_still_gets_three_rounds_and_no_more() -> None:
    clock = iter(range(0, 1000, 100))
    values = alternate({"a": lambda: 1.0}, Effort(rounds=50, max_seconds=10, warmups=0), now=lambda: next(clock))
    assert len(values["a"]) == 3


def test_the_ratio_is_the_median_of_rounds_with_quartiles() -> None:
    found = ratio([1.0, 2.0, 9.0, 4.0, 5.0], [1.0, 1.0, 1.0, 1.0, 1.0])
    assert (found.median, found.low, found.high, found.rounds) == (4.0, 2.0, 5.0, 5)
    assert Ratio.of([2.0]).low == Ratio.of([2.0]).high == 2.0


def test_an_aim_is_met_on_its_side_of_the_bound() -> None:
    assert row([0.95]).met is True
    assert row([0.94]).met is False
    assert row([0.94], aim=None).met is None
    assert Aim(kind="at most", value=0.05).met_by(0.05)
    assert not Aim(kind="at most", value=0.05).met_by(0.051)


def test_numbers_read_well() -> None:
    assert [number(value) for value in (0, 0.01234, 1.234, 12.34, 123.4, 12345.6)] == [
        "0",
        "0.0123",
        "1.23",
        "12.3",
        "123",
        "12,346",
    ]


def test_json_has_every_round_and_the_verdict_and_nothing_that_names_the_machine(tmp_path: Path) -> None:
    results = Results(machine=machine_facts(2), command="python -m benchmarks", rows=[row([0.9, 1.0])])
    results.write(tmp_path / "new" / "latest.json")
    content = json.loads((tmp_path / "new" / "latest.json").read_text())
    assert content["rows"][0]["ratio"]["values"] == [0.9, 1.0]
    assert content["rows"][0]["met"] is True
    assert {"cpu", "cores", "date", "versions", "threads"} <= content["machine"].keys()
    assert os.uname().nodename not in json.dumps(content["machine"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["latest.json"]


def test_the_table_shows_figures_spread_and_verdict() -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(Results(machine={}, command="", rows=[row([0.5, 0.5]), row([1.0, 1.0])]).table())
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "1,234" in text
    assert "≥ 0.95 missed" in text
    assert "≥ 0.95 met" in text


def test_the_command_runs_what_is_named_and_one_failure_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, Scale]] = []

    def broken(scale: Scale, folder: Path) -> list[Row]:
        seen.append(("broken", scale))
        raise RuntimeError("no engine today")

    def works(scale: Scale, folder: Path) -> list[Row]:
        assert folder.is_dir()
        seen.append(("works", scale))
        return [row([1.0])]

    def unasked(scale: Scale, folder: Path) -> list[Row]:
        raise AssertionError("not named")

    path = tmp_path / "out.json"
    arguments = ["broken", "works", "--quick", "--threads", "3", "--json", str(path)]
    assert main(arguments, {"broken": broken, "works": works, "unasked": unasked}) == 1
    assert [name for name, _ in seen] == ["broken", "works"]
    assert seen[0][1] == Scale(quick=True, full=False, num_threads=3)
    content = json.loads(path.read_text())
    assert content["failures"] == {"broken": "RuntimeError: no engine today"}
    assert len(content["rows"]) == 1
    assert "not measured: broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["samplr"], "'samplr' is no benchmark; allowed: sampler"), (["--threads", "0"], "seen '0'")],
)
def test_wrong_arguments_are_told_what_is_allowed(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments, BENCHMARKS)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_share_outside_counts_waiting_and_everything_unnamed() -> None:
    step = {"seconds/step": 2.0, "seconds/sample": 1.0, "seconds/learn": 0.5, "seconds/sync": 0.3, "seconds/wait": 0.1}
    assert outside_share(step) == pytest.approx(0.1)


def build_answer(number: int) -> Callable[[], tuple[int, int, str]]:
    if number == 0:
        raise ValueError("nothing to build")

    def answer() -> tuple[int, int, str]:
        return number, os.getpid(), os.environ["BENCHMARK_TEST"]

    return answer


def build_exit() -> Callable[[], None]:
    os.write(2, b"out of luck\n")
    os._exit(7)


def test_a_child_answers_from_its_own_process_and_is_gone_afterwards() -> None:
    with Child(build_answer, (4,), {"BENCHMARK_TEST": "yes"}) as child:
        number, pid, variable = child()
        assert (number, variable) == (4, "yes")
        assert child()[1] == pid != os.getpid()
    assert not Path(f"/proc/{pid}").exists()


def test_a_child_that_fails_or_dies_says_why() -> None:
    with Child(build_answer, (0,)) as child, pytest.raises(RuntimeError, match="nothing to build"):
        child()
    with Child(build_exit, ()) as child, pytest.raises(RuntimeError, match=r"exit status 7:\nout of luck"):
        child()


def test_what_takes_minutes_runs_only_by_name_and_has_a_file_of_its_own(tmp_path: Path) -> None:
    ran: list[str] = []

    def named(name: str) -> Callable[[Scale, Path], list[Row]]:
        return lambda scale, folder: ran.append(name) or []  # type: ignore[func-returns-value]

    assert main(["--json", str(tmp_path / "out.json")], {name: named(name) for name in BENCHMARKS}) == 0
    assert ran == ["sampler", "learner", "sync", "step"]
    assert json_path(ran) == RESULTS / "latest.json"
    assert json_path(["chaos"]) == RESULTS / "chaos.json"


# -- chaos -------------------------------------------------------------------------------------------------------------


def test_the_kill_plan_follows_from_its_seed_and_every_three_kills_have_each_kind() -> None:
    plan = list(itertools.islice(kill_plan(7, 20.0), 30))
    assert plan == list(itertools.islice(kill_plan(7, 20.0), 30))
    assert plan != list(itertools.islice(kill_plan(8, 20.0), 30))
    assert all({kill.kind for kill in plan[i : i + 3]} == set(TITLES) for i in range(0, 30, 3))
    assert all(10.0 <= kill.gap_s <= 30.0 for kill in plan)
    assert {kill.victim(["first", "second"]) for kill in plan} == {"first", "second"}


def ended(**changes: object) -> Ended:
    report: dict[str, object] = {
        "violations": (),
        "state": "finished",
        "first_step": 401,
        "last_step": 500,
        "num_trained": 6390,
        "dropped": {"too few rewards": 10},
        "groups_by_lag": {0: 6390},
        "num_in_flight": 0,
        "num_finished_untrained": 0,
        "num_checkpoints": 20,
        "num_rewinds": 2,
        "num_steps_redone": 7,
        "num_reissued": 30,
        "num_steps_compared": 100,
    }
    kills = changes.pop("kills", Counter({"sampler": 2, "learner rank": 1}))
    return Ended(
        report=AuditReport(**report | changes),  # type: ignore[arg-type]
        accuracy=0.9,
        wall_s=200.0,
        kills=kills,  # type: ignore[arg-type]
        num_groups=6400,
    )


def test_a_chaos_run_counts_only_if_something_was_killed_and_nothing_is_lost() -> None:
    require_survived(ended())
    with pytest.raises(RuntimeError, match="before anything was killed"):
        require_survived(ended(kills=Counter()))
    with pytest.raises(RuntimeError, match=r"2 sampler, 1 learner rank killed: 1 of 6400 groups lost; .* clean"):
        require_survived(ended(num_trained=6389))
    with pytest.raises(RuntimeError, match="trained twice"):
        require_survived(ended(violations=("group 7 was trained twice",)))


def test_a_chaos_run_shows_kills_by_kind_and_stands_beside_the_undisturbed_run() -> None:
    rows = {row.quantity: row for row in rows_of(ended(), ended(kills=Counter()))}
    assert [rows[f"kills survived: {kind}"].ours for kind in ("sampler", "reward worker", "learner rank")] == [2, 0, 1]
    assert rows["groups lost or repeated"].met is True
    assert rows["steps redone"].ours == 7
    assert rows["held-out accuracy at the end"].baseline == 0.9
    assert rows["held-out accuracy at the end"].case == "quickstart, 100 steps, max_lag 1, checkpoint every 5"


def test_only_whole_lines_of_reinforcement_learning_are_steps(tmp_path: Path) -> None:
    assert train_steps(tmp_path) == []
    lines = [
        '{"step": 0, "phase": "train"}',
        '{"step": 1, "phase": "warm_start"}',
        '{"step": 2, "phase": "train"}',
        '{"step": 3, "pha',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [step["step"] for step in train_steps(tmp_path)] == [2]


def test_a_run_that_failed_is_told_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "run.log").write_text("error: no engine today\n")
    with (
        subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process,
        pytest.raises(RuntimeError, match=r"status 3:\nerror: no engine today"),
    ):
        require_finished(process, tmp_path / "run", timeout_s=60)


# -- overlap -----------------------------------------------------------------------------------------------------------


def test_the_two_halves_of_a_step_are_medians_and_scoring_belongs_to_sampling() -> None:
    steps = [
        {"seconds/sample": sample, "seconds/score": 0.5, "seconds/learn": 1.0, "seconds/sync": 0.25}
        for sample in (1.0, 9.0, 2.0)
    ]
    assert stages_of(steps) == Stages(sample=2.5, learn=1.25)
    assert stages_of(steps).longer == 2.5


def test_a_step_is_counted_without_evaluation_and_checkpoint() -> None:
    step = {"seconds/step": 3.0, "seconds/eval": 0.5, "seconds/checkpoint": 1.0}
    assert step_seconds(step) == 1.5
    assert step_seconds({"seconds/step": 3.0}) == 3.0


# -- scale -------------------------------------------------------------------------------------------------------------

POINT = Point(num_samplers=8, max_lag=7, mean_seconds=1.0, seconds=10, groups_per_step=64)


def test_the_cost_of_a_point_leaves_out_its_first_steps() -> None:
    marks = [Mark(time_s=100.0, cpu_s=50.0)] * 2 + [Mark(time_s=100.0 + i, cpu_s=60.0 + i / 4) for i in range(5)]
    cost = cost_of(POINT, marks, peak_groups=512)
    assert cost.steps == 4
    assert cost.rollouts_per_s == 4 * 512 / 4.0
    assert cost.cpu_s_per_rollout == 1.0 / (4 * 512)
    assert cost.peak_in_flight == POINT.admitted == 4096


def test_growth_compares_the_most_in_flight_with_the_least() -> None:
    costs = [
        Cost(point=POINT, rollouts_per_s=1.0, cpu_s_per_rollout=cpu, peak_in_flight=peak, steps=4)
        for cpu, peak in ((0.002, 4096), (0.001, 1024), (0.0011, 16384))
    ]
    growth = growth_row(costs)
    assert growth.ratio is not None
    assert growth.ratio.median == pytest.approx(1.1)
    assert growth.met is True


def test_a_sleeping_sampler_stamps_each_token_with_the_weights_of_its_time() -> None:
    loaded_at, versions = [float("-inf"), 90.0, 100.5, 102.0, 200.0], [-1, 3, 4, 5, 6]
    assert stamps(loaded_at, versions, begun=100.0, seconds=4.0, num_tokens=8).tolist() == [4, 4, 4, 5, 5, 5, 5, 5]
    assert stamps(loaded_at, versions, begun=100.0, seconds=0.4, num_tokens=2).tolist() == [3, 3]


def test_a_sleeping_sampler_answers_every_group_and_holds_what_it_loaded() -> None:
    sampler = SleepingSampler()
    sampler.start("sampler 3", Pace(mean_seconds=0.01, mean_tokens=40))
    requests = [SampleRequest(group_id=f"g{i}", token_ids_P=(1,), seeds_G=(2 * i, 2 * i + 1)) for i in range(6)]

    async def run() -> list[GroupSample]:
        await sampler.load_weights(PublishedWeights(version=4, handle=None, num_bytes=0))
        groups: list[GroupSample] = []
        async for some in sampler.generate(requests, SamplingConfig()):
            assert (await sampler.heartbeat()).is_busy
            groups += some
        return groups

    groups = asyncio.run(run())
    assert sorted(group.group_id for group in groups) == [f"g{i}" for i in range(6)]
    assert {int(v) for group in groups for completion in group.completions_G for v in completion.versions_L} == {4}
    assert len({len(completion.token_ids_L) for group in groups for completion in group.completions_G}) > 1
    assert asyncio.run(sampler.score((1, 2, 3))).tolist() == fake_probe(4, 2).tolist() != fake_probe(5, 2).tolist()
    assert not asyncio.run(sampler.heartbeat()).is_busy


def test_generation_times_have_the_mean_that_was_asked_for() -> None:
    pace = Pace(mean_seconds=1.5, mean_tokens=64)
    seconds = [pace.seconds(seed) for seed in range(2000)]
    assert sum(seconds) / len(seconds) == pytest.approx(1.5, rel=0.05)
    assert min(seconds) > 0.2


# -- service -----------------------------------------------------------------------------------------------------------


def test_callers_ask_for_each_request_once_and_wait_for_their_answer() -> None:
    waiting, most, asked, num_polls = 0, 0, [], 100

    async def ask(caller: int, number: int) -> tuple[int, ...]:
        nonlocal waiting, most, num_polls
        waiting, num_polls = waiting + 1, num_polls + 2
        most = max(most, waiting)
        asked.append(number)
        await asyncio.sleep(0.001 * (3 - caller))
        waiting -= 1
        return number, number

    level = Level(num_callers=3, num_requests=10)
    clock = iter([{"server": 5.0}, {"server": 5.5}])
    served = asyncio.run(closed_loop(level, ask, lambda: next(clock), lambda: num_polls))
    assert (sorted(asked), most) == (list(range(10)), 3)
    assert (len(served.latencies_s), served.num_polls) == (10, 20)
    assert served.cpu_ms("server", "engine") == pytest.approx(50.0)
    assert served.requests_per_s == pytest.approx(10 / served.seconds)


def test_all_ask_for_the_same_in_prompts_of_one_length() -> None:
    levels = (Level(num_callers=1, num_requests=3), Level(num_callers=4, num_requests=9))
    load = Load.of(levels, vocab_size=50, prompt_tokens=7, max_tokens=2)
    assert load == Load.of(levels, vocab_size=50, prompt_tokens=7, max_tokens=2)
    assert [len(prompt) for prompt in load.prompts] == [7] * 9
    assert all(0 <= token < 50 for prompt in load.prompts for token in prompt)


def served(seconds: float, digest: int = 1, **cpu_s: float) -> Served:
    level = Level(num_callers=16, num_requests=4)
    latencies_s = (0.1, 0.2, 0.3, 0.4)
    return Served(level=level, seconds=seconds, latencies_s=latencies_s, digest=digest, cpu_s=cpu_s, num_polls=2)


def test_a_level_stands_beside_the_engine_alone_round_by_round() -> None:
    ours = [served(2.0, server=0.4, sampler=0.8, callers=9.0), served(4.0, server=0.4, sampler=0.8, callers=9.0)]
    theirs = {ALONE: [served(1.0, engine=0.6)] * 2, WITH_LORA: [served(2.0, digest=2, engine=0.6)] * 2}
    rate, with_lora, p50, p95, cpu = level_rows(ours, theirs, max_tokens=8)
    assert (rate.quantity, rate.ours, rate.baseline) == ("requests/s", 1.5, 4.0)
    assert rate.case == "samples, 16 callers: 4 requests of 8 tokens"
    assert rate.note == "0.50 polls per request; the same tokens"
    assert rate.ratio is not None
    assert with_lora.ratio is not None
    assert (rate.ratio.values, with_lora.ratio.values) == ((0.5, 0.25), (1.0, 0.5))
    assert (p50.ours, p95.ours) == (pytest.approx(250.0), pytest.approx(385.0))
    assert (cpu.ours, cpu.baseline) == (pytest.approx(300.0), pytest.approx(150.0))
    assert "callers 2250.00" in cpu.note


def test_memory_grows_by_so_much_for_each_model_after_the_first() -> None:
    before = {"server": 100.0, "learner": 200.0, "sampler": 400.0}
    resident = {1: before | {"learner": 220.0}, 4: before | {"learner": 250.0}}
    rows = {row.case: row for row in memory_rows(before, resident)}
    assert len(rows) == 6
    assert rows["memory, 1 LoRA model of rank 32: learner rank"].ours == 220.0
    four = rows["memory, 4 LoRA models of rank 32: learner rank"]
    assert (four.baseline, four.note) == (200.0, "10.0 MiB for each model after the first")


def test_the_sdk_and_the_learner_alone_are_given_the_same_data() -> None:
    sequences = Sequences.of(3, 6, vocab_size=20)
    assert sequences.num_tokens == 18
    for datum, (tokens, inputs) in zip(sdk_data(sequences), sequences.pairs(), strict=True):
        assert datum.model_input.to_ints() == tokens.tolist()
        assert {name: value.data.tolist() for name, value in datum.loss_fn_inputs.items()} == {
            name: value.tolist() for name, value in inputs.items()
        }
    check_same_loss("SDK", [2.0, 2.001], [2.0, 2.0])
    with pytest.raises(RuntimeError, match=r"SDK: the loss is 2\.1, that of the learner alone 2\.0"):
        check_same_loss("SDK", [2.1], [2.0])


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)status 2:.*unheard"), serving(tmp_path / "state", ["unheard=1"]):
        pass
    assert not (tmp_path / "state").exists()
