"""One vLLM engine, driven step by step by the thread that owns it: tokens in, tokens (and their texts) out.

The engine runs in this process (workers too, unless tensor parallelism needs more), so that new weights are loaded
by a plain call between two steps. What is cached under older weights is dropped then: it would train on lies.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from weaver_rl.engines.adapters import LoadedAdapter, LoadedAdapters
from weaver_rl.engines.config import LoraLimits
from weaver_rl.engines.outputs import completion_of, prompt_logprobs_of, score_of
from weaver_rl.engines.prompt_rows import TEMPERATURE, install
from weaver_rl.engines.start import on_cpu, start_engine
from weaver_rl.engines.weight_files import check_same_model, read_tensors, tensor_shapes, weight_files
from weaver_rl.errors import EngineError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import Adapter, Completion, Float32Array, GroupSample, PromptLogprobs, SampleRequest

if TYPE_CHECKING:
    import torch
    from vllm import RequestOutput, SamplingParams

MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 2.0
"""vLLM's own limits for anything but greedy sampling."""


@dataclass(slots=True)
class _Group:
    request: SampleRequest
    adapter: LoadedAdapter | None
    completions: list[Completion | None]
    texts: list[str]
    prompt_logprobs: PromptLogprobs | None = None
    vllm_ids: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Score:
    token_ids: tuple[int, ...]
    adapter: LoadedAdapter | None
    vllm_id: str | None = None
    logprobs: Float32Array | None = None


