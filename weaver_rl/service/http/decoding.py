"""From the bytes of a training request to what the learner is given, in this process or in one that may take its time.

It knows no session, model or file; workers import it, so it imports no web framework.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from pydantic_core import from_json

from weaver_rl.errors import ServiceError
from weaver_rl.service.calls import TrainingCall
from weaver_rl.service.http.mistakes import invalid_request, shown
from weaver_rl.service.http.tensor_packs import TENSOR_KEY, PackedRequest, packed_array, read_packed, shape_of, shaped
from weaver_rl.service.http.wire import MAX_INT, Codec, DatumBody, ForwardBackwardBody, ForwardBody, LossInput
from weaver_rl.service.loss_functions import RawDatum, resolve_loss
from weaver_rl.types import Int64Array

JSON = "application/json"
MULTIPART = "multipart/form-data"

_INTEGERS = {"int64": np.int64, "int32": np.int32}
_FLOATS = {"float32": np.float32, "float64": np.float64}
_UNSUPPORTED_METADATA = (
    "router_replay",
    "sampler_distribution",
    "sampler_distribution_ref",
    "sampling_mask_ref",
    "sampling_mask_refs",
)
"""What changes how the vendor's trainer computes: left out silently, the gradient would be another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlace:
    """Where another process of this machine finds a file that this one has open, and that may have no name."""

    pid: int
    fd: int

    def read(self) -> bytes:
        return Path(f"/proc/{self.pid}/fd/{self.fd}").read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeJob:
    """One request to decode."""

    body: bytes | FilePlace
    content_type: str
    model_id: str
    """Of the address; a body that names another one is refused."""
    backward: bool
    limit_bytes: int
    """Of a tensor pack, decoded."""

    @property
    def media_type(self) -> str:
        return self.content_type.partition(";")[0].strip().lower()

    @property
    def takes_long(self) -> bool:
        """Large now, or perhaps once it is decompressed."""
        return isinstance(self.body, FilePlace) or self.media_type == MULTIPART


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A request that can be taken."""

    call: TrainingCall
    codec: Codec | None
    """Of its tensor pack, and so of the answer's; None: it came without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A request that cannot be taken."""

    error: ServiceError
    seq_id: int | None
    """If it could be read: it leaves no gap then."""


def decode(job: DecodeJob) -> Decoded | Refusal:
    """Decodes and checks a request; a mistake of the client's is a value, not an exception."""
    seq_id = None
    try:
        request, packed, digest = _opened(job)
        # Before the pack is looked at: a request with a bad one leaves no gap either.
        seq_id = seq_id_of(request)
        pack = None if packed is None else packed.pack(job.limit_bytes)
        call = _call(job, request, pack, digest)
        return Decoded(call=call, codec=None if packed is None else packed.manifest.tensor_pack.codec)
    except ServiceError as error:
        return Refusal(error=error, seq_id=seq_id)


def _opened(job: DecodeJob) -> tuple[Any, PackedRequest | None, str]:
    """The request in JSON, what came with it, and the digest of both."""
    body = job.body.read() if isinstance(job.body, FilePlace) else job.body
    if job.media_type == MULTIPART:
        packed = read_packed(body, job.content_type)
        return packed.manifest.request, packed, packed.digest
    if job.media_type != JSON:
        raise ServiceError(
            "unsupported_media_type",
            f"Content-Type: seen {shown(job.content_type)}; allowed: {JSON}, {MULTIPART}",
            status=415,
        )
    try:
        return from_json(body), None, hashlib.sha256(body).hexdigest()
    except ValueError as error:
        raise _bad(f"the body is no JSON: {error}") from error


def seq_id_of(request: Any) -> int | None:
    """Of a body that may be anything: in its payload, or beside where there is none."""
    payload = request.get("payload", request) if isinstance(request, dict) else None
    seq_id = payload.get("seq_id") if isinstance(payload, dict) else None
    return seq_id if type(seq_id) is int and 0 < seq_id <= MAX_INT else None


def _call(job: DecodeJob, request: Any, pack: bytearray | None, digest: str) -> TrainingCall:
    try:
        if job.backward:
            whole = ForwardBackwardBody.model_validate(request).payload
            asked = whole.forward_backward_input
        else:
            forward = ForwardBody.model_validate(request).payload
            whole, asked = forward, forward.forward_input  # type: ignore[assignment]
    except ValidationError as error:
        mistakes = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise invalid_request(mistakes) from error
    check_same_model(whole.model_id, job.model_id)
    _check_datum_ids(asked)
    raw = [_raw_datum(datum, pack, f"data[{index}]") for index, datum in enumerate(asked.data)]
    return TrainingCall(
        seq_id=whole.seq_id,
        digest=digest,
        datum_ids=tuple(datum.datum_id for datum in asked.data),
        request=resolve_loss(asked.loss_fn, asked.loss_fn_config or {}, raw, backward=job.backward),
    )


