"""The hook into vLLM's model runner with a fake runner: whose temperature the rows of which prompt get."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from weaver_rl.engines.prompt_rows import TEMPERATURE, install

pytestmark = pytest.mark.unit


class Model:
    def compute_logits(self, rows: float) -> float:
        return rows * 12.0


@dataclass
class Runner:
    """As vLLM's: answers each prompt that is scheduled, and forgets those that are through."""

    num_prompt_logprobs: dict[str, int]
    temperatures: dict[str, float]
    unfinished: set[str] = field(default_factory=set)
    lora_config: Any = None
    model: Model = field(default_factory=Model)

    @property
    def requests(self) -> dict[str, Any]:
        args = {name: {TEMPERATURE: temperature} for name, temperature in self.temperatures.items()}
        return {
            name: SimpleNamespace(sampling_params=SimpleNamespace(extra_args=args.get(name)))
            for name in self.num_prompt_logprobs
        }

    def _get_prompt_logprobs_dict(self, hidden: float, num_scheduled: dict[str, int]) -> dict[str, Any]:
        asked = self.num_prompt_logprobs
        scheduled = [name for name in asked if name in num_scheduled]
        found = {name: self.model.compute_logits(hidden) for name in scheduled}
        for name in scheduled:
            if name not in self.unfinished:
                del asked[name]
        return found


def test_every_prompt_gets_its_own_temperature():
    asked = {"a": 0, "b": 0, "c": 0, "waits": 0}
    runner = Runner(asked, {"b": 2.0, "c": 0.5}, unfinished={"c"})
    assert install(SimpleNamespace(model_runner=runner))
    found = runner._get_prompt_logprobs_dict(1.0, {"a": 3, "b": 3, "c": 3})
    assert found == {"a": 12.0, "b": 6.0, "c": 24.0}
    assert runner.num_prompt_logprobs is asked
    assert list(asked) == ["c", "waits"]
    assert runner.model.compute_logits(1.0) == 12.0, "sampling has nothing to do with it"


def test_a_failure_leaves_the_runner_as_it_was():
    asked = {"a": 0, "b": 0}
    runner = Runner(asked, {"a": 2.0})
    install(SimpleNamespace(model_runner=runner))

    with pytest.raises(TypeError):
        runner._get_prompt_logprobs_dict(None, {"a": 1})  # type: ignore[arg-type]
    assert runner.num_prompt_logprobs is asked
    assert runner.model.compute_logits(1.0) == 12.0


def test_another_model_runner_is_left_alone():
    assert not install(SimpleNamespace(model_runner=SimpleNamespace()))
