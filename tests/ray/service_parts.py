"""An engine that answers clients, what tests ask of it, and what Hugging Face and PEFT say to the same. No cluster."""

from __future__ import annotations

import string
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from sampler_parts import BLOCK, MAX_MODEL_LEN, START_TIMEOUT_S, TIMEOUT_S, VOCAB, in_actor, random_tokens

from actors.sampler import SamplerSpec
from weaver_rl.engines.config import LoraLimits
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import Adapter, Completion, GroupSample, SampleRequest

END_TOKEN = 2
LIMITS = LoraLimits(max_loras=3, max_rank=8, max_idle=3)
MAX_SEQUENCES = 48
PROMPT = random_tokens(20, seed=1)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
Matrix = npt.NDArray[np.float32]


def text_of(token: int) -> str:
    """Two letters for each token, but for the end."""
    letters = string.ascii_lowercase
    return "<end>" if token == END_TOKEN else letters[token // 26] + letters[token % 26]


def make_tokenizer(directory: Path) -> None:
    """A tokenizer that writes its tokens one after the other, without spaces."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.WordLevel({text_of(token): token for token in range(VOCAB)}, unk_token="<end>"))
    tokenizer.decoder = decoders.Fuse()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)


def make_adapter(directory: Path, model_dir: Path, modules: Sequence[str], *, rank: int = 4, seed: int = 0) -> Adapter:
    """An adapter whose two halves are random, so that it changes a lot; named like its directory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules=list(modules)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(directory)
    return Adapter(name=directory.name, directory=directory)


def spec(model_dir: Path) -> SamplerSpec:
    return SamplerSpec(
        name="service",
        model_dir=model_dir,
        engine_args={
            "max_model_len": MAX_MODEL_LEN,
            "block_size": BLOCK,
            "max_num_seqs": MAX_SEQUENCES,
            "kv_cache_memory_bytes": 32 << 20,
        },
        seed=0,
        stop_token_ids=(END_TOKEN,),
        tensor_parallel=1,
        transport="object_store",
        start_timeout_s=START_TIMEOUT_S,
        with_tokenizer=True,
        lora=LIMITS,
    )


class Reference:
    """Hugging Face and PEFT forwards in float32."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._models: dict[Path | None, Any] = {}

    def logprobs(self, token_ids: Sequence[int], adapter: Adapter | None = None, temperature: float = 1.0) -> Matrix:
        """(N, vocabulary): row i for the token after the first i + 1."""
        import torch

        with torch.no_grad():
            logits = self._model(adapter)(torch.tensor([list(token_ids)])).logits[0]
        result: Matrix = (logits / temperature).log_softmax(-1).numpy()
        return result

    def of_tokens(self, token_ids: Sequence[int], adapter: Adapter | None = None, temperature: float = 1.0) -> Matrix:
        """(N - 1,) of every token but the first."""
        rows = self.logprobs(token_ids, adapter, temperature)
        return rows[np.arange(len(token_ids) - 1), list(token_ids[1:])]

    def gap(self, completion: Completion, adapter: Adapter | None = None, temperature: float = 1.0) -> float:
        """Largest |Δ| in nats over a completion of `PROMPT`."""
        assert len(completion.token_ids_L)
        ours = self.of_tokens((*PROMPT, *completion.token_ids_L.tolist()), adapter, temperature)
        return float(np.abs(completion.logprobs_L - ours[len(PROMPT) - 1 :]).max())

    def _model(self, adapter: Adapter | None) -> Any:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        directory = None if adapter is None else adapter.directory
        if directory not in self._models:
            model: Any = AutoModelForCausalLM.from_pretrained(self._model_dir, dtype=torch.float32)
            self._models[directory] = (
                model if directory is None else PeftModel.from_pretrained(model, directory)
            ).eval()
        return self._models[directory]


def request(name: str, num_samples: int = 1, *, seed: int = 0, **more: Any) -> SampleRequest:
    prompt = more.pop("prompt", PROMPT)
    return SampleRequest(
        group_id=name, token_ids_P=prompt, seeds_G=tuple(seed + index for index in range(num_samples)), **more
    )


def sample_all(sampler: Any, asked: Sequence[SampleRequest], sampling: SamplingConfig) -> list[GroupSample]:
    """One call for each, all at a time."""
    return list(ray.get([sampler.sample.remote(each, sampling) for each in asked], timeout=TIMEOUT_S))


def wait_for_steps(sampler: Any, num_steps: int) -> None:
    """Until the engine, which something was asked of, has made so many steps more."""
    deadline = time.monotonic() + TIMEOUT_S
    begun: int | None = None
    while time.monotonic() < deadline:
        heartbeat = ray.get(sampler.heartbeat.remote())
        if heartbeat.is_busy and begun is None:
            begun = heartbeat.num_steps
        if begun is not None and heartbeat.num_steps >= begun + num_steps:
            return
    raise AssertionError(f"the engine did not make {num_steps} steps")


def num_in_flight(sampler: Any) -> int:
    """Completions and scores that vLLM has."""

    def count(sampler: Any) -> int:
        def look(engine: Any) -> int:
            num_known = engine._engine.get_num_unfinished_requests()
            assert num_known == len(engine._engine.engine_core.engine_core.scheduler.requests)
            assert bool(num_known) == engine.has_work()
            return int(num_known)

        return int(sampler._loop.call(look).result(timeout=30))

    return int(in_actor(sampler, count))


def wait_for_in_flight(sampler: Any, num: int) -> None:
    deadline = time.monotonic() + 30
    while num_in_flight(sampler) != num:
        assert time.monotonic() < deadline, f"{num_in_flight(sampler)} are in flight, not {num}"
        time.sleep(0.01)


def tokens(group: GroupSample) -> list[list[int]]:
    return [completion.token_ids_L.tolist() for completion in group.completions_G]
