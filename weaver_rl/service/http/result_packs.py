"""Tensors of results in one pack, apart from the JSON that refers to them, as `http-binary` clients get them.

It knows no loss and no operation. Packs of requests are tensor_packs.py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import zstandard
from starlette.responses import Response, StreamingResponse

from weaver_rl.service.http.tensor_packs import TENSOR_KEY
from weaver_rl.service.http.wire import Codec
from weaver_rl.types import Float32Array

CODEC_HEADER = "X-Weaver-Tensor-Codec"
DECODED_SIZE_HEADER = "X-Weaver-Tensor-Decoded-Size"
CHUNK_BYTES = 1 << 20
ZSTD_LEVEL = 3


class PackDescription(msgspec.Struct, frozen=True, kw_only=True):
    """`tensor_pack` of a response: what its client will have fetched when the pack arrived whole."""

    size_bytes: int
    sha256: str
    codec: Codec
    decoded_size_bytes: int


class _Described(msgspec.Struct):
    tensor_pack: PackDescription | None = None


class Packer:
    """Takes tensors one by one.

    Example:
        packer = Packer("zstd")
        reference = packer.add(logprobs_N)  # for the JSON
        pack, description = packer.packed()
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._tensors: list[bytes] = []
        self._num_bytes = 0

    def add(self, values: Float32Array) -> dict[str, Any]:
        """`{"$tensor": ...}`, which stands for it."""
        content = np.ascontiguousarray(values, np.dtype("<f4")).tobytes()
        offset = self._num_bytes
        self._tensors.append(content)
        self._num_bytes += len(content)
        described = {
            "format": "raw-tensor",
            "codec": "raw",
            "dtype": "float32",
            "shape": list(values.shape),
            "offset": offset,
            "size_bytes": len(content),
        }
        return {TENSOR_KEY: described}

    def packed(self) -> tuple[bytes, PackDescription]:
        """All that was added, as it goes to the client; zstd as one frame, which says its size."""
        pack = b"".join(self._tensors)
        if self._codec == "zstd":
            pack = bytes(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(pack))
        description = PackDescription(
            size_bytes=len(pack),
            sha256=hashlib.sha256(pack).hexdigest(),
            codec=self._codec,
            decoded_size_bytes=self._num_bytes,
        )
        return pack, description


def description_in(response: bytes) -> PackDescription | None:
    """Of a response in JSON; None where everything is in it."""
    return msgspec.json.decode(response, type=_Described).tensor_pack


def pack_response(pack: bytes, description: PackDescription) -> Response:
    """The bytes themselves, piece by piece: a socket's buffer would be as large as the whole."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(pack), CHUNK_BYTES):
            yield pack[start : start + CHUNK_BYTES]

    headers = {
        "Content-Length": str(len(pack)),
        CODEC_HEADER: description.codec,
        DECODED_SIZE_HEADER: str(description.decoded_size_bytes),
    }
    return StreamingResponse(pieces(), headers=headers, media_type="application/octet-stream")
