"""What the service costs: `weaver-rl serve` on its quickstart configuration beside engine and learner without it.

One server for all of it, as a user starts it. Memory is measured first, on a server that has done nothing else; its
models have ended before anything is timed. Threads are the configuration's (one each), on both sides.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from actors.lineup import prepare_lineup
from actors.signals import StopSignals
from benchmarks.results import Row
from benchmarks.scale import Scale
from benchmarks.service_memory import measure_memory
from benchmarks.service_process import CONFIG, serving
from benchmarks.service_samples import engines_alone, measure_samples, sample_load
from benchmarks.service_training import POLL_S, learner_alone, measure_training, training_sequences
from weaver_rl.config_file import load_file
from weaver_rl.service.config import ServeConfig


def measure(scale: Scale, folder: Path) -> list[Row]:
    """Rows for `samples`, for `forward_backward`, and for memory."""
    os.environ["WEAVER_OPERATION_POLL_INTERVAL"] = POLL_S
    config = load_file(ServeConfig, CONFIG, [f"state_dir={folder / 'state'}"])
    # The server finds it there: both sides read one directory.
    [(base_model, prepared)] = prepare_lineup(config, config.state_dir).items()
    vocab_size = prepared.lineup.vocab_size
    load = sample_load(scale, vocab_size)
    sequences = training_sequences(scale, vocab_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(StopSignals())
        engines = engines_alone(scale, config, prepared, load)
        learner = learner_alone(config, prepared, sequences)
        for child in (*engines.values(), learner):
            stack.callback(child.close)
        server = stack.enter_context(serving(config.state_dir))
        memory = measure_memory(scale, server, base_model, vocab_size)
        samples = measure_samples(scale, server, base_model, load, engines)
        training = measure_training(scale, server, base_model, sequences, learner)
    return samples + training + memory
