"""Memory of a server's processes as LoRA models are added, each trained one step and sampled from once."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.alternation import Ratio
from benchmarks.results import Row
from benchmarks.scale import Scale
from benchmarks.service_process import Server
from benchmarks.service_training import LOSS, RANK, Sequences, clients, sdk_data

SETTLE_S = 1.0
"""From the last answer to the reading."""
TITLES = {"server": "server process", "learner": "learner rank", "sampler": "sampler"}


def measure_memory(scale: Scale, server: Server, base_model: str, vocab_size: int) -> list[Row]:
    """Rows for each number of models and each process, beside the same process before the first."""
    counts = (1, 4) if scale.quick else (1, 4, 16)
    data = sdk_data(Sequences.of(8, 64, vocab_size))
    before = server.resident_mib()
    resident: dict[int, dict[str, float]] = {}
    with clients(server, {"only": "default"}) as services:
        for number in range(1, counts[-1] + 1):
            _use_model(services["only"], base_model, data, seed=number)
            if number in counts:
                time.sleep(SETTLE_S)
                resident[number] = server.resident_mib()
    return memory_rows(before, resident)


def memory_rows(before: dict[str, float], resident: dict[int, dict[str, float]]) -> list[Row]:
    """`resident`: by number of models, MiB of each process."""
    rows = []
    for number, now in resident.items():
        for part, title in TITLES.items():
            note = ""
            if number > 1:
                note = f"{(now[part] - resident[1][part]) / (number - 1):.1f} MiB for each model after the first"
            rows.append(
                Row(
                    benchmark="service",
                    case=f"memory, {number} LoRA model{'' if number == 1 else 's'} of rank {RANK}: {title}",
                    quantity="USS, MiB",
                    ours=now[part],
                    baseline=before[part],
                    baseline_name="before the first model",
                    ratio=Ratio.of([now[part] / before[part]]),
                    note=note,
                )
            )
    return rows


def _use_model(service: Any, base_model: str, data: list[Any], *, seed: int) -> None:
    from weaver.types import AdamParams, LoraConfig, ModelInput, SamplingParams

    model = service.create_model(base_model=base_model, lora_config=LoraConfig(rank=RANK, seed=seed))
    model.forward_backward(data, LOSS)
    model.optim_step(AdamParams(learning_rate=1e-3))
    sampling = model.save_weights_and_get_sampling_client()
    prompt = ModelInput.from_ints([5, 6, 7, 8])
    sampling.sample(prompt=prompt, sampling_params=SamplingParams(max_tokens=16, seed=seed))
