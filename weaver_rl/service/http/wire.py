"""What clients may send: every request body as the OpenAPI description shows it. It calls nothing.

Unknown fields are let through, since the protocol grows; a known field of another type or size is an error.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema

from weaver_rl.service import weaver_paths

MAX_INT = 2**31 - 1
MAX_TTL_SECONDS = 10 * 365 * 86400
DEFAULT_SAMPLER_TTL_SECONDS = 3600
DEFAULT_ARTIFACT_TTL_SECONDS = 604800
MAX_TOP_LOGPROBS = 20

NOT_SERVED = "Not served here: anything but the default is refused (`unsupported`)."


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("has the character U+0000, which databases do not keep")
    return text


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Every text and number in a free-form object is one that a database keeps."""
    left: list[Any] = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            left += part
        elif isinstance(part, str):
            _without_nul(part)
        elif isinstance(part, int | float) and not abs(part) < 2**1023:
            raise ValueError("has a number beyond float64")
    return value


Text = Annotated[str, StringConstraints(max_length=4096), AfterValidator(_without_nul)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=255), AfterValidator(_without_nul)]
FreeForm = Annotated[dict[str, Any], AfterValidator(_plain)]
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Codec = Literal["raw", "zstd"]
TtlSeconds = Annotated[int, Field(ge=1, le=MAX_TTL_SECONDS)]


class Wire(BaseModel):
    """Base of all bodies: what is not said is let through, true is no number and 1.5 no integer."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


# -- sessions --------------------------------------------------------------------------------------------------------


class SchedulingPolicy(Wire):
    """Where the client would like to run. There is one cluster here, so it is kept and changes nothing."""

    mode: Literal["auto", "fixed", "prefer"] = "auto"
    clusters: list[Label] = Field(default_factory=list, max_length=32)


class NewSessionBody(Wire):
    tags: list[Text] = Field(default_factory=list, max_length=1000)
    user_metadata: FreeForm | None = None
    sdk_version: Text | None = None
    name: Text | None = None
    labels: dict[Text, Text] | None = None
    organization_id: Text | None = None
    project_id: Text | None = None
    scheduling_policy: SchedulingPolicy | None = None


class MetricBody(Wire):
    model_id: Label | None = None
    name: Label
    value: float
    step: Annotated[int, Field(ge=0, le=2**53)]
    occurred_at: Annotated[datetime, Field(strict=False)]
    labels: dict[Text, Text | bool | int | float] = Field(default_factory=dict)


class MetricsBody(Wire):
    metrics: list[MetricBody] = Field(max_length=1000)


# -- models ----------------------------------------------------------------------------------------------------------


class LoraBody(Wire):
    """Any subset."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 32
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    seed: Seed | None = None


class NewModelBody(Wire):
    model_seq_id: Count
    base_model: Label = Field(description="Name in the lineup; `:<tokens>` after it bounds the sequence length.")
    training_mode: Literal["lora", "full_ft"] | None = Field(default=None, description="Absent or null: lora.")
    lora_config: LoraBody | None = None
    user_metadata: FreeForm | None = None
    performance_tier: Literal["normal"] | None = Field(default=None, description="There is one.")
    training_max_sequence_length: Annotated[int, Field(ge=2, le=MAX_INT)] | None = None


class TerminateBody(Wire):
    instance_types: list[Literal["trainer", "inference"]] | None = Field(
        default=None, description="Without `trainer` the model goes on: engines start and end by themselves."
    )


# -- training --------------------------------------------------------------------------------------------------------

_TENSOR_DTYPES = ["int64", "int32", "float32", "float64"]
_PACKED_SCHEMA = {
    "type": "object",
    "description": "A slice of the decoded tensor pack; little-endian, C order.",
    "properties": {
        "$tensor": {
            "type": "object",
            "properties": {
                "format": {"const": "raw-tensor"},
                "codec": {"const": "raw"},
                "dtype": {"enum": _TENSOR_DTYPES},
                "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                "offset": {"type": "integer", "minimum": 0},
                "size_bytes": {"type": "integer", "minimum": 0},
            },
            "required": ["format", "dtype", "shape", "offset", "size_bytes"],
        }
    },
    "required": ["$tensor"],
}
_TOKENS_SCHEMA = {"anyOf": [{"type": "array", "items": {"type": "integer", "minimum": 0}}, _PACKED_SCHEMA]}
_INPUT_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "description": "A dense tensor.",
            "properties": {
                "data": {"description": "Nested lists of numbers, or one number."},
                "dtype": {"enum": _TENSOR_DTYPES},
                "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            },
            "required": ["data", "dtype"],
        },
        _PACKED_SCHEMA,
        {"type": "array", "description": "A ragged list of lists."},
    ]
}

# Any: tokens and tensors are millions of numbers that become arrays at once, in decoding.py.
Tokens = Annotated[Any, WithJsonSchema(_TOKENS_SCHEMA)]
LossInputs = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "additionalProperties": _INPUT_SCHEMA})]


class TrainingChunk(Wire):
    type: Literal["encoded_text"]
    tokens: Tokens


class TrainingInput(Wire):
    chunks: list[TrainingChunk] = Field(min_length=1)