class VllmEngine:
    """One engine replica. Not thread-safe: one thread calls everything.

    Args:
        model_dir: Hugging Face directory with config and weights.
        name: how reports and errors call this sampler.
        engine_args: vLLM `EngineArgs`, verbatim.
        seed: engine seed; different for every replica.
        stop_token_ids: tokens that end a completion.
        weight_transfer: backend of vLLM's weight-transfer API (`nccl`, `ipc`), or None for `load_weights`.
        with_tokenizer: completions come with their texts, and texts can end them; needs the tokenizer in `model_dir`.
        lora: which adapters requests may bring; None: none, and the weights can be replaced.

    Raises:
        ConfigError: vLLM refuses `engine_args`.
        ModelError: vLLM cannot load the model.
    """

    def __init__(
        self,
        *,
        model_dir: Path,
        name: str,
        engine_args: dict[str, Any],
        seed: int,
        stop_token_ids: Sequence[int],
        tensor_parallel: int = 1,
        weight_transfer: str | None = None,
        with_tokenizer: bool = False,
        lora: LoraLimits | None = None,
    ) -> None:
        self.name = name
        self.on_cpu = on_cpu()
        self._with_tokenizer = with_tokenizer
        self._stop_token_ids = list(stop_token_ids)
        self._groups: dict[str, _Group] = {}
        self._scores: dict[str, _Score] = {}
        self._next_score = 0
        self.version = 0
        self._engine = start_engine(
            model_dir=model_dir,
            name=name,
            engine_args=engine_args,
            seed=seed,
            tensor_parallel=tensor_parallel,
            weight_transfer=weight_transfer,
            with_tokenizer=with_tokenizer,
            lora=lora,
        )
        answers_clients = with_tokenizer or lora is not None
        self._scores_at_any_temperature = answers_clients and all(self._engine.collective_rpc(install))
        config = self._engine.vllm_config.model_config
        self._tied_head = bool(getattr(config.hf_text_config, "tie_word_embeddings", False))
        self._model_dir = model_dir
        self.max_model_len = int(config.max_model_len)
        self.vocab_size = int(config.get_vocab_size())
        self._adapters = None if lora is None else LoadedAdapters(self._engine, lora, self._base_shapes())
        self._engine.engine_core.set_weight_version("0")

    # -- sampling ------------------------------------------------------------------------------------------------

    def add(self, request: SampleRequest, sampling: SamplingConfig) -> None:
        """Queues one group. Raises EngineError, with nothing queued, for a request that the engine cannot take."""
        name = request.group_id
        self._check_tokens(name, request.token_ids_P, self.max_model_len - 1)
        if not request.seeds_G:
            raise EngineError(f"{self.name}: {name}: no seeds, so no completions are asked for")
        if request.stop and not self._with_tokenizer:
            raise EngineError(f"{self.name}: {name}: stop texts {request.stop} need an engine with a tokenizer")
        num_samples = len(request.seeds_G)
        group = _Group(request, self._use(name, request.adapter), [None] * num_samples, [""] * num_samples)
        try:
            for index, seed in enumerate(request.seeds_G):
                params = self._params(request, sampling, seed, is_first=index == 0)
                group.vllm_ids.append(self._add(f"{name}/{index}", request.token_ids_P, params, group.adapter))
        except Exception as error:  # boundary: whatever vLLM says
            self._drop(group)
            raise EngineError(f"{self.name}: {name}: vLLM refuses it: {error}") from error
        self._groups[name] = group

    def _params(self, request: SampleRequest, sampling: SamplingConfig, seed: int, *, is_first: bool) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            seed=None if sampling.temperature == 0 else seed,
            logprobs=0,
            # All completions of a group have one prompt.
            prompt_logprobs=request.num_prompt_logprobs if is_first else None,
            detokenize=self._with_tokenizer,
            stop=list(request.stop) or None,
            stop_token_ids=[*self._stop_token_ids, *request.stop_token_ids],
            output_kind=RequestOutputKind.FINAL_ONLY,
            # Nobody else has them: vLLM need not copy them deeply, a tenth of the time of a short completion.
            skip_clone=True,
        )

    def _add(
        self, request_id: str, token_ids: Sequence[int], params: SamplingParams, adapter: LoadedAdapter | None
    ) -> str:
        prompt: Any = {"prompt_token_ids": [int(token) for token in token_ids]}
        lora = None if adapter is None else adapter.request
        return self._engine.add_request(request_id, prompt, params, lora_request=lora)

    def has_work(self) -> bool:
        return bool(self._groups or self._scores)

    def step(self) -> list[GroupSample]:
        """One forward of everything in flight; returns the groups that it completed."""
        finished: list[GroupSample] = []
        for output in self._engine.step():
            output = cast("RequestOutput", output)
            if not output.finished:
                continue
            if output.request_id in self._scores:
                score = self._scores[output.request_id]
                score.logprobs = score_of(output, score.token_ids)
                continue
            group_id, _, index = output.request_id.rpartition("/")
            group = self._groups.get(group_id)
            if group is None:
                continue
            self._take(group, int(index), output)
            if None not in group.completions:
                del self._groups[group_id]
                finished.append(self._end(group))
        return finished

    def _take(self, group: _Group, index: int, output: RequestOutput) -> None:
        group.completions[index] = completion_of(output, self.version)
        group.texts[index] = output.outputs[0].text
        if index == 0 and group.request.num_prompt_logprobs is not None:
            group.prompt_logprobs = prompt_logprobs_of(output, group.request.num_prompt_logprobs)

    def _end(self, group: _Group) -> GroupSample:
        self._let_go(group.adapter)
        return GroupSample(
            group_id=group.request.group_id,
            completions_G=tuple(c for c in group.completions if c is not None),
            sampler=self.name,
            texts_G=tuple(group.texts) if self._with_tokenizer else (),
            prompt_logprobs=group.prompt_logprobs,
        )

    def cut_short(self) -> list[GroupSample]:
        """Ends every group in flight with what its completions have so far, which may be nothing."""
        from vllm.v1.engine import FinishReason

        samples = []
        states = self._engine.output_processor.request_states
        for group in self._groups.values():
            for index, vllm_id in enumerate(group.vllm_ids):
                if group.completions[index] is None:
                    output = states[vllm_id].make_request_output([], None, FinishReason.ABORT, None)
                    self._take(group, index, cast("RequestOutput", output))
            self._engine.abort_request(group.vllm_ids, internal=True)
            samples.append(self._end(group))
        self._groups.clear()
        return samples

    def abort(self, group_ids: Sequence[str]) -> None:
        """Drops groups in flight."""
        for group_id in group_ids:
            self._drop(self._groups.pop(group_id))

    def abort_all(self) -> list[str]:
        """Drops everything in flight and returns the ids of the groups that will not come."""
        lost = list(self._groups)
        self.abort(lost)
        for score_id in list(self._scores):
            self.drop_score(score_id)
        return lost

    def _drop(self, group: _Group) -> None:
        self._engine.abort_request(group.vllm_ids, internal=True)
        self._let_go(group.adapter)

    def _check_tokens(self, name: str, token_ids: Sequence[int], max_tokens: int) -> None:
        # Without a tokenizer vLLM does not check ids itself: a bad one kills the step of every other request.
        if not token_ids:
            raise EngineError(f"{self.name}: {name}: the prompt is empty")
        if len(token_ids) > max_tokens:
            raise EngineError(
                f"{self.name}: {name}: the prompt has {len(token_ids)} tokens, the engine takes at most {max_tokens} "
                f"(max_model_len {self.max_model_len}, and a sampled token needs room)"
            )
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.vocab_size:
            raise EngineError(f"{self.name}: {name}: token ids {low}..{high} seen, 0..{self.vocab_size - 1} allowed")

    # -- scoring -------------------------------------------------------------------------------------------------

    def add_score(self, token_ids: Sequence[int], temperature: float = 1.0, adapter: Adapter | None = None) -> str:
        """Queues the scoring of a fixed sequence of up to `max_model_len` tokens; see `take_score`.

        All its logits are in memory at once: sequence length × vocabulary × 4 bytes, a few times over.
        Raises EngineError, with nothing queued, for what cannot be scored.
        """
        score_id = f"score-{self._next_score}"
        self._next_score += 1
        self._check_tokens(score_id, token_ids, self.max_model_len)
        if temperature != 1.0:
            self._check_temperature(score_id, temperature)
        score = _Score(tuple(token_ids), self._use(score_id, adapter))
        if len(token_ids) == 1:
            score.logprobs = np.full(1, np.nan, dtype=np.float32)
        else:
            has_room = len(token_ids) < self.max_model_len
            prompt = score.token_ids if has_room else score.token_ids[:-1]
            params = _score_params(temperature, None if has_room else score.token_ids[-1])
            try:
                score.vllm_id = self._add(score_id, prompt, params, score.adapter)
            except Exception as error:  # boundary: whatever vLLM says
                self._let_go(score.adapter)
                raise EngineError(f"{self.name}: {score_id}: vLLM refuses it: {error}") from error
        self._scores[score_id] = score
        return score_id

    def take_score(self, score_id: str) -> Float32Array | None:
        """Log-probabilities (N,) of log_softmax(logits / temperature): each token given those before it, NaN for the
        first; None while it is running."""
        logprobs = self._scores[score_id].logprobs
        if logprobs is not None:
            self.drop_score(score_id)
        return logprobs

    def drop_score(self, score_id: str) -> None:
        """Forgets a score, running or not."""
        score = self._scores.pop(score_id)
        if score.vllm_id is not None:
            self._engine.abort_request([score.vllm_id], internal=True)
        self._let_go(score.adapter)

    def _check_temperature(self, name: str, temperature: float) -> None:
        if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
            raise EngineError(
                f"{self.name}: {name}: temperature {temperature} seen, {MIN_TEMPERATURE}..{MAX_TEMPERATURE} allowed"
            )
        if not self._scores_at_any_temperature:
            raise EngineError(
                f"{self.name}: {name}: this engine scores at temperature 1 only; one with a tokenizer or adapters can "
                "do more"
            )

    # -- adapters ------------------------------------------------------------------------------------------------

    def forget_adapter(self, name: str) -> None:
        """Its next request reads the directory again; requests in flight go on with what they began with."""
        if self._adapters is not None:
            self._adapters.forget(name)

    def _use(self, name: str, adapter: Adapter | None) -> LoadedAdapter | None:
        if adapter is None:
            return None
        if self._adapters is None:
            raise EngineError(f"{self.name}: {name}: adapter {adapter.name} seen, this engine takes none")
        return self._adapters.use(adapter)

    def _let_go(self, adapter: LoadedAdapter | None) -> None:
        if adapter is not None and self._adapters is not None:
            self._adapters.release(adapter)

    # -- weights -------------------------------------------------------------------------------------------------

    def replace_weights(self, version: int, weights: Iterable[tuple[str, torch.Tensor]] | None) -> None:
        """Another version, by Hugging Face names and in any float dtype; None: its weights are there already.

        What is in flight goes on with it. Raises EngineError for an engine with adapters, whose base stays.
        """
        if self._adapters is not None:
            raise EngineError(f"{self.name}: an engine that takes adapters keeps its weights")
        # Before the first tensor: if the load fails half-way, what is sampled after it must not pass for older.
        self.version = version
        self._engine.engine_core.set_weight_version(str(version))
        if weights is not None:
            self._load(weights)
        self.reset_cache()

    def load_directory(self, directory: Path, version: int) -> None:
        """`replace_weights` from a Hugging Face directory; one of another model is refused before anything changes."""
        files = weight_files(directory)
        check_same_model(tensor_shapes(*files), self._base_shapes(), tied_head=self._tied_head, where=directory)
        self.replace_weights(version, read_tensors(*files))

    def _base_shapes(self) -> dict[str, tuple[int, ...]]:
        return tensor_shapes(*weight_files(self._model_dir))

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self.on_cpu:
            worker = self._engine.model_executor.driver_worker.worker
            worker.model_runner.model.load_weights(weights)
            return
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})

    def call_workers(self, method: str, *args: Any) -> None:
        """Calls a vLLM worker method on every worker (the weight-transfer API's four methods)."""
        self._engine.collective_rpc(method, args=args)

    def reset_cache(self) -> None:
        """Forgets all cached prefixes; running requests are recomputed with the weights of now."""
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise EngineError(f"{self.name}: vLLM did not drop its prefix cache; stale keys and values would be used")

    def close(self) -> None:
        self._engine.engine_core.shutdown()
        gc.collect()


def _score_params(temperature: float, next_token: int | None) -> SamplingParams:
    """`next_token`: also scored, as the one that may be sampled after the prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        # Greedy sampling reports log-probabilities at temperature 1.
        temperature=0.0 if temperature == 1.0 else temperature,
        # Not the engine's stream, which may not depend on who scores.
        seed=None if temperature == 1.0 else 0,
        max_tokens=1,
        prompt_logprobs=0,
        logprob_token_ids=None if next_token is None else [next_token],
        extra_args=None if temperature == 1.0 else {TEMPERATURE: temperature},
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )
