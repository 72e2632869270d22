"""`http-binary` requests: a manifest and one pack of tensors in a multipart body. It knows no loss and no model.

Runs where large bodies are decoded, never on the event loop.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard
from pydantic import ValidationError
from pydantic_core import from_json
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from weaver_rl.errors import ServiceError
from weaver_rl.service.http.mistakes import invalid_request, shown
from weaver_rl.service.http.wire import PackBody, PackManifest

TENSOR_KEY = "$tensor"
PART_NAMES = ("manifest", "tensor_pack")
CHUNK_BYTES = 1 << 20
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_STEP_BYTES = 1 << 10
"""Bytes decompressed in one call. A frame can stand for 128 KiB in 4 bytes, so a call makes 32 MiB at most."""

_DTYPES = {"int64": "<i8", "int32": "<i4", "float32": "<f4", "float64": "<f8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRequest:
    """What a multipart body held."""

    manifest: PackManifest
    digest: str
    """SHA-256 of the manifest, which has that of the pack."""
    wire_pack: bytearray
    """As it came, unchecked."""

    def pack(self, limit_bytes: int) -> bytearray:
        """Checked and decoded.

        Raises:
            ServiceError: 400 naming what is wrong, 413 for one that decodes to more than `limit_bytes`.
        """
        return _decoded(self.wire_pack, self.manifest.tensor_pack, limit_bytes)


def read_packed(body: bytes, content_type: str) -> PackedRequest:
    """Takes a multipart body apart. Raises ServiceError 400 naming what is wrong."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise _bad("Content-Type multipart/form-data names no boundary")
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        view = memoryview(body)
        for start in range(0, len(body), CHUNK_BYTES):
            parser.write(bytes(view[start : start + CHUNK_BYTES]))
    except FormParserError as error:
        raise _bad(f"the multipart body cannot be read: {error}") from error
    if not parts.complete or len(parts.contents) != len(PART_NAMES):
        raise _bad(
            f"the multipart body must have the parts {' and '.join(PART_NAMES)}, in this order, and a last boundary; "
            f"seen {len(parts.contents)} part(s){'' if parts.complete else ', cut off'}"
        )
    raw_manifest, wire_pack = parts.contents
    return PackedRequest(
        manifest=_manifest(raw_manifest), digest=hashlib.sha256(raw_manifest).hexdigest(), wire_pack=wire_pack
    )


class _Parts:
    """Collects the two parts as the parser finds them."""

    def __init__(self) -> None:
        self.contents: list[bytearray] = []
        self.complete = False
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._name: str | None = None

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._check_name,
            "on_part_data": lambda data, start, end: self.contents[-1].extend(memoryview(data)[start:end]),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.contents) == len(PART_NAMES):
            raise _bad(f"the multipart body has more than the parts {' and '.join(PART_NAMES)}")
        self.contents.append(bytearray())
        self._name = None

    def _end_header(self) -> None:
        field, value = (bytes(part) for part in self._header)
        self._header = (bytearray(), bytearray())
        if field.lower() == b"content-disposition":
            kind, options = parse_options_header(value)
            if kind == b"form-data":
                self._name = options.get(b"name", b"").decode("utf-8", "replace")

    def _check_name(self) -> None:
        wanted = PART_NAMES[len(self.contents) - 1]
        if self._name != wanted:
            raise _bad(f"part {len(self.contents)} of the multipart body must be {wanted!r}, seen {shown(self._name)}")

    def _end(self) -> None:
        self.complete = True


def _manifest(raw: bytearray) -> PackManifest:
    try:
        return PackManifest.model_validate(from_json(bytes(raw)))
    except ValidationError as error:
        mistakes = [{**each, "loc": ("body", "manifest", *each["loc"])} for each in error.errors(include_url=False)]
        raise invalid_request(mistakes) from error
    except ValueError as error:
        raise _bad(f"manifest: is no JSON: {error}") from error


def _decoded(wire_pack: bytearray, said: PackBody, limit_bytes: int) -> bytearray:
    if len(wire_pack) != said.size_bytes:
        raise _bad(f"tensor_pack: has {len(wire_pack)} bytes, size_bytes says {said.size_bytes}")
    if hashlib.sha256(wire_pack).hexdigest() != said.sha256.lower():
        raise _bad("tensor_pack: its SHA-256 is not that of the manifest")
    if said.codec == "raw":
        if said.decoded_size_bytes not in (None, said.size_bytes):
            raise _bad("tensor_pack: codec raw, but decoded_size_bytes is not size_bytes")
        return wire_pack
    if said.decoded_size_bytes is None:
        raise _bad("tensor_pack.decoded_size_bytes: is missing, and codec zstd needs it")
    if said.decoded_size_bytes > limit_bytes:
        raise ServiceError(
            "request_too_large",
            f"tensor_pack.decoded_size_bytes: {said.decoded_size_bytes}, allowed are {limit_bytes}",
            status=413,
        )
    return _decompressed(wire_pack, said.decoded_size_bytes)


