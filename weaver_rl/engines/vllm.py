"""One vLLM engine, driven step by step by the thread that owns it. Token in, token out: it knows no tokenizer.

The engine runs in this process (workers too, unless tensor parallelism needs more), so that new weights are loaded
by a plain call between two steps. Three things that would train on lies are switched off here and tested for:
linear layers repacked by oneDNN (they stop taking new weights), the prefix cache surviving a load, and raw instead
of processed log-probabilities.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from weaver_rl.errors import ConfigError, EngineError, ModelError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import Completion, Float32Array, GroupSample, SampleRequest, StopReason

if TYPE_CHECKING:
    import torch
    from vllm import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

CPU_KV_CACHE_BYTES = 256 << 20
"""Left to itself a CPU engine takes nearly all memory for its KV cache."""
CPU_TOKENS_PER_STEP = 2048
"""vLLM's own default there."""


def prepare_process(num_threads: int | None = None) -> None:
    """Sets what vLLM reads from the environment. Must run before vllm or torch is first imported in the process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # The learner works on the same cores while the sampler waits: a spinning OpenMP pool would take them from it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)


def import_vllm() -> None:
    """Imports what an engine needs: seconds that can pass while the model is still being made."""
    import vllm.v1.engine.llm_engine  # noqa: F401


@dataclass(slots=True)
class _Group:
    request: SampleRequest
    completions: list[Completion | None]


@dataclass(slots=True)
class _Score:
    logprobs: Float32Array | None = field(default=None)


class VllmEngine:
    """One engine replica. Not thread-safe: one thread calls everything.

    Args:
        model_dir: Hugging Face directory with config and weights.
        name: how reports and errors call this sampler.
        engine_args: vLLM `EngineArgs`, verbatim.
        seed: engine seed; different for every replica.
        stop_token_ids: tokens that end a completion.
        weight_transfer: backend of vLLM's weight-transfer API (`nccl`, `ipc`), or None for `load_weights`.

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
    ) -> None:
        from vllm.platforms import current_platform

        self.name = name
        self.on_cpu = current_platform.is_cpu()
        self._stop_token_ids = list(stop_token_ids)
        self._groups: dict[str, _Group] = {}
        self._scores: dict[str, _Score] = {}
        self._next_score = 0
        self.version = 0
        self._engine = self._build(model_dir, engine_args, seed, tensor_parallel, weight_transfer)
        config = self._engine.vllm_config.model_config
        self.max_model_len = int(config.max_model_len)
        self.vocab_size = int(config.get_vocab_size())
        self._engine.engine_core.set_weight_version("0")

    def _build(
        self, model_dir: Path, given: dict[str, Any], seed: int, tensor_parallel: int, weight_transfer: str | None
    ) -> LLMEngine:
        if self.on_cpu:
            import vllm._custom_ops as ops

            # Repacked linear layers lose `weight` and silently keep old values (tied lm_head) on an update.
            ops._supports_onednn = False
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        ours: dict[str, Any] = {"enforce_eager": True, "dtype": "float32"} if self.on_cpu else {}
        if self.on_cpu and "kv_cache_memory_bytes" not in given:
            ours["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
        if self.on_cpu:
            # A seeded prompt cut in two needs a generator that can be set back, and torch's for the CPU cannot: the
            # step would fail ("CPU Generator does not use offset"). So prompts are not cut, and each fits a step.
            longest = int(given.get("max_model_len", 0))
            ours |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(CPU_TOKENS_PER_STEP, longest)}
        args = ours | given
        if self.on_cpu and args["enforce_eager"]:
            # The first request for log-probabilities would otherwise compile for seconds.
            import torch

            torch._dynamo.config.disable = True
        if tensor_parallel > 1:
            # Inside a placement group vLLM would choose Ray, whose workers need bundles of their own.
            args.setdefault("distributed_executor_backend", "mp")
        if weight_transfer is not None:
            args["weight_transfer_config"] = {"backend": weight_transfer}
        try:
            engine_args = EngineArgs(
                model=str(model_dir),
                skip_tokenizer_init=True,
                logprobs_mode="processed_logprobs",
                seed=seed,
                tensor_parallel_size=tensor_parallel,
                disable_log_stats=True,
                **args,
            )
        except TypeError as error:
            raise ConfigError(f"sampler.engine_args: vLLM does not know one of {sorted(given)}: {error}") from None
        try:
            return LLMEngine.from_engine_args(engine_args)
        except (ValueError, RuntimeError, OSError) as error:
            raise ModelError(
                f"{self.name}: vLLM could not start with model {model_dir} and engine_args {given}: {error}"
            ) from error

    # -- sampling ------------------------------------------------------------------------------------------------

    def add(self, request: SampleRequest, sampling: SamplingConfig) -> None:
        """Queues one group. Raises EngineError, with nothing queued, for a prompt that the model cannot take."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check_tokens(request.group_id, request.token_ids_P)
        group = _Group(request, [None] * len(request.seeds_G))
        for index, seed in enumerate(request.seeds_G):
            params = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                max_tokens=sampling.max_tokens,
                seed=None if sampling.temperature == 0 else seed,
                logprobs=0,
                detokenize=False,
                stop_token_ids=self._stop_token_ids,
                output_kind=RequestOutputKind.FINAL_ONLY,
                # Nobody else has them: vLLM need not copy them deeply, a tenth of the time of a short completion.
                skip_clone=True,
            )
            try:
                self._engine.add_request(f"{request.group_id}/{index}", _prompt(request.token_ids_P), params)
            except Exception:
                self._engine.abort_request([f"{request.group_id}/{earlier}" for earlier in range(index)])
                raise
        self._groups[request.group_id] = group

    def add_score(self, token_ids: Sequence[int]) -> str:
        """Queues the scoring of a fixed sequence; its result comes out of `take_score` after some `step`s."""
        from vllm import SamplingParams

        score_id = f"score-{self._next_score}"
        self._next_score += 1
        self._check_tokens(score_id, token_ids)
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        self._engine.add_request(score_id, _prompt(token_ids), params)
        self._scores[score_id] = _Score()
        return score_id

    def take_score(self, score_id: str) -> Float32Array | None:
        """Log-probabilities (N-1,) of tokens 1..N-1 given those before, at temperature 1; None while it is running."""
        logprobs = self._scores[score_id].logprobs
        if logprobs is not None:
            del self._scores[score_id]
        return logprobs

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
                self._scores[output.request_id].logprobs = _prompt_logprobs(output)
                continue
            group_id, _, index = output.request_id.rpartition("/")
            group = self._groups.get(group_id)
            if group is None:
                continue
            group.completions[int(index)] = self._completion(output)
            if None not in group.completions:
                del self._groups[group_id]
                done = tuple(c for c in group.completions if c is not None)
                finished.append(GroupSample(group_id=group_id, completions_G=done, sampler=self.name))
        return finished

    def abort(self, group_ids: Sequence[str]) -> None:
        """Drops groups in flight."""
        ids = [f"{g}/{i}" for g in group_ids for i in range(len(self._groups[g].completions))]
        for group_id in group_ids:
            del self._groups[group_id]
        with contextlib.suppress(KeyError):
            self._engine.abort_request(ids)

    def abort_all(self) -> list[str]:
        """Drops everything in flight and returns the ids of the groups that will not come."""
        lost = list(self._groups)
        ids = [f"{g}/{i}" for g, group in self._groups.items() for i in range(len(group.completions))]
        with contextlib.suppress(KeyError):
            self._engine.abort_request(ids + list(self._scores))
        self._groups.clear()
        self._scores.clear()
        return lost

    def _completion(self, output: RequestOutput) -> Completion:
        result = output.outputs[0]
        if result.logprobs is None:
            raise EngineError(f"{self.name}: vLLM returned no log-probabilities for {output.request_id}")
        token_ids = np.asarray(result.token_ids, dtype=np.int32)
        logprobs = np.fromiter(_chosen(result.logprobs, result.token_ids), dtype=np.float32, count=len(token_ids))
        versions = np.full(len(token_ids), self.version, dtype=np.int32)
        for span in result.weight_versions or []:
            versions[span.start : span.end] = int(span.version)
        reason = result.finish_reason
        if reason not in ("stop", "length", "abort"):
            raise EngineError(f"{self.name}: vLLM ended {output.request_id} with reason {reason!r}")
        return Completion(
            token_ids_L=token_ids, logprobs_L=logprobs, versions_L=versions, stop_reason=cast("StopReason", reason)
        )

    def _check_tokens(self, request_id: str, token_ids: Sequence[int]) -> None:
        # Without a tokenizer vLLM does not check ids itself: a bad one kills the step of every other request.
        if not token_ids:
            raise EngineError(f"{self.name}: {request_id}: the prompt is empty")
        if len(token_ids) >= self.max_model_len:
            raise EngineError(
                f"{self.name}: {request_id}: the prompt has {len(token_ids)} tokens, the engine takes at most "
                f"{self.max_model_len - 1} (max_model_len {self.max_model_len} with room for one new token)"
            )
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.vocab_size:
            raise EngineError(
                f"{self.name}: {request_id}: token ids {low}..{high} seen, 0..{self.vocab_size - 1} allowed"
            )

    # -- weights -------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Loads tensors by their Hugging Face names, any float dtype; `stamp` before, `reset_cache` after."""
        if self.on_cpu:
            worker = self._engine.model_executor.driver_worker.worker
            worker.model_runner.model.load_weights(weights)
            return
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})

    def call_workers(self, method: str, *args: Any) -> None:
        """Calls a vLLM worker method on every worker (the weight-transfer API's four methods)."""
        self._engine.collective_rpc(method, args=args)

    def stamp(self, version: int) -> None:
        """The version of what is sampled from now on."""
        self.version = version
        self._engine.engine_core.set_weight_version(str(version))

    def reset_cache(self) -> None:
        """Forgets all cached prefixes; running requests are recomputed with the weights of now."""
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise EngineError(f"{self.name}: vLLM did not drop its prefix cache; stale keys and values would be used")

    def close(self) -> None:
        self._engine.engine_core.shutdown()
        gc.collect()


def _prompt(token_ids: Sequence[int]) -> Any:
    return {"prompt_token_ids": [int(token) for token in token_ids]}


def _prompt_logprobs(output: RequestOutput) -> Float32Array:
    entries = output.prompt_logprobs or []
    tokens = output.prompt_token_ids or []
    return np.fromiter(_chosen(entries[1:], tokens[1:]), dtype=np.float32)


def _chosen(entries: Any, tokens: Sequence[int]) -> Iterator[float]:
    """The log-probability of each token out of vLLM's per-position dictionaries."""
    for entry, token in zip(entries, tokens, strict=True):
        if entry is None:
            raise EngineError(f"vLLM returned no log-probability for token {token}")
        yield entry[token].logprob
