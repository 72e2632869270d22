"""The loss functions that clients can name: inputs, keys and formulas, in one table. Knows neither data nor HTTP.

`resolve_loss` acts on this table and the documentation is printed from it, so that the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from weaver_rl.losses.config import (
    Cispo,
    CrossEntropy,
    ImportanceSampling,
    ImportanceSamplingRatio,
    LossConfig,
    PpoClip,
    Surrogate,
    TruncatedImportanceSampling,
)
from weaver_rl.losses.contract import AggregatedLoss

MIN_TEMPERATURE = 1e-3
"""Below it logits / temperature would not always fit into float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInput:
    """One tensor of a datum's `loss_fn_inputs`: 1-D, one value for each token of `model_input`."""

    name: str
    """What clients call it."""
    becomes: str
    """What the learner calls it."""
    meaning: str
    dtype: Literal["int64", "float32"] = "float32"
    or_else: str | None = None
    """The input that is taken in its place where it is absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigKey:
    """One key of `loss_fn_config`."""

    kind: Literal["number", "number or null", "word"]
    allowed: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LossForm:
    """A loss function, or one of the two forms of `importance_sampling`."""

    name: str
    """What clients call the loss function."""
    form: str | None = None
    """What tells it from the other form of that name."""
    section: type[LossConfig] | None
    """What the learner minimises; None: nothing, it only runs forward."""
    inputs: tuple[LossInput, ...]
    """What it needs, `target_tokens` first."""
    formula: str

    @property
    def defaults(self) -> dict[str, Any]:
        """The keys of `loss_fn_config` that mean something to it, with what they are where they are not given."""
        fields = self.section.model_fields if self.section else {}
        return {"temperature": 1.0} | {key: field.default for key, field in fields.items() if key != "name"}

    @property
    def learner_name(self) -> str:
        """The `name` of its section."""
        return str(get_args(self.section.model_fields["name"].annotation)[0]) if self.section else self.name

    @property
    def weights_name(self) -> str | None:
        """What clients call the input that becomes the learner's `weights`; None: every token counts."""
        return next((loss_input.name for loss_input in self.inputs if loss_input.becomes == "weights"), None)

    @property
    def normalisation(self) -> str:
        """What the sum over all tokens is divided by, in words."""
        if self.section is None:
            return "–"
        if not issubclass(self.section, AggregatedLoss):
            return "nothing"
        return f"Σ {self.weights_name}, or nothing if aggregation is sum"


TARGETS = LossInput(
    name="target_tokens",
    becomes="target_tokens",
    dtype="int64",
    meaning="the token that position i of the input must predict; -100 leaves the position out",
)
WEIGHTS = LossInput(name="weights", becomes="weights", meaning="w: how much the token counts, 0 on the prompt")
WEIGHTS_OR_MASK = LossInput(name=WEIGHTS.name, becomes="weights", meaning=WEIGHTS.meaning, or_else="loss_mask")
LOSS_MASK = LossInput(
    name="loss_mask",
    becomes="weights",
    meaning="m: 1 where the token counts, 0 where not; other weights are possible; "
    "`cross_entropy` takes it where `weights` are absent",
)
IMPORTANCE_WEIGHTS = LossInput(
    name="importance_weights",
    becomes="importance_weights",
    meaning="iw: the factor of the token's gradient, advantage and correction included",
)
LOGPROBS = LossInput(
    name="logprobs",
    becomes="logprobs",
    meaning="q: log-probability of the target under the policy that sampled it; any finite number where the mask is 0",
)
ADVANTAGES = LossInput(name="advantages", becomes="advantages", meaning="A: how much better than expected it went")
SURROGATE_WEIGHTS = LossInput(
    name="surrogate_weights", becomes="surrogate_weights", meaning="s: ∂(your loss)/∂lp of the token"
)
RATIO_INPUTS = (TARGETS, LOGPROBS, ADVANTAGES, LOSS_MASK)

CONFIG_KEYS: dict[str, ConfigKey] = {
    "temperature": ConfigKey(
        kind="number",
        allowed=f"a finite number >= {MIN_TEMPERATURE}",
        meaning="logits are divided by it before lp is taken",
    ),
    "aggregation": ConfigKey(
        kind="word", allowed="mean or sum", meaning="whether the sum over tokens is divided by their weights"
    ),
    "clip_ratio": ConfigKey(
        kind="number or null",
        allowed="a finite number > 0, or null for no bound",
        meaning="c: bound of the factor; iw is clamped to [-c, c], in the ratio form r is at most c",
    ),
    "tis_cap": ConfigKey(kind="number", allowed="a finite number > 0", meaning="upper bound of r"),
    "clip_low_threshold": ConfigKey(
        kind="number", allowed="a finite number >= 0, at most clip_high_threshold", meaning="lo: lower bound of r"
    ),
    "clip_high_threshold": ConfigKey(
        kind="number", allowed="a finite number > 0, at least clip_low_threshold", meaning="hi: upper bound of r"
    ),
}
"""What there is to say of each key; which loss has which, and its default, is said by the losses' sections."""