class DatumBody(Wire):
    """One token sequence. Samples of managed datasets (`kind: sample_ref`) are not served here."""

    kind: Literal["token"] = "token"
    model_input: TrainingInput
    loss_fn_inputs: LossInputs
    metadata: dict[str, Any] | None = None
    datum_id: Label | None = Field(default=None, description="Of all data of a request or of none; each another.")


class LossInput(Wire):
    loss_fn: Label = Field(description="See GET /api/v1/loss-functions.")
    data: list[DatumBody] = Field(min_length=1)
    loss_fn_config: dict[str, Any] | None = None


class TrainingPayload(Wire):
    model_id: str | None = None
    seq_id: Count
    tensor_transport: Literal["default", "http-binary"] = "default"
    tensor_compression: Codec | None = None
    metadata: dict[str, Any] | None = None


class ForwardPayload(TrainingPayload):
    forward_input: LossInput


class ForwardBackwardPayload(TrainingPayload):
    forward_backward_input: LossInput


class ForwardBody(Wire):
    payload: ForwardPayload


class ForwardBackwardBody(Wire):
    payload: ForwardBackwardPayload


class PackBody(Wire):
    """Size and digest of a tensor pack."""

    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")] = Field(description="Of the bytes sent.")
    codec: Codec = "raw"
    decoded_size_bytes: Annotated[int, Field(ge=0)] | None = Field(default=None, description="Needed for zstd.")


class PackManifest(Wire):
    """The first of the two parts of an `http-binary` request; the second is the pack."""

    version: Literal[1]
    request: dict[str, Any] = Field(description="The body as it would be without a pack.")
    tensor_pack: PackBody


class AdamBody(Wire):
    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    grad_clip_norm: Annotated[float, Field(ge=0)] = Field(default=1.0, description="0: not clipped.")


class OptimPayload(Wire):
    model_id: str | None = None
    seq_id: Count
    adam_params: AdamBody = AdamBody()


class OptimBody(Wire):
    payload: OptimPayload


# -- checkpoints -----------------------------------------------------------------------------------------------------

CheckpointName = Annotated[str, StringConstraints(pattern=f"^{weaver_paths.NAME}$")]
CheckpointPath = Annotated[str, StringConstraints(pattern=f"^{weaver_paths.CHECKPOINT}$")]


class ExportSamplerBody(Wire):
    seq_id: Count
    path: CheckpointName | None = Field(default=None, description="A name for the weights; null: one is made.")
    ttl_seconds: TtlSeconds | None = Field(default=None, description="Absent or null: kept for good.")


class SaveBody(Wire):
    type: Literal["weight", "weight_and_optimizer", "sampling"] = "weight"
    name: CheckpointName | None = None
    ttl_seconds: TtlSeconds | None = Field(
        default=None, description="null: kept for good. Absent: 3600 for `sampling`, else kept for good."
    )


class LoadBody(Wire):
    path: CheckpointPath
    include_optimizer: bool = False


class TtlBody(Wire):
    path: CheckpointPath
    ttl_seconds: TtlSeconds | None = Field(description="Counted from now; null: kept for good.")


class ExportBody(Wire):
    format: Literal["huggingface"] = "huggingface"
    merge_adapter: bool = False
    ttl_seconds: TtlSeconds | None = Field(
        default=DEFAULT_ARTIFACT_TTL_SECONDS, description="null: as long as the checkpoint."
    )


class ExportCheckpointBody(ExportBody):
    force: bool = Field(default=False, description="Anew, though there is one.")


# -- sampling --------------------------------------------------------------------------------------------------------


class PromptChunk(Wire):
    type: Literal["encoded_text"]
    tokens: list[TokenId]


class PromptBody(Wire):
    chunks: list[PromptChunk] = Field(min_length=1, description="Joined in their order.")


class NewSamplingSessionBody(Wire):
    sampling_session_seq_id: Count
    base_model: Label | None = None
    model_path: CheckpointPath | None = Field(default=None, description="null: the base model as it is.")
    model_id: Label | None = None


class SamplingParamsBody(Wire):
    max_tokens: Count | None = Field(default=None, description="null: as many as there is room for.")
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(default=1.0, description="0: always the likeliest token.")
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] = Field(default=-1, description="-1 or 0: off.")
    stop: list[Annotated[Text, StringConstraints(min_length=1)]] = Field(default_factory=list, max_length=64)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=1024)
    seed: Seed | None = Field(default=None, description="The same seed gives the same tokens.")
    sampling_seed: Seed | None = Field(default=None, description="Another name of `seed`.")


class SampleBody(Wire):
    prompt: PromptBody
    sampling_params: SamplingParamsBody = SamplingParamsBody()
    num_samples: Count = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    return_old_logprob: bool = False
    return_sampling_mask: bool = Field(default=False, description=NOT_SERVED)
    return_moe_topk_indices: bool = Field(default=False, description=NOT_SERVED)
    score_centering: dict[str, Any] | None = Field(default=None, description=NOT_SERVED)


class LogprobsConfig(Wire):
    temperature: Annotated[float, Field(ge=0.01, le=2)] = 1.0


class LogprobsBody(Wire):
    prompt: PromptBody
    loss_fn_config: LogprobsConfig | None = None
    return_rollout_token_expert: bool = Field(default=False, description=NOT_SERVED)


class PauseBody(Wire):
    mode: Literal["abort", "retract", "in_place"]
