"""The quickstart's model and prompts without its run: what the benchmarks work on. It starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from weaver_rl.config import RunConfig, load_config
from weaver_rl.rollout import completion_seed
from weaver_rl.types import SampleRequest

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model directory and a step's prompts."""

    config: RunConfig
    model_dir: Path
    stop_token_ids: tuple[int, ...]
    vocab_size: int
    max_len: int
    requests: tuple[SampleRequest, ...]
    demonstrations: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """Token ids of prompt and gold completion."""

    @property
    def engine_args(self) -> dict[str, Any]:
        """As a run gives them to the sampler."""
        return {"max_model_len": self.max_len} | self.config.sampler.engine_args


def quickstart_config(overrides: Sequence[str] = ()) -> RunConfig:
    return load_config(CONFIG, overrides)


def prepare(config: RunConfig, folder: Path, num_demonstrations: int = 256) -> Workload:
    """Makes the model in `folder` and renders the prompts of the first step."""
    from weaver_rl.models.resolve import load_tokenizer, max_model_len, resolve_model, stop_token_ids
    from weaver_rl.tasks.load import load_task
    from weaver_rl.tasks.prompts import PromptStream, sample_texts

    assert config.base_dir is not None
    task = load_task(config.task, config.base_dir, config.seed)
    model_dir = resolve_model(config.model, folder, partial(sample_texts, task, config.task), config.base_dir)
    tokenizer = load_tokenizer(model_dir)
    longest = max_model_len(model_dir)
    max_len = min(longest, int(config.sampler.engine_args.get("max_model_len", longest)))
    room = max_len - config.rollout.sampling.max_tokens
    stream = PromptStream(task, tokenizer, config.task, room, config.seed)
    pairs = [stream.demonstration(position) for position in range(num_demonstrations)]
    return Workload(
        config=config,
        model_dir=model_dir,
        stop_token_ids=stop_token_ids(model_dir, tokenizer),
        vocab_size=len(tokenizer),
        max_len=max_len,
        requests=tuple(_requests(config, stream)),
        demonstrations=tuple((prompt.token_ids_P, completion) for prompt, completion in pairs),
    )


def _requests(config: RunConfig, stream: Any) -> list[SampleRequest]:
    rollout = config.rollout
    prompts = [stream.prompt(position) for position in range(rollout.prompts_per_step)]
    return [
        SampleRequest(
            group_id=f"{slot:04d}",
            token_ids_P=prompt.token_ids_P,
            seeds_G=tuple(
                completion_seed(config.seed, slot, prompt.prompt_id, index)
                for index in range(rollout.samples_per_prompt)
            ),
        )
        for slot, prompt in enumerate(prompts)
    ]
