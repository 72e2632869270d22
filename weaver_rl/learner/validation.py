"""Refuses data and parameters a learner operation cannot use, before anything is computed. It knows no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from weaver_rl.errors import BatchError, ConfigError
from weaver_rl.losses.reference import check_sum_weights
from weaver_rl.types import AdamParams, Datum

INPUT_DTYPES: dict[str, np.dtype[Any]] = {"target_tokens": np.dtype(np.int64), "weights": np.dtype(np.float32)}
"""Dtypes of the inputs of every loss; an input that is not listed is float32."""


def input_dtype(name: str) -> np.dtype[Any]:
    """The dtype a loss input must have."""
    return INPUT_DTYPES.get(name, np.dtype(np.float32))


def check_data(
    data: Sequence[Datum], *, input_names: Sequence[str], num_embeddings: int, vocab_size: int, max_length: int | None
) -> None:
    """Raise a `BatchError` naming the datum and the field of the first thing that is wrong."""
    for datum in data:
        _check_token_ids(datum, num_embeddings, max_length)
        for name in input_names:
            _check_input(datum, name)
        if "target_tokens" in input_names:
            _check_range(datum, "target_tokens", datum.loss_fn_inputs["target_tokens"], vocab_size)


def check_request(sum_weights: float, temperature: float) -> None:
    """Refuse a normaliser of 0 and a temperature that no distribution has."""
    check_sum_weights(sum_weights)
    check_temperature(temperature)


def check_temperature(temperature: float) -> None:
    """Refuse temperatures that are not finite and > 0."""
    if not 0 < temperature < math.inf:
        raise BatchError(f"temperature must be finite and > 0, seen {temperature}")


def check_adam_params(params: AdamParams) -> None:
    """Refuse values AdamW cannot step with, naming the field."""
    ranges = {
        "learning_rate": (params.learning_rate, 0 <= params.learning_rate < math.inf, ">= 0"),
        "beta1": (params.beta1, 0 <= params.beta1 < 1, "in [0, 1)"),
        "beta2": (params.beta2, 0 <= params.beta2 < 1, "in [0, 1)"),
        "eps": (params.eps, 0 < params.eps < math.inf, "> 0"),
        "weight_decay": (params.weight_decay, 0 <= params.weight_decay < math.inf, ">= 0"),
        "grad_clip_norm": (params.grad_clip_norm, 0 <= params.grad_clip_norm < math.inf, ">= 0 (0 disables clipping)"),
    }
    for name, (value, allowed, text) in ranges.items():
        if not allowed:
            raise ConfigError(f"adam_params.{name} must be finite and {text}, seen {value}")


def _check_token_ids(datum: Datum, num_embeddings: int, max_length: int | None) -> None:
    token_ids = datum.token_ids_N
    if not isinstance(token_ids, np.ndarray) or token_ids.dtype != np.int64 or token_ids.ndim != 1:
        raise _error(datum, "token_ids_N", f"must be a 1-D int64 array, seen {_describe(token_ids)}")
    if len(token_ids) == 0:
        raise _error(datum, "token_ids_N", "is empty: a datum needs at least one token")
    if max_length is not None and len(token_ids) > max_length:
        raise _error(datum, "token_ids_N", f"has {len(token_ids)} tokens, the model takes at most {max_length}")
    _check_range(datum, "token_ids_N", token_ids, num_embeddings)


def _check_input(datum: Datum, name: str) -> None:
    values = datum.loss_fn_inputs.get(name)
    if values is None:
        present = ", ".join(sorted(datum.loss_fn_inputs)) or "none"
        raise _error(datum, f"loss_fn_inputs[{name!r}]", f"is missing; present: {present}")
    expected, length = input_dtype(name), len(datum.token_ids_N)
    if not isinstance(values, np.ndarray) or values.dtype != expected or values.shape != (length,):
        raise _error(
            datum,
            f"loss_fn_inputs[{name!r}]",
            f"must be {expected} of shape ({length},), one value per token of token_ids_N, seen {_describe(values)}",
        )
    if expected.kind == "f" and not np.isfinite(values).all():
        position = int(np.flatnonzero(~np.isfinite(values))[0])
        raise _error(datum, f"loss_fn_inputs[{name!r}]", f"must be finite, seen {values[position]} at {position}")


def _check_range(datum: Datum, name: str, token_ids: np.ndarray, size: int) -> None:
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= size:
        seen = low if low < 0 else high
        raise _error(datum, name, f"holds token id {seen}, the model's vocabulary is 0..{size - 1}")


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return type(value).__name__


def _error(datum: Datum, field: str, text: str) -> BatchError:
    return BatchError(f"datum {datum.datum_id!r}: {field} {text}")
