"""One rank of the learner: Weaver's operations on a policy. A plain class that knows neither Ray, vLLM nor the run.

Every operation is a collective: all ranks of a group call it in the same order, each with its shard of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from weaver_rl.errors import BatchError, CheckpointError, OtherRankError
from weaver_rl.learner import state, validation
from weaver_rl.learner.config import LearnerConfig
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
from weaver_rl.losses.contract import TokenLoss
from weaver_rl.types import (
    AdamParams,
    Datum,
    Float32Array,
    ForwardBackwardOutput,
    ForwardOutput,
    OptimStepOutput,
)

WRITE_ERRORS = (OSError, SafetensorError, CheckpointException)
"""What a full disk comes as, by who was writing; the last is not even an Exception."""
MAX_REASON = 400
"""Characters; torch puts whole tracebacks into the errors of a sharded write, the reason last."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Learner:
    """One rank: float32 master weights, gradients that accumulate until `optim_step`, AdamW.

    Example:
        learner = Learner(Path("model"), LearnerConfig(), seed=0)
        learner.forward_backward(data, CrossEntropy(name="cross_entropy"), sum_weights(data))
        learner.optim_step(AdamParams(learning_rate=1e-5))
    """

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
        self._device = _pick_device(config, rank)
        self._compute_dtype = _pick_dtype(config, self._device)
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
        except BaseException:
            self.close()
            raise
        self._optimizer = torch.optim.AdamW(self._policy.parameters(), lr=0.0, fused=True)

    @property
    def num_parameters(self) -> int:
        """Weights of the whole policy, tied ones once."""
        return sum(parameter.numel() for parameter in self._policy.parameters())

    def forward(self, data: Sequence[Datum], temperature: float = 1.0, positions: Positions = "all") -> ForwardOutput:
        """Log-probabilities of the targets under logits / temperature; `weighted`: NaN where the weight is 0."""
        names = ("target_tokens",) if positions == "all" else ("target_tokens", "weights")
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
    ) -> ForwardBackwardOutput:
        """Add the gradient of Σ token losses / `sum_weights` to what has accumulated.

        `sum_weights` is Σ weights of the whole request over all ranks; so are the loss and counts returned. The
        log-probabilities are of this rank's data, NaN at weight 0 unless `positions` is `all`. `num_microbatches`:
        run at least as many. If it fails in the middle all accumulated gradients are dropped, never kept half-done.
        """
        names = loss.required_inputs
        microbatches = self._agree_on_microbatches(
            data, names, positions, temperature, sum_weights=sum_weights, at_least=num_microbatches or 1
        )
        try:
            results = [self._accumulate(microbatch, loss, sum_weights, temperature) for microbatch in microbatches]
        except BaseException:
            self.zero_grad()
            raise
        local_loss = float(torch.stack([result[0] for result in results]).sum())
        num_tokens = sum(len(datum.token_ids_N) for datum in data)
        padded_tokens = sum(microbatch.num_tokens for microbatch in microbatches)
        total_loss, total_tokens, total_padded = self._ranks.sum([local_loss, num_tokens, padded_tokens])
        return ForwardBackwardOutput(
            loss=total_loss,
            num_tokens=int(total_tokens),
            sum_weights=sum_weights,
            logprobs_per_datum=_to_data(data, microbatches, [result[1] for result in results]),
            metrics={
                "num_microbatches": float(len(microbatches)),
                "padding_fraction": 1.0 - total_tokens / total_padded,
            },
        )

    def optim_step(self, params: AdamParams) -> OptimStepOutput:
        """One AdamW update with what has accumulated, over all ranks; gradients are cleared."""
        validation.check_adam_params(params)
        gradients = [parameter.grad for parameter in self._policy.parameters() if parameter.grad is not None]
        if not gradients:
            raise BatchError("optim_step needs gradients: no forward_backward was called since the last optim_step")
        norm = get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not math.isfinite(float(norm)):
            self.zero_grad()
            raise BatchError(
                f"the gradient norm is {float(norm)}: the step was not applied, weights are unchanged and gradients "
                "cleared; likely causes: a learning rate too high, or importance weights too large (set clip_ratio)"
            )
        if params.grad_clip_norm > 0:
            clip_grads_with_norm_(self._policy.parameters(), params.grad_clip_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"], group["betas"] = params.learning_rate, (params.beta1, params.beta2)
            group["eps"], group["weight_decay"] = params.eps, params.weight_decay
        self._optimizer.step()
        self.zero_grad()
        return OptimStepOutput(grad_norm=float(norm), learning_rate=params.learning_rate)

    def zero_grad(self) -> None:
        """Drop what has accumulated."""
        self._optimizer.zero_grad(set_to_none=True)

    def save_state(self, directory: Path, with_optimizer: bool = True) -> None:
        """Write weights, AdamW's state and generators; gradients that have accumulated are not part of it."""
        try:
            state.save(
                Path(directory),
                self._policy,
                self._optimizer,
                self._ranks,
                model_dir=self._model_dir,
                with_optimizer=with_optimizer,
            )
        except WRITE_ERRORS as error:
            raise CheckpointError(f"cannot write the learner state to {directory}: {_reason(error)}") from error

    def load_state(self, directory: Path) -> None:
        """Continue from what `save_state` wrote, on any number of ranks; accumulated gradients are dropped."""
        self.zero_grad()
        state.load(Path(directory), self._policy, self._optimizer, self._ranks)

    def state_chunks(
        self, max_bytes: int, dtype: Literal["float32", "bfloat16"] | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Whole weights under their names on the hub, on this device, in chunks of `max_bytes` or one weight.

        Every rank must exhaust it; only rank 0's chunks hold anything. `dtype` None: the dtype computed in. Tensors
        may share memory with the policy: copy them before the next `optim_step`. A tied head comes as the embedding.
        """
        return iterate_chunks(
            self._policy.model,
            rank=self._ranks.rank,
            max_bytes=max_bytes,
            dtype=_DTYPES[dtype] if dtype else self._compute_dtype,
            hub_names=True,
        )

    def save_hf(self, directory: Path) -> None:
        """Write a Hugging Face directory, in the dtype computed in, that transformers and vLLM load."""
        try:
            save_hf_directory(
                self._policy.model,
                Path(directory),
                model_dir=self._model_dir,
                rank=self._ranks.rank,
                dtype=self._compute_dtype,
            )
        except WRITE_ERRORS as error:
            raise CheckpointError(f"cannot write the model to {directory}: {_reason(error)}") from error
        self._ranks.barrier()

    def close(self) -> None:
        """Leave the process group."""
        self._ranks.close()

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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs_P = {name: self._to_device(values) for name, values in microbatch.inputs_P.items()}
        logprobs_P = self._logprobs(microbatch, temperature, inputs_P)
        loss_part = loss.token_losses(logprobs_P, inputs_P).sum() / sum_weights
        loss_part.backward()  # type: ignore[no-untyped-call]
        return loss_part.detach().double(), logprobs_P.detach()

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


def _pick_device(config: LearnerConfig, rank: int) -> torch.device:
    if config.num_gpus == 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _pick_dtype(config: LearnerConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[config.dtype]


def _to_data(
    data: Sequence[Datum], microbatches: Sequence[MicroBatch], logprobs: Sequence[torch.Tensor]
) -> tuple[Float32Array, ...]:
    """One copy off the device for all micro-batches, then back to the order and positions of the data."""
    flat: Float32Array = torch.cat([values.float() for values in logprobs]).cpu().numpy()
    ends = np.cumsum([len(values) for values in logprobs])
    return scatter_logprobs(data, microbatches, np.split(flat, ends[:-1]))


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[-MAX_REASON:]