FORWARD_ONLY = LossForm(
    name="forward_logprob", section=None, inputs=(TARGETS,), formula="none: forward alone, answers lp"
)
FORMS: tuple[LossForm, ...] = (
    LossForm(name="cross_entropy", section=CrossEntropy, inputs=(TARGETS, WEIGHTS_OR_MASK), formula="−Σ w·lp"),
    LossForm(
        name="importance_sampling",
        form="importance weights",
        section=ImportanceSampling,
        inputs=(TARGETS, WEIGHTS, IMPORTANCE_WEIGHTS),
        formula="−Σ w·clamp(iw, −c, c)·lp",
    ),
    LossForm(
        name="importance_sampling",
        form="ratio",
        section=ImportanceSamplingRatio,
        inputs=RATIO_INPUTS,
        formula="−Σ m·min(r, c)·A; the gradient flows through r and is 0 where r > c",
    ),
    LossForm(
        name="truncated_importance_sampling",
        section=TruncatedImportanceSampling,
        inputs=RATIO_INPUTS,
        formula="−Σ m·min(r, tis_cap)·A·lp, r constant in the gradient",
    ),
    LossForm(
        name="ppo_clip",
        section=PpoClip,
        inputs=RATIO_INPUTS,
        formula="−Σ m·min(r·A, clip(r, lo, hi)·A); the gradient flows through r",
    ),
    LossForm(
        name="cispo",
        section=Cispo,
        inputs=RATIO_INPUTS,
        formula="−Σ m·clip(r, lo, hi)·A·lp, r constant in the gradient",
    ),
    FORWARD_ONLY,
    LossForm(
        name="surrogate",
        section=Surrogate,
        inputs=(TARGETS, SURROGATE_WEIGHTS),
        formula="Σ s·lp, minimised as it stands",
    ),
)


def loss_names() -> tuple[str, ...]:
    """Every name that clients can use, once."""
    return tuple(dict.fromkeys(form.name for form in FORMS))


def forms_of(name: str) -> tuple[LossForm, ...]:
    """The forms of a loss function; none for an unknown name."""
    return tuple(form for form in FORMS if form.name == name)


def describe_losses() -> list[dict[str, Any]]:
    """Every form of every loss function in JSON values, for `GET /api/v1/loss-functions`."""
    return [_description(form) for form in FORMS]


def losses_table() -> str:
    """Three Markdown tables: the loss functions, their inputs, and the keys of their configuration."""
    functions = [
        (
            f"`{form.name}`" + (f" ({form.form} form)" if form.form else ""),
            _listed(loss_input.name for loss_input in form.inputs[1:]) or "–",
            form.formula,
            form.normalisation,
            _listed(form.defaults),
        )
        for form in FORMS
    ]
    inputs = {loss_input.name: loss_input for form in FORMS for loss_input in form.inputs}
    described = [(f"`{name}`", found.dtype, found.meaning) for name, found in inputs.items()]
    defaults = {key: default for form in FORMS for key, default in form.defaults.items()}
    keys = [
        (f"`{name}`", key.kind, f"`{_json(defaults[name])}`", key.allowed, key.meaning)
        for name, key in CONFIG_KEYS.items()
    ]
    heads = ("Loss function", "Inputs besides `target_tokens`", "Loss", "Divided by", "Configuration keys")
    return "\n".join(
        (
            _table(heads, functions),
            _table(("Input", "dtype", "Meaning"), described),
            _table(("Key", "Type", "Default", "Allowed", "Meaning"), keys),
        )
    )


def _description(form: LossForm) -> dict[str, Any]:
    return {
        "name": form.name,
        "form": form.form,
        "direction": "forward" if form.section is None else "forward and backward",
        "formula": form.formula,
        "normalisation": form.normalisation,
        "inputs": [
            {
                "name": loss_input.name,
                "dtype": loss_input.dtype,
                "shape": ["num_tokens"],
                "or_else": loss_input.or_else,
                "meaning": loss_input.meaning,
            }
            for loss_input in form.inputs
        ],
        "config": [
            {
                "name": name,
                "type": CONFIG_KEYS[name].kind,
                "default": default,
                "allowed": CONFIG_KEYS[name].allowed,
                "meaning": CONFIG_KEYS[name].meaning,
            }
            for name, default in form.defaults.items()
        ],
    }


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _json(value: object) -> str:
    return "null" if value is None else str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
