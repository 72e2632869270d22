"""Log-probabilities of targets straight from hidden states, a chunk of tokens at a time. Knows no model, loss or rank.

The full (num_tokens, vocab) logits never exist, neither in forward nor in backward: backward computes each chunk's
logits again. The last chunk is the exception that costs nothing: its probabilities are kept, since backward starts
right after forward ends and would need a buffer of that very size anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTransform:
    """What lies between the head's product and the distribution: softcap·tanh(scale·x / softcap) / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply_(self, product: torch.Tensor) -> torch.Tensor:
        """In place: the head's product becomes the logits of the distribution sampled from."""
        if self.softcap is not None:
            product.mul_(self.scale / self.softcap).tanh_()
            return product.mul_(self.softcap / self.temperature)
        factor = self.scale / self.temperature
        return product if factor == 1.0 else product.mul_(factor)

    def derivative(self, logits: torch.Tensor) -> torch.Tensor | float:
        """d logits / d product, from the logits."""
        if self.softcap is None:
            return self.scale / self.temperature
        tanh = logits * (self.temperature / self.softcap)
        return tanh.square_().neg_().add_(1.0).mul_(self.scale / self.temperature)


IDENTITY = LogitTransform()


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A head's change, scaling·up@down: added to its product in float32, where a half-precision weight would lose it.

    So neither the changed weight (vocab, hidden) nor a gradient of that size ever exists.
    """

    down: torch.Tensor
    """(rank, hidden), float32."""
    up: torch.Tensor
    """(vocab, rank), float32."""
    scaling: float


def target_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    transform: LogitTransform = IDENTITY,
    chunk_tokens: int,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """log p(target) (num_tokens,) for hidden (num_tokens, hidden), weight (vocab, hidden), targets (num_tokens,).

    float64 in, float64 out; anything else gives float32. Differentiable in hidden, weight, bias and what `low_rank`,
    a change of the weight, consists of.
    """
    apply: Callable[..., torch.Tensor] = _TargetLogprobs.apply
    if low_rank is None:
        return apply(hidden, weight, bias, targets, transform, chunk_tokens, None, None)
    narrow = (hidden.to(low_rank.down.dtype) @ low_rank.down.t()) * low_rank.scaling
    return apply(hidden, weight, bias, targets, transform, chunk_tokens, narrow, low_rank.up)


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: LogitTransform,
        chunk_tokens: int,
        narrow: torch.Tensor | None,
        up: torch.Tensor | None,
    ) -> torch.Tensor:
        num_tokens = len(hidden)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(num_tokens, dtype=dtype, device=hidden.device)
        log_normalisers = torch.empty_like(logprobs)
        logits = torch.empty(0)
        for start in range(0, num_tokens, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = _logits(rows, hidden, weight, bias, narrow, up, transform)
            target_logits = logits.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
            maxima = logits.amax(dim=1, keepdim=True)
            # From here the chunk holds exp(logits − max): a second chunk-sized buffer would double the peak.
            sums = logits.sub_(maxima).exp_().sum(dim=1)
            log_normalisers[rows] = sums.log_().add_(maxima.squeeze(1))
            logprobs[rows] = target_logits - log_normalisers[rows]
        keep = any(ctx.needs_input_grad) and transform.softcap is None and num_tokens > 0
        ctx.last_chunk = (logits, torch.exp(maxima.squeeze(1) - log_normalisers[rows])) if keep else None
        ctx.save_for_backward(hidden, weight, bias, targets, log_normalisers, narrow, up)
        ctx.transform, ctx.chunk_tokens = transform, chunk_tokens
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, log_normalisers, narrow, up = ctx.saved_tensors
        gradients = _HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        change = None if narrow is None else _LowRankGradients(narrow, up)
        starts = range(0, len(hidden), ctx.chunk_tokens)
        for start in reversed(starts):
            rows = slice(start, start + ctx.chunk_tokens)
            grad_rows = grad_outputs[0][rows].to(log_normalisers.dtype)
            if ctx.last_chunk is not None:
                exponentials, per_row = ctx.last_chunk
                ctx.last_chunk = None
                slope: torch.Tensor | float = ctx.transform.derivative(exponentials)
                grad_logits = exponentials.mul_((per_row * -grad_rows).unsqueeze(1))
            else:
                logits = _logits(rows, hidden, weight, bias, narrow, up, ctx.transform)
                slope = ctx.transform.derivative(logits)
                grad_logits = logits.sub_(log_normalisers[rows].unsqueeze(1)).exp_().mul_(-grad_rows.unsqueeze(1))
            grad_logits.scatter_add_(1, targets[rows].unsqueeze(1), grad_rows.unsqueeze(1))
            if not (isinstance(slope, float) and slope == 1.0):
                grad_logits.mul_(slope)
            gradients.add(rows, grad_logits)
            if change is not None:
                change.add(rows, grad_logits)
        of_change = (None, None) if change is None else (change.narrow, change.up)
        return gradients.hidden, gradients.finished_weight(), gradients.bias, None, None, None, *of_change


def _logits(
    rows: slice,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    narrow: torch.Tensor | None,
    up: torch.Tensor | None,
    transform: LogitTransform,
) -> torch.Tensor:
    """One chunk's logits in float32 (float64 for float64)."""
    product = _matmul_float(hidden[rows], weight.t())
    if bias is not None:
        product.add_(bias)
    if narrow is not None and up is not None:
        product.addmm_(narrow[rows], up.t())
    return transform.apply_(product)


def _matmul_float(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right with a float32 result: on CUDA half-precision operands are never rounded to a half result."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


class _HeadGradients:
    """Gradients of hidden, weight and bias, filled chunk by chunk; weight is summed in float32 or better."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needed: tuple[bool, ...]
    ) -> None:
        self._hidden, self._weight_parameter = hidden, weight
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self._needs_weight = needed[1]
        self._weight: torch.Tensor | None = None
        self.bias = torch.zeros_like(bias) if bias is not None and needed[2] else None

    def add(self, rows: slice, grad_product: torch.Tensor) -> None:
        if self.bias is not None:
            self.bias += grad_product.sum(dim=0)
        hidden = self._hidden[rows]
        factor = grad_product.to(hidden.dtype)
        if self.hidden is not None:
            torch.mm(factor, self._weight_parameter, out=self.hidden[rows])
        if not self._needs_weight:
            return
        if self._weight is None:
            self._weight = _matmul_float(factor.t(), hidden)
        elif self._weight.dtype == factor.dtype:
            self._weight.addmm_(factor.t(), hidden)
        else:
            self._weight.add_(_matmul_float(factor.t(), hidden))

    def finished_weight(self) -> torch.Tensor | None:
        if not self._needs_weight:
            return None
        if self._weight is None:
            return torch.zeros_like(self._weight_parameter)
        return self._weight.to(self._weight_parameter.dtype)


class _LowRankGradients:
    """Gradients of a low-rank change's two factors, filled chunk by chunk."""

    def __init__(self, narrow: torch.Tensor, up: torch.Tensor) -> None:
        self._narrow, self._up = narrow, up
        self.narrow = torch.empty_like(narrow)
        self.up = torch.zeros_like(up)

    def add(self, rows: slice, grad_product: torch.Tensor) -> None:
        torch.mm(grad_product, self._up, out=self.narrow[rows])
        self.up.addmm_(grad_product.t(), self._narrow[rows])
