"""From what a client sent to what the learner is given: one loss and its data, or an error that names the mistake.

Pure numpy; it knows neither the wire protocol, nor torch, nor a model (the learner checks vocabulary and length).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from weaver_rl.errors import ServiceError
from weaver_rl.learner.microbatches import sum_weights
from weaver_rl.losses.config import LossConfig
from weaver_rl.service.loss_table import (
    CONFIG_KEYS,
    FORWARD_ONLY,
    MIN_TEMPERATURE,
    LossForm,
    LossInput,
    describe_losses,
    forms_of,
    loss_names,
    losses_table,
)
from weaver_rl.types import Datum, Int64Array

__all__ = ["LossRequest", "RawDatum", "describe_losses", "losses_table", "resolve_loss"]

IGNORED_TARGET = -100
INPUTS, CONFIG = "loss_fn_inputs", "loss_fn_config"
"""What the two are called on the wire, and so in messages."""
MAX_SHOWN = 80
"""Characters of a client's value, or names of a list, that a message repeats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawDatum:
    """A datum as it came over the wire, decoded.

    Example:
        RawDatum(datum_id=None, token_ids_N=np.array([5, 9, 6]),
                 inputs={"target_tokens": np.array([9, 6, 2]), "weights": np.array([0.0, 1.0, 1.0])})
    """

    datum_id: str | None
    token_ids_N: Int64Array
    inputs: Mapping[str, Any]
    """Arrays, or whatever came (lists, also ragged ones)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRequest:
    """What the learner is given."""

    name: str
    """What the client calls the loss function."""
    loss: LossConfig | None
    """None: forward alone, there is nothing to minimise."""
    data: tuple[Datum, ...]
    """With the inputs of `loss` and no others (`target_tokens` alone for a forward); `datum_id` is d0, d1, ... where
    the client gave none."""
    temperature: float
    ignored: tuple[str, ...]
    """Inputs and configuration keys that came along and mean nothing here: "loss_fn_inputs.sampling_mask"."""
    skipped_positions: Mapping[int, Int64Array] = field(default_factory=dict)
    """Index of a datum → its positions whose target was -100, for data that have any. Their target is 0 and their
    weight 0, so the log-probability that the learner gives there means nothing."""


def resolve_loss(name: str, config: Mapping[str, Any], data: Sequence[RawDatum], *, backward: bool) -> LossRequest:
    """The loss that `name`, `config` (`loss_fn_config`) and the inputs present ask for, with its data.

    A forward needs `target_tokens` alone, whatever the loss function; other inputs are not looked at then.

    Raises:
        ServiceError: `invalid_request`; names the datum (its id or index) and the field, or the key, with what was
            seen and what is allowed.
    """
    forms = _forms(name, backward)
    temperature = _temperature(config)
    losses = [_loss(form, config) for form in forms]
    if not data:
        raise _error("data is empty: at least one datum is needed", field="data")
    form = _form_of_all(forms, data) if backward else FORWARD_ONLY
    loss = losses[forms.index(form)] if backward else None
    resolved = [_resolved(form, raw, index) for index, raw in enumerate(data)]
    if loss is not None and loss.normalised:
        _check_sum_weights(form, [each.datum for each in resolved])
    unread = {key for each in resolved for key in each.unread}
    if not backward:
        unread -= {key for each in forms for key in _input_names(each)}
    unknown = config.keys() - {key for each in forms for key in each.defaults}
    return LossRequest(
        name=name,
        loss=loss,
        data=tuple(each.datum for each in resolved),
        temperature=temperature,
        ignored=tuple(sorted([f"{INPUTS}.{key}" for key in unread] + [f"{CONFIG}.{key}" for key in unknown])),
        skipped_positions={index: each.skipped for index, each in enumerate(resolved) if len(each.skipped)},
    )


def _forms(name: str, backward: bool) -> tuple[LossForm, ...]:
    forms = forms_of(name)
    if not forms:
        near = difflib.get_close_matches(str(name), loss_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise _error(f"loss_fn: seen {_shown(name)}; allowed: {', '.join(loss_names())}{hint}", field="loss_fn")
    if backward and forms == (FORWARD_ONLY,):
        raise _error(
            f"loss_fn: seen {name}, which runs forward only: it has nothing to differentiate; surrogate has",
            field="loss_fn",
        )
    return forms


# -- configuration ---------------------------------------------------------------------------------------------------


def _temperature(config: Mapping[str, Any]) -> float:
    value = config.get("temperature", 1.0)
    if not _is_number(value) or not MIN_TEMPERATURE <= value < math.inf:
        raise _bad_key("temperature", value)
    return _float("temperature", value)


def _loss(form: LossForm, config: Mapping[str, Any]) -> LossConfig | None:
    """The section of a form, from those keys of the configuration that it has."""
    if form.section is None:
        return None
    values = {key: config[key] for key in form.defaults if key in config and key != "temperature"}
    for key, value in values.items():
        kind = CONFIG_KEYS[key].kind
        if kind == "word" or (value is None and kind == "number or null"):
            continue
        if not _is_number(value):
            raise _bad_key(key, value)
        values[key] = _float(key, value)
    try:
        return form.section.model_validate({"name": form.learner_name} | values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["loc"]:
            raise _bad_key(str(first["loc"][0]), first["input"]) from None
        raise _error(f"{CONFIG}: " + first["msg"].removeprefix("Value error, "), field=CONFIG) from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _float(key: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise _bad_key(key, "an integer beyond float64") from None


def _bad_key(key: str, value: object) -> ServiceError:
    return _error(
        f"{CONFIG}.{key}: seen {_shown(value)}; allowed: {CONFIG_KEYS[key].allowed}",
        field=f"{CONFIG}.{key}",
    )


# -- inputs ----------------------------------------------------------------------------------------------------------


def _form_of_all(forms: Sequence[LossForm], data: Sequence[RawDatum]) -> LossForm:
    """The one form that all data are in."""
    first = _form_of(forms, data[0], 0)
    for index, raw in enumerate(data[1:], start=1):
        form = _form_of(forms, raw, index)
        if form is not first:
            raise _refusal(
                raw,
                index,
                INPUTS,
                f"are those of the {form.form} form ({_own(form)}), those of {_who(data[0], 0)} of the {first.form} "
                f"form ({_own(first)}): one request takes one form",
            )
    return first


def _form_of(forms: Sequence[LossForm], raw: RawDatum, index: int) -> LossForm:
    """The form whose inputs a datum has."""
    if len(forms) == 1:
        return forms[0]
    missing = {form: [each.name for each in form.inputs[1:] if each.name not in raw.inputs] for form in forms}
    complete = [form for form in forms if not missing[form]]
    if len(complete) == 1:
        return complete[0]
    choices = " or ".join(f"{_own(form)} ({form.form} form)" for form in forms)
    if complete:
        raise _refusal(raw, index, INPUTS, f"have the inputs of both forms; allowed: {choices}, not both")
    begun = [form for form in forms if len(missing[form]) < len(form.inputs) - 1]
    gaps = "; ".join(f"the {form.form} form lacks {', '.join(missing[form])}" for form in begun)
    raise _refusal(
        raw,
        index,
        INPUTS,
        f"have the inputs of neither form; allowed: {choices}; seen {_listed(raw.inputs)}{'; ' + gaps if gaps else ''}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Resolved:
    """A datum that has become canonical."""

    datum: Datum
    skipped: Int64Array
    """Positions whose target was -100."""
    unread: frozenset[str]
    """Inputs that it has besides those that were taken."""


def _resolved(form: LossForm, raw: RawDatum, index: int) -> _Resolved:
    num_tokens = len(raw.token_ids_N)
    if num_tokens == 0:
        raise _refusal(raw, index, "model_input", "is empty: a datum needs at least one token")
    sources = {loss_input: _source(form, loss_input, raw, index) for loss_input in form.inputs}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for loss_input, name in sources.items():
        values = _vector(raw, index, name, loss_input.dtype)
        convert = _targets if loss_input.dtype == "int64" else _factors
        arrays[loss_input.becomes] = convert(raw, index, name, values)
    if form.section is not None and form.weights_name is None:
        arrays["weights"] = np.ones(num_tokens, dtype=np.float32)
    skip = arrays["target_tokens"] == IGNORED_TARGET
    if skip.any():
        for name in {"target_tokens", "weights"} & arrays.keys():
            arrays[name] = np.where(skip, arrays[name].dtype.type(0), arrays[name])
    datum_id = raw.datum_id if raw.datum_id is not None else f"d{index}"
    return _Resolved(
        datum=Datum(datum_id=datum_id, token_ids_N=raw.token_ids_N, loss_fn_inputs=arrays),
        skipped=np.flatnonzero(skip),
        unread=frozenset(raw.inputs.keys() - set(sources.values())),
    )


def _source(form: LossForm, loss_input: LossInput, raw: RawDatum, index: int) -> str:
    """Under which name a datum has an input."""
    for name in (loss_input.name, loss_input.or_else):
        if name is not None and name in raw.inputs:
            return name
    instead = f" (or {loss_input.or_else})" if loss_input.or_else else ""
    who = "a forward" if form is FORWARD_ONLY else form.name
    needed = ", ".join(each.name for each in form.inputs)
    raise _refusal(
        raw,
        index,
        f"{INPUTS}.{loss_input.name}",
        f"is missing{instead}; {who} needs {needed}; seen {_listed(raw.inputs)}",
    )


def _vector(raw: RawDatum, index: int, name: str, dtype: str) -> npt.NDArray[Any]:
    num_tokens = len(raw.token_ids_N)
    try:
        values = np.asarray(raw.inputs[name])
    except (ValueError, TypeError, OverflowError):
        values = np.empty((), dtype=object)
    if values.dtype.kind not in "biuf" or values.shape != (num_tokens,):
        seen = f"{values.dtype} of shape {list(values.shape)}" if values.dtype != object else "no array of numbers"
        raise _refusal(
            raw,
            index,
            f"{INPUTS}.{name}",
            f"must be {dtype} of shape [{num_tokens}], one number per input token, seen {seen}",
        )
    return values


def _targets(raw: RawDatum, index: int, name: str, values: npt.NDArray[Any]) -> Int64Array:
    if values.dtype not in (np.int64, np.int32):
        raise _refusal(raw, index, f"{INPUTS}.{name}", f"must be integers (int64 or int32), seen {values.dtype}")
    bad = (values < 0) & (values != IGNORED_TARGET)
    if bad.any():
        at = int(bad.argmax())
        raise _refusal(
            raw, index, f"{INPUTS}.{name}", f"must be >= 0, or -100 to leave it out, seen {values[at]} at {at}"
        )
    return values.astype(np.int64, copy=False)


def _factors(raw: RawDatum, index: int, name: str, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        factors = values.astype(np.float32, copy=False)
    finite = np.isfinite(factors)
    if not finite.all():
        at = int(finite.argmin())
        raise _refusal(raw, index, f"{INPUTS}.{name}", f"must be finite in float32, seen {values[at]} at {at}")
    return factors


def _check_sum_weights(form: LossForm, data: Sequence[Datum]) -> None:
    total = sum_weights(data)
    if total > 0:
        return
    why = "no token counts" if total == 0 else "dividing by them would turn the gradient round"
    raise _error(
        f"{INPUTS}.{form.weights_name} of all {len(data)} data add up to {total:g} (targets of -100 count "
        f"nothing): {why}; more than 0 is needed, or {CONFIG}.aggregation: sum",
        field=f"{INPUTS}.{form.weights_name}",
    )


# -- messages --------------------------------------------------------------------------------------------------------


def _input_names(form: LossForm) -> set[str]:
    """Every input that means something to a form."""
    return {name for each in form.inputs for name in (each.name, each.or_else) if name is not None}


def _own(form: LossForm) -> str:
    return ", ".join(each.name for each in form.inputs[1:])


def _who(raw: RawDatum, index: int) -> str:
    return f"datum {index}" if raw.datum_id is None else f"datum {_shown(raw.datum_id)} (index {index})"


def _refusal(raw: RawDatum, index: int, field_name: str, text: str) -> ServiceError:
    return _error(
        f"{_who(raw, index)}: {field_name} {text}", field=field_name, datum_index=index, datum_id=raw.datum_id
    )


def _error(message: str, **details: object) -> ServiceError:
    return ServiceError("invalid_request", message, status=400, details=details)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of more than 4300 digits
        return "an integer too long to show" if isinstance(value, int) else "a value too long to show"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _listed(names: Iterable[str]) -> str:
    shown = sorted(names)
    text = ", ".join(name[:MAX_SHOWN] for name in shown[:MAX_SHOWN])
    return (text + (", …" if len(shown) > MAX_SHOWN else "")) or "none"
