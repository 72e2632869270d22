"""Sampler tokens/s beside plain vLLM: the same model, prompts, seeds and engine arguments, in turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.alternation import Effort, alternate, ratio
from benchmarks.child import Child
from benchmarks.crew import Crew, local_crew
from benchmarks.plain_vllm import (
    PASSIVE_OPENMP,
    PROCESS_ENVIRONMENT,
    Generated,
    PlainRequest,
    PlainSpec,
    build_plain_vllm,
)
from benchmarks.quickstart import Workload, prepare, quickstart_config
from benchmarks.results import Aim, Row
from benchmarks.scale import Scale

SAME = "vllm.LLM.generate, same settings (F.linear)"
DEFAULT = "vllm.LLM.generate, vLLM's defaults (oneDNN, spinning OpenMP)"
LONG = ["model.max_position_embeddings=128", "rollout.sampling.max_tokens=64"]
"""Completions where decoding, not the handling of requests, takes the time."""
SMOLLM2 = ["model={name: smollm2-135m-instruct}", "task.chat_template=never", "rollout.prompts_per_step=8"]


def measure(scale: Scale, folder: Path) -> list[Row]:
    """Rows for the quickstart's step as it is and, unless quick, for longer completions; `full` adds SmolLM2."""
    cases: dict[str, list[str]] = {"quickstart": []}
    if not scale.quick:
        cases["quickstart, long"] = LONG
    if scale.full:
        cases["SmolLM2 135M"] = [*SMOLLM2, "rollout.sampling.max_tokens=24"]
    rows: list[Row] = []
    for number, (name, overrides) in enumerate(cases.items()):
        rows += _case(name, overrides, scale, folder / f"sampler-{number}")
    return rows


def _case(name: str, overrides: list[str], scale: Scale, folder: Path) -> list[Row]:
    config = quickstart_config(overrides)
    workload = prepare(config, folder, num_demonstrations=0)
    effort = Effort(rounds=3 if scale.quick else 15, max_seconds=10 if scale.quick else 25)
    last: dict[str, Generated] = {}

    def tokens_per_s(contender: str, generate: Callable[[], Generated]) -> Callable[[], float]:
        def measured() -> float:
            last[contender] = generate()
            return last[contender].num_tokens / last[contender].seconds

        return measured

    with contextlib.ExitStack() as stack:
        children = {SAME: _plain(workload, scale, onednn=False), DEFAULT: _plain(workload, scale, onednn=True)}
        for child in children.values():
            stack.callback(child.close)
        crew = stack.enter_context(local_crew(config, folder, scale.num_threads))
        contenders = {"ours": tokens_per_s("ours", _ours(crew, workload))}
        for plain, child in children.items():
            child.wait_started()
            contenders[plain] = tokens_per_s(plain, child)
        rates = alternate(contenders, effort)
    num_requests = sum(len(request.seeds_G) for request in workload.requests)
    return [
        Row(
            benchmark="sampler",
            case=f"{name}: {num_requests} requests, {last['ours'].num_tokens} tokens",
            quantity="tokens/s",
            ours=statistics.median(rates["ours"]),
            baseline=statistics.median(rates[plain]),
            baseline_name=plain,
            ratio=ratio(rates["ours"], rates[plain]),
            aim=Aim(kind="at least", value=0.95) if plain == SAME else None,
            note="the same tokens" if last[plain].digest == last["ours"].digest else "other tokens",
        )
        for plain in children
    ]


def _plain(workload: Workload, scale: Scale, *, onednn: bool) -> Child:
    sampling = workload.config.rollout.sampling
    spec = PlainSpec(
        model_dir=workload.model_dir,
        engine_args={"enforce_eager": True, "dtype": "float32", "seed": workload.config.seed} | workload.engine_args,
        requests=tuple(
            PlainRequest(token_ids=request.token_ids_P, seed=seed)
            for request in workload.requests
            for seed in request.seeds_G
        ),
        sampling=sampling.model_dump()
        | {"logprobs": 0, "detokenize": False, "stop_token_ids": list(workload.stop_token_ids)},
        onednn=onednn,
    )
    environment = PROCESS_ENVIRONMENT | {"OMP_NUM_THREADS": str(scale.num_threads)}
    return Child(build_plain_vllm, (spec,), environment if onednn else environment | PASSIVE_OPENMP)


def _ours(crew: Crew, workload: Workload) -> Callable[[], Generated]:
    pool = crew.sampler(workload.model_dir, workload.engine_args, workload.stop_token_ids)

    async def sample() -> Generated:
        started = time.perf_counter()
        samples = [sample async for sample in pool.generate(workload.requests, workload.config.rollout.sampling)]
        seconds = time.perf_counter() - started
        by_group = {sample.group_id: sample for sample in samples}
        completions = tuple(
            tuple(completion.token_ids_L.tolist())
            for request in workload.requests
            for completion in by_group[request.group_id].completions_G
        )
        return Generated(seconds=seconds, num_tokens=sum(map(len, completions)), digest=hash(completions) & 0xFFFFFFFF)

    return lambda: crew.wait(sample())