def _decompressed(wire_pack: bytearray, num_bytes: int) -> bytearray:
    """Exactly one zstd frame of exactly `num_bytes`."""
    if not wire_pack.startswith(ZSTD_MAGIC):
        raise _bad("tensor_pack: codec zstd, but it begins with no zstd frame")
    frame = zstandard.ZstdDecompressor().decompressobj()
    decoded = bytearray()
    view = memoryview(wire_pack)
    for start in range(0, len(view), ZSTD_STEP_BYTES):
        if frame.eof:
            raise _bad("tensor_pack: something follows its zstd frame")
        try:
            decoded += frame.decompress(view[start : start + ZSTD_STEP_BYTES])
        except zstandard.ZstdError as error:
            raise _bad(f"tensor_pack: is no valid zstd frame: {error}") from error
        if len(decoded) > num_bytes:
            raise _bad(f"tensor_pack: decodes to more than decoded_size_bytes, {num_bytes}")
    if not frame.eof:
        raise _bad("tensor_pack: its zstd frame is cut off")
    if frame.unused_data:
        raise _bad("tensor_pack: something follows its zstd frame")
    if len(decoded) != num_bytes:
        raise _bad(f"tensor_pack: decodes to {len(decoded)} bytes, decoded_size_bytes says {num_bytes}")
    return decoded


def packed_array(reference: Mapping[str, Any], pack: bytearray | None, where: str) -> npt.NDArray[Any]:
    """The slice of the pack that `{"$tensor": ...}` describes, without a copy.

    Args:
        pack: None where the request came without one.
        where: name of the field, for messages.
    """
    if pack is None:
        raise _bad(f"{where}: is {TENSOR_KEY}, but the request has no tensor_pack")
    tensor = reference[TENSOR_KEY]
    if not isinstance(tensor, dict):
        raise _bad(f"{where}.{TENSOR_KEY}: must be an object, seen {shown(tensor)}")
    if tensor.get("format") != "raw-tensor" or tensor.get("codec", "raw") != "raw":
        seen = f"{shown(tensor.get('format'))} and {shown(tensor.get('codec'))}"
        raise _bad(f"{where}: format and codec must be raw-tensor and raw, seen {seen}")
    dtype = tensor.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _bad(f"{where}.dtype: seen {shown(dtype)}; allowed: {', '.join(_DTYPES)}")
    shape = shape_of(tensor.get("shape"), where)
    offset, num_bytes = (_natural(tensor.get(name), f"{where}.{name}") for name in ("offset", "size_bytes"))
    count = math.prod(shape)
    if count * np.dtype(_DTYPES[dtype]).itemsize != num_bytes:
        raise _bad(f"{where}: shape {list(shape)} of {dtype} is not {num_bytes} bytes, which size_bytes says")
    if offset + num_bytes > len(pack):
        raise _bad(f"{where}: bytes {offset} to {offset + num_bytes} of a pack that has {len(pack)}")
    values = np.frombuffer(pack, _DTYPES[dtype], count, offset) if count else np.empty(0, _DTYPES[dtype])
    return shaped(values, shape, where)


def shape_of(value: Any, where: str) -> tuple[int, ...]:
    """Checks a shape; raises ServiceError."""
    if not isinstance(value, list) or len(value) > 8:
        raise _bad(f"{where}.shape: must be a list of at most 8 numbers, seen {shown(value)}")
    return tuple(_natural(each, f"{where}.shape[{axis}]") for axis, each in enumerate(value))


def shaped(values: npt.NDArray[Any], shape: tuple[int, ...], where: str) -> npt.NDArray[Any]:
    """The same numbers in another shape; raises ServiceError where they do not fill it."""
    try:
        return values.reshape(shape)
    except ValueError as error:
        raise _bad(f"{where}: {values.size} numbers do not have the shape {list(shape)}") from error


def _natural(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise _bad(f"{where}: must be an integer of at least 0, seen {shown(value)}")
    return value


def _bad(message: str) -> ServiceError:
    return ServiceError("invalid_request", message, status=400)
