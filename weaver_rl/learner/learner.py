"""One rank of the learner: Weaver's operations on a policy. A plain class that knows neither Ray, vLLM nor the run.

Every operation is a collective: all ranks of a group call it in the same order, each with its shard of the data.
Several learners may share a policy, each training an adapter of its own on it: they take turns, and what one does
changes neither what the others compute nor what they have accumulated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from weaver_rl.errors import BatchError, OtherRankError
from weaver_rl.learner import state, validation
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.learner.adapters import Adapters
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.learner.device import DTYPES, pick_device, pick_dtype
from weaver_rl.learner.export import iterate_chunks, save_hf_directory
from weaver_rl.learner.microbatches import (
    MicroBatch,
    Positions,
    build_microbatch,
    dummy_microbatch,
    pack,
    scatter_logprobs,
)
from weaver_rl.learner.process_group import Ranks
from weaver_rl.learner.sharding import build_policy, reshard
from weaver_rl.learner.trained import Trained, WholePolicy
from weaver_rl.learner.update import adamw_step, global_norm
from weaver_rl.learner.write_errors import writing
from weaver_rl.losses.contract import TokenLoss
from weaver_rl.types import (
    AdamParams,
    Datum,
    Float32Array,
    ForwardBackwardOutput,
    ForwardOutput,
    OptimStepOutput,
)

DROPPED = "all gradients that this model had accumulated are dropped"
_COUNTS = {"loss", "weights", "num_tokens", "padded_tokens"}
"""Sums that are no figures of a loss."""


class Learner:
    """One rank: float32 master weights, gradients that accumulate until `optim_step`, AdamW.

    It trains the whole policy; `with_adapter` gives learners that train an adapter on it.

    Example:
        learner = Learner(Path("model"), LearnerConfig(), seed=0)
        learner.forward_backward(data, CrossEntropy(name="cross_entropy"), sum_weights(data))
        learner.optim_step(AdamParams(learning_rate=1e-5))
    """

    _trained: Trained
    _optimizer: torch.optim.AdamW

    def __init__(
        self,
        model_dir: Path,
        config: LearnerConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        master_addr: str = "127.0.0.1",
        master_port: int | None = None,
        seed: int = 0,
    ) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        torch.manual_seed(seed + rank)
        self._model_dir = Path(model_dir)
        self._config = config
        self._device = pick_device(config, rank)
        self._compute_dtype = pick_dtype(config, self._device)
        # bfloat16 compute over float32 masters is FSDP2's mixed precision, on one rank as on many: one path, not two.
        self._ranks = Ranks(
            rank,
            world_size,
            device=self._device,
            needs_group=self._compute_dtype != torch.float32,
            master_addr=master_addr,
            master_port=master_port,
            timeout_s=config.timeout_s,
        )
        try:
            self._policy = build_policy(
                self._model_dir,
                self._ranks,
                device=self._device,
                compute_dtype=self._compute_dtype,
                chunk_tokens=config.logprob_chunk_tokens,
                activation_checkpointing=config.activation_checkpointing,
            )
        except BaseException:  # boundary: cleans up, then raises again
            self.close()
            raise
        self._adapters = Adapters(self._policy, self._ranks, self._model_dir)
        self._train(WholePolicy(self._policy, self._adapters, self._ranks, self._model_dir))

    def with_adapter(self, name: str, config: AdapterConfig) -> Learner:
        """A learner on the same policy and ranks that trains a new adapter, which changes nothing yet.

        The policy's own weights are frozen as long as there is an adapter on them: this learner, if it trains those,
        still computes with them. Raises ConfigError for a name that is taken and for parts that the model lacks.
        """
        learner = copy.copy(self)
        adapter = self._adapters.add(name, config)
        try:
            learner._train(adapter)
        except BaseException:  # boundary: cleans up, then raises again
            self._adapters.remove(name)
            raise
        return learner

    def remove_adapter(self, name: str) -> None:
        """Free an adapter with its gradients and AdamW's state; its learner refuses all work from then on."""
        self._adapters.remove(name)

    @property
    def num_parameters(self) -> int:
        """Weights that it trains, tied ones once."""
        return sum(parameter.numel() for _, parameter in self._trained.named_parameters())

    def forward(self, data: Sequence[Datum], temperature: float = 1.0, positions: Positions = "all") -> ForwardOutput:
        """Log-probabilities of the targets under logits / temperature; `weighted`: NaN where the weight is 0."""
        names = ("target_tokens",) if positions == "all" else ("target_tokens", "weights")
        self._begin()
        microbatches = self._agree_on_microbatches(data, names, positions, temperature)
        with torch.no_grad():
            logprobs = [self._logprobs(microbatch, temperature) for microbatch in microbatches]
        # After a forward without backward FSDP leaves the root gathered: stale as soon as the optimizer steps.
        reshard(self._policy)
        return ForwardOutput(logprobs_per_datum=_to_data(data, microbatches, logprobs))

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss: TokenLoss,
        sum_weights: float,
        temperature: float = 1.0,
        num_microbatches: int | None = None,
        positions: Positions = "weighted",
        with_grad_norm: bool = False,
    ) -> ForwardBackwardOutput:
        """Add the gradient of Σ token losses / `sum_weights` to what has accumulated.

        `sum_weights` is Σ weights of the whole request over all ranks, or 1 for a loss that is not `normalised`; the
        loss, counts and metrics returned are of the whole request, too. The log-probabilities are of this rank's
        data, NaN at weight 0 unless `positions` is `all`. `num_microbatches`: run at least as many. `with_grad_norm`:
        `metrics` has `grad_norm`, the L2 norm of all that has accumulated. If it fails in the middle all accumulated
        gradients are dropped, never kept half-done, and the error says so.
        """
        self._begin(changes_weights=True)
        names = loss.required_inputs
        microbatches = self._agree_on_microbatches(
            data, names, positions, temperature, sum_weights=sum_weights, at_least=num_microbatches or 1
        )
        try:
            results = [self._accumulate(microbatch, loss, sum_weights, temperature) for microbatch in microbatches]
            totals = self._totals(
                [sums for sums, _ in results],
                num_tokens=sum(len(datum.token_ids_N) for datum in data),
                padded_tokens=sum(microbatch.num_tokens for microbatch in microbatches),
            )
            if not math.isfinite(totals["loss"]):  # on every rank: all have the same total
                raise BatchError(f"the loss is {totals['loss']}: an input is too large for it (set a clip)")
            metrics = _metrics(totals, len(microbatches))
            if with_grad_norm:
                metrics["grad_norm"] = global_norm(self._trained.summed_gradients().values())
            return ForwardBackwardOutput(
                loss=totals["loss"],
                num_tokens=int(totals["num_tokens"]),
                sum_weights=sum_weights,
                logprobs_per_datum=_to_data(data, microbatches, [logprobs for _, logprobs in results]),
                metrics=metrics,
            )
        # Up to the answer: who is told that it failed sends the data again.
        except BaseException as error:  # boundary: cleans up, then raises again
            self.zero_grad()
            if isinstance(error, BatchError):
                raise BatchError(f"{error}; {DROPPED}") from error
            error.add_note(f"forward_backward failed in the middle: {DROPPED}")
            raise

    def optim_step(self, params: AdamParams) -> OptimStepOutput:
        """One AdamW update with what has accumulated, over all ranks; gradients are cleared."""
        validation.check_adam_params(params)
        self._begin(changes_weights=True)
        gradients = self._trained.summed_gradients()
        if not gradients:
            raise BatchError("optim_step needs gradients: no forward_backward was called since the last optim_step")
        norm = global_norm(gradients.values())
        if not math.isfinite(norm):
            self.zero_grad()
            raise BatchError(
                f"the gradient norm is {norm}: the step was not applied, weights are unchanged and gradients "
                "cleared; likely causes: a learning rate too high, or importance weights too large (set clip_ratio)"
            )
        adamw_step(self._optimizer, gradients, params, norm=norm)
        return OptimStepOutput(grad_norm=norm, learning_rate=params.learning_rate)

    def zero_grad(self) -> None:
        """Drop what has accumulated."""
        self._optimizer.zero_grad(set_to_none=True)

    def save_state(self, directory: Path, with_optimizer: bool = True) -> None:
        """Write weights, AdamW's state and generators; gradients that have accumulated are not part of it."""
        self._begin()
        with writing("the learner state", directory):
            state.save(Path(directory), self._trained, self._optimizer, self._ranks, with_optimizer=with_optimizer)

    def load_state(self, directory: Path, with_optimizer: bool = True) -> None:
        """Continue from what `save_state` wrote, on any number of ranks; accumulated gradients are dropped.

        `with_optimizer` False: AdamW begins anew, whatever it did before. Raises CheckpointError, and changes nothing,
        for a state of something else: an adapter of another rank, of other parts, the whole policy.
        """
        self._begin(changes_weights=True)
        state.load(Path(directory), self._trained, self._optimizer, self._ranks, with_optimizer=with_optimizer)
        self.zero_grad()

    def state_chunks(
        self, max_bytes: int, dtype: Literal["float32", "bfloat16"] | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Whole weights under their names on the hub, on this device, in chunks of `max_bytes` or one weight.

        Every rank must exhaust it; only rank 0's chunks hold anything. `dtype` None: the dtype computed in. Tensors
        may share memory with the policy: copy them before the next `optim_step`. A tied head comes as the embedding.
        An adapter is merged.
        """
        self._begin()
        return iterate_chunks(
            self._policy.model,
            rank=self._ranks.rank,
            max_bytes=max_bytes,
            dtype=DTYPES[dtype] if dtype else self._compute_dtype,
            hub_names=True,
            changes=self._trained.weight_changes(),
        )

    def save_hf(self, directory: Path) -> None:
        """Write a Hugging Face directory, in the dtype computed in, that transformers and vLLM load.

        An adapter is merged into what is written; one that changes a head tied to the embedding unties the two.
        """
        self._begin()
        with writing("the model", directory):
            save_hf_directory(
                self._policy.model,
                Path(directory),
                model_dir=self._model_dir,
                rank=self._ranks.rank,
                dtype=self._compute_dtype,
                changes=self._trained.weight_changes(),
            )
        self._ranks.barrier()

    def save_for_sampler(self, directory: Path) -> None:
        """Write what an engine loads: a PEFT directory for an adapter, a Hugging Face directory for a whole policy."""
        self._begin()
        with writing("weights for samplers", directory):
            self._trained.save_for_sampler(Path(directory), self._compute_dtype)
        self._ranks.barrier()

    def close(self) -> None:
        """Leave the process group, for all learners on this policy."""
        self._ranks.close()

    def _train(self, trained: Trained) -> None:
        self._trained = trained
        parameters = [parameter for _, parameter in trained.named_parameters()]
        self._optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

    def _begin(self, *, changes_weights: bool = False) -> None:
        """Before every operation: another learner may have used the policy since, or removed what this one trains."""
        self._trained.activate()
        if changes_weights:
            self._trained.check_trainable()

    def _agree_on_microbatches(
        self,
        data: Sequence[Datum],
        input_names: Sequence[str],
        positions: Positions,
        temperature: float,
        sum_weights: float = 1.0,
        at_least: int = 1,
    ) -> list[MicroBatch]:
        """This rank's micro-batches, as many as any rank has; refused on all ranks if one rank's data are bad."""
        refusal: BatchError | None = None
        microbatches: list[MicroBatch] = []
        try:
            self._check(data, input_names, temperature, sum_weights)
            lengths = [len(datum.token_ids_N) for datum in data]
            packed = pack(lengths, self._config.max_tokens_per_microbatch)
            microbatches = [build_microbatch(data, indices, input_names, positions) for indices in packed]
        except BatchError as error:
            refusal = error
        # A rank that raised before this collective would leave the others hanging in theirs.
        refused, count = self._ranks.max([float(refusal is not None), max(len(microbatches), at_least)])
        if refusal is not None:
            raise refusal
        if refused:
            raise OtherRankError(
                "another rank refused its shard of the data; its own error names the datum and the field"
            )
        dtypes = {name: validation.input_dtype(name) for name in input_names}
        return microbatches + [dummy_microbatch(dtypes)] * (int(count) - len(microbatches))

    def _check(self, data: Sequence[Datum], input_names: Sequence[str], temperature: float, sum_weights: float) -> None:
        if not data and self._ranks.world_size == 1:
            raise BatchError("no data: at least one datum is needed")
        validation.check_data(
            data,
            input_names=input_names,
            num_embeddings=self._policy.num_embeddings,
            vocab_size=self._policy.vocab_size,
            max_length=self._policy.max_length,
        )
        validation.check_request(sum_weights, temperature)

    def _accumulate(
        self, microbatch: MicroBatch, loss: TokenLoss, sum_weights: float, temperature: float
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Sums over the micro-batch, float64 scalars by name, and log-probabilities."""
        inputs_P = {name: self._to_device(values) for name, values in microbatch.inputs_P.items()}
        logprobs_P = self._logprobs(microbatch, temperature, inputs_P)
        loss_part = loss.token_losses(logprobs_P, inputs_P).sum() / sum_weights
        loss_part.backward()  # type: ignore[no-untyped-call]
        logprobs_P = logprobs_P.detach()
        with torch.no_grad():
            figures = loss.metric_sums(logprobs_P, inputs_P)
        sums = {"loss": loss_part.detach().double(), "weights": inputs_P["weights"].double().sum(), **figures}
        return sums, logprobs_P

    def _totals(self, sums_per_microbatch: Sequence[Mapping[str, torch.Tensor]], **counts: float) -> dict[str, float]:
        """Each sum over all micro-batches and ranks; one copy off the device, one collective."""
        stacked = torch.stack([torch.stack(list(sums.values())) for sums in sums_per_microbatch])
        names = [*sums_per_microbatch[0], *counts]
        totals = self._ranks.sum([*stacked.sum(dim=0).tolist(), *counts.values()])
        return dict(zip(names, totals, strict=True))

    def _logprobs(
        self, microbatch: MicroBatch, temperature: float, inputs_P: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        targets_P = inputs_P["target_tokens"] if inputs_P else self._to_device(microbatch.inputs_P["target_tokens"])
        logprobs_P: torch.Tensor = self._policy(
            self._to_device(microbatch.token_ids_BW),
            self._to_device(microbatch.flat_positions_P),
            targets_P,
            temperature,
        )
        return logprobs_P

    def _to_device(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _metrics(totals: Mapping[str, float], num_microbatches: int) -> dict[str, float]:
    """What goes with the answer beside the loss: figures of the loss are means, weighted by `weights`."""
    metrics = {
        "num_microbatches": float(num_microbatches),
        "padding_fraction": 1.0 - totals["num_tokens"] / totals["padded_tokens"],
    }
    if totals["weights"] != 0:
        metrics |= {name: total / totals["weights"] for name, total in totals.items() if name not in _COUNTS}
    return metrics


def _to_data(
    data: Sequence[Datum], microbatches: Sequence[MicroBatch], logprobs: Sequence[torch.Tensor]
) -> tuple[Float32Array, ...]:
    """One copy off the device for all micro-batches, then back to the order and positions of the data."""
    flat: Float32Array = torch.cat([values.float() for values in logprobs]).cpu().numpy()
    ends = np.cumsum([len(values) for values in logprobs])
    return scatter_logprobs(data, microbatches, np.split(flat, ends[:-1]))