def check_same_model(said: str | None, model_id: str) -> None:
    """The id in a body is that of the address, where there is one."""
    if said is not None and said != model_id:
        raise _bad(f"payload.model_id: is {shown(said)}, the address says {model_id}")


def _check_datum_ids(asked: LossInput) -> None:
    first_of: dict[str, int] = {}
    has_ids = asked.data[0].datum_id is not None
    for index, datum in enumerate(asked.data):
        if (datum.datum_id is not None) != has_ids:
            raise _bad(f"data[{index}].datum_id: all data of a request have one, or none; data[0] is another case")
        if datum.datum_id is not None and first_of.setdefault(datum.datum_id, index) != index:
            raise _bad(f"data[{index}].datum_id: {shown(datum.datum_id)} is that of data[{first_of[datum.datum_id]}]")


def _raw_datum(datum: DatumBody, pack: bytearray | None, where: str) -> RawDatum:
    refused = [key for key in _UNSUPPORTED_METADATA if key in (datum.metadata or {})]
    if refused:
        raise ServiceError("unsupported", f"{where}.metadata.{refused[0]}: not served here", status=400)
    chunks = [
        _token_ids(chunk.tokens, pack, f"{where}.model_input.chunks[{index}].tokens")
        for index, chunk in enumerate(datum.model_input.chunks)
    ]
    inputs = {
        name: _loss_input(value, pack, f"{where}.loss_fn_inputs.{name}") for name, value in datum.loss_fn_inputs.items()
    }
    token_ids = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return RawDatum(datum_id=datum.datum_id, token_ids_N=token_ids, inputs=inputs)


def _token_ids(value: Any, pack: bytearray | None, where: str) -> Int64Array:
    values = packed_array(value, pack, where) if _is_packed(value) else _array(value, where)
    if values.size == 0 and values.ndim == 1:
        return np.empty(0, np.int64)
    if values.ndim != 1 or values.dtype.kind != "i":
        raise _bad(f"{where}: must be a list of integers, seen {values.dtype} of shape {list(values.shape)}")
    if (values < 0).any():
        raise _bad(f"{where}[{int((values < 0).argmax())}]: must be at least 0, seen {values.min()}")
    return values.astype(np.int64, copy=False)


def _loss_input(value: Any, pack: bytearray | None, where: str) -> Any:
    """An array; what is neither a tensor nor in the pack is left as it came."""
    if _is_packed(value):
        return packed_array(value, pack, where)
    if not isinstance(value, dict):
        return value
    if "data" not in value:
        raise _bad(f"{where}: a tensor is {{data, dtype}} or {{{TENSOR_KEY}}}, seen the keys {shown(sorted(value))}")
    values = _typed(_array(value["data"], where), value.get("dtype"), where)
    return shaped(values, shape_of(value["shape"], where), where) if value.get("shape") is not None else values


def _is_packed(value: Any) -> bool:
    return isinstance(value, Mapping) and TENSOR_KEY in value


def _array(value: Any, where: str) -> npt.NDArray[Any]:
    """Numbers as numpy sees them; not straight into a dtype, which would read text and null as numbers."""
    try:
        values = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise _bad(f"{where}: must be numbers in lists of the same length, seen {shown(value)}") from error
    if values.dtype.kind not in "bif":
        raise _bad(f"{where}: must be numbers of 64 bits, seen {shown(value)}")
    return values


def _typed(values: npt.NDArray[Any], dtype: Any, where: str) -> npt.NDArray[Any]:
    if isinstance(dtype, str) and dtype in _FLOATS:
        # Beyond float32 becomes infinity, which resolve_loss names with its position.
        with np.errstate(over="ignore"):
            return values.astype(_FLOATS[dtype], copy=False)
    if not isinstance(dtype, str) or dtype not in _INTEGERS:
        allowed: Sequence[str] = [*_INTEGERS, *_FLOATS]
        raise _bad(f"{where}.dtype: seen {shown(dtype)}; allowed: {', '.join(allowed)}")
    if values.dtype.kind == "f" and values.size:
        raise _bad(f"{where}: dtype is {dtype}, but data has numbers that are no integers")
    narrow = values.astype(_INTEGERS[dtype], copy=False)
    if values.size and (narrow != values).any():
        raise _bad(f"{where}: dtype is {dtype}, but data has an integer beyond it")
    return narrow


def _bad(message: str) -> ServiceError:
    return ServiceError("invalid_request", message, status=400)
