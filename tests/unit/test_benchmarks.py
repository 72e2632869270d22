"""The benchmarks' own parts: turns, ratios, table, JSON, command line, child processes. Nothing real is measured."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.alternation import Effort, Ratio, alternate, ratio
from benchmarks.child import Child
from benchmarks.command import BENCHMARKS, main
from benchmarks.machine import machine_facts
from benchmarks.results import Aim, Results, Row, number
from benchmarks.scale import Scale
from benchmarks.step_share import outside_share

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
