"""A real server as a process, and what tests of it send with the real SDK. It imports nothing of the server's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from weaver import ServiceClient
from weaver.types import Datum, ModelInput, SamplingParams

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs" / "serve_quickstart.yaml"
COMMAND = str(Path(sys.executable).with_name("weaver-rl"))
BASE = "weaver-rl/tiny"
KEYS = {"anne": "sk-anne", "ben": "sk-ben"}
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)

# The SDK's first poll comes after half a second otherwise, and there are hundreds of operations.
os.environ["WEAVER_OPERATION_POLL_INTERVAL"] = "0.02"


class RunningServer:
    """`weaver-rl serve` in a process of its own.

    Args:
        state_dir: where it keeps what outlives it.
        overrides: `key=value` of its configuration.
    """

    def __init__(self, state_dir: Path, *overrides: str) -> None:
        keys = ",".join(f"{name}:{key}" for name, key in KEYS.items())
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.state_dir = state_dir
        self.lines: list[str] = []
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            [COMMAND, "serve", str(CONFIG), f"state_dir={state_dir}", "http.port=0", *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env=environment | {"WEAVER_RL_API_KEYS": keys, "COLUMNS": "200"},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(START_TIMEOUT_S) or self.process.poll() is not None:
            self.kill()
            raise AssertionError(f"the server did not start:\n{self.output}")
        self.url = next(line.split(" at ")[1].strip() for line in self.lines if " at http" in line)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.strip() == "ready":
                self._ready.set()
        self._ready.set()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def client(self, name: str = "anne", **options: Any) -> ServiceClient:
        """The unmodified SDK, connected."""
        return ServiceClient(base_url=self.url, api_key=KEYS[name], **options)

    def actor(self, kind: str) -> psutil.Process:
        """The newest process of an actor class."""
        found = [
            process
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if any(f"ray::{kind}" in part for part in process.cmdline())
        ]
        return max(found, key=lambda process: process.create_time())

    def stop(self) -> int:
        """As a user would; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """Nobody can be prepared for this."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def sum_datum(tokenizer: Any, first: int, second: int, answer: int | None = None) -> Datum:
    """Position i predicts token i + 1; only the answer has weight."""
    prompt = tokenizer.encode(f"{first} + {second} =")
    target = [*tokenizer.encode(f" {first + second if answer is None else answer}"), tokenizer.eos_token_id]
    tokens = prompt + target
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(target)
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": torch.tensor(tokens[1:]), "weights": torch.tensor(weights)},
    )


def sums(tokenizer: Any, num: int, seed: int = 0) -> list[Datum]:
    chance = random.Random(seed)
    return [sum_datum(tokenizer, chance.randrange(10), chance.randrange(10)) for _ in range(num)]


def logprobs_of(answer: dict[str, Any]) -> list[torch.Tensor]:
    """Of each datum of a forward or forward_backward."""
    return [torch.tensor(output["logprobs"]["data"]) for output in answer["result"]["loss_fn_outputs"]]


def loss_of(answer: dict[str, Any]) -> float:
    return float(answer["result"]["metrics"]["loss"])


def prompt_of(tokens: Sequence[int]) -> ModelInput:
    return ModelInput.from_ints(list(tokens))


def sequences_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return list(answer["sequences"])


def until(condition: Any, timeout_s: float, what: str) -> None:
    """Waits for something that another process does."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)
